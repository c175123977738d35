# shellcheck shell=bash
# Sourced by tools/test.sh and the scripts of launch/: make .venv once, install align_jax with the extras in $EXTRAS.
# An environment that is already active is used instead. PYTHON names the interpreter (3.11 or later).
if [ -z "${VIRTUAL_ENV:-}" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys
if sys.version_info < (3, 11):
    sys.exit("align_jax needs Python 3.11 or later, not " + sys.version.split()[0] + "; set PYTHON=/path/to/python")
' || exit 1
  if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv
  elif [ -n "${PYTHON:-}" ] && [ "$("$python" --version)" != "$(.venv/bin/python --version)" ]; then
    echo "PYTHON is $("$python" --version), but .venv has $(.venv/bin/python --version): delete .venv first" >&2; exit 1
  fi
  source .venv/bin/activate
fi
# Installing takes minutes: do it again only when setup.py, or what is asked for, has changed.
stamp="$VIRTUAL_ENV/.align_jax-${EXTRAS:-core}"
if [ ! -f "$stamp" ] || ! cmp -s setup.py "$stamp"; then
  echo "installing align_jax${EXTRAS:+[$EXTRAS]} into $VIRTUAL_ENV (a few minutes the first time)"
  python -m pip install -q -e ".${EXTRAS:+[$EXTRAS]}"
  cp setup.py "$stamp"
fi
