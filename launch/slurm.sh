#!/usr/bin/env bash
# GPU nodes under SLURM: installs align_jax[cuda] into .venv and puts the command into the queue (launch/slurm_job.sh).
# Options of sbatch stand before the command:
#   launch/slurm.sh [--dry_run] --nodes=2 --gpus-per-node=8 --time=24:00:00 python -m align_jax.train --config=...
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/steps.sh
split "$@"
[ -n "$dry_run" ] || command -v sbatch > /dev/null || fail "sbatch is not here: this is for a login node of SLURM"

step export EXTRAS=cuda
step source tools/venv.sh
step mkdir -p runs  # where sbatch writes the log; it does not make the folder
step sbatch "${options[@]}" launch/slurm_job.sh "${command[@]}"
