#!/usr/bin/env bash
# A clean clone to a finished report, on a CPU: installs align_jax into .venv, then runs configs/quickstart.py.
# Extra arguments go to the study, e.g. launch/quickstart.sh [--dry_run] --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/steps.sh

step source tools/venv.sh
step export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
last_step python -m align_jax.study --config=configs/quickstart.py "$@"
