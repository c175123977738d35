#!/usr/bin/env bash
# One machine with NVIDIA GPUs: installs align_jax[cuda] into .venv, looks at the driver and runs the command on all of them.
#   launch/gpu.sh [--dry_run] python -m align_jax.train --config=configs/dpo.py ...
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/steps.sh
split "$@"
[ ${#options[@]} -eq 0 ] || fail "got '${options[*]}' before the command, expected --dry_run or nothing"
[[ ",${JAX_PLATFORMS:-cuda}," == *,@(cuda|gpu),* ]] ||
  fail "JAX_PLATFORMS: got '$JAX_PLATFORMS' from the environment, expected cuda: unset JAX_PLATFORMS"

step nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
step export EXTRAS=cuda
step source tools/venv.sh
# Without a GPU an error instead of a slow run; jax alone takes three quarters of the memory.
step export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}" XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
last_step "${command[@]}"
