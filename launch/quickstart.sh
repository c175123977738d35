#!/usr/bin/env bash
# A clean clone to a finished report, on a CPU: installs align_jax into .venv, then runs configs/quickstart.py.
# Extra arguments go to the study, e.g. launch/quickstart.sh --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec python -m align_jax.study --config=configs/quickstart.py "$@"
