#!/usr/bin/env bash
# Installs what the tests need into .venv (or the active environment) and runs them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=test source tools/venv.sh

ruff check .
exec python -m pytest tests -q --durations=10 "$@"
