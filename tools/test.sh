#!/usr/bin/env bash
# Installs what the tests need into .venv (or the active environment) and runs them; arguments go to pytest.
# Leaves out the tests marked slow, which CI runs too: bash tools/test.sh -m ""
# Two processes run them, a file each at a time: -n 0 is for a debugger.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="test" source tools/venv.sh

ruff check .
shellcheck --external-sources --severity=warning launch/*.sh tools/*.sh
exec python -m pytest tests -q -n 2 --dist loadfile --durations=10 --timeout=900 -m "not slow" "$@"
