# shellcheck shell=bash
# Sourced by the scripts beside it, from the root of the repository: a step is done, or with --dry_run only printed, in a
# form that can be pasted. Needs bash 4.4 or later.
dry_run=
words=()
for word; do  # wherever it stands, behind the command too: overlooking it would do things
  case "$word" in --dry_run | --dry-run) dry_run=yes ;; *) words+=("$word") ;; esac
done
set -- "${words[@]}"
case "${1:-}" in --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "launch/$(basename "$0")"; exit 0 ;; esac

fail() { echo "error: $*" >&2; exit 2; }

quote() {  # the words as a shell reads them back, with no more quotes than that takes
  local word name line=
  for word; do
    name=
    if [[ "$word" =~ ^--[a-zA-Z0-9_.-]+= ]]; then name="${BASH_REMATCH[0]}"; fi
    word="${word#"$name"}"
    case "$word" in '' | *[!A-Za-z0-9_./:=,@%+-]*) word="${word@Q}" ;; esac
    line+=" $name$word"
  done
  printf '%s' "${line# }"
}

show() {
  doing="$(quote "$@")"
  if [ -n "$dry_run" ]; then echo "$doing"; else echo "+ $doing" >&2; fi
}

step() { show "$@"; [ -n "$dry_run" ] || "$@"; }

last_step() { show "$@"; [ -n "$dry_run" ] || exec "$@"; }  # signals and the exit status are the command's own

split() {  # -> options, command: what stands before `python` and what begins with it
  options=()
  while [ $# -gt 0 ] && [ "$1" != python ]; do options+=("$1"); shift; done
  command=("$@")
  [[ "${1:-} ${2:-} ${3:-}" =~ ^python\ -m\ align_jax\.[a-z_.]+$ ]] ||
    fail "got '${command[*]:-${options[*]}}', expected a command: python -m align_jax.train --config=configs/dpo.py ..."
  [ -f "${3//.//}.py" ] || fail "got '$3', of which there is no file ${3//.//}.py"
}

run_is_shared() {  # what is written elsewhere goes with the machines
  local word before=
  for word in "${command[@]}"; do
    [[ ! "$before" =~ ^--?config\.run$ ]] || word="--config.run=$word"
    [[ ! "$word" =~ ^--?config\.run= ]] || in_runs "${word#*=}" ||
      fail "--config.run: got '${word#*=}', expected a folder in runs/, which all hosts share"
    before="$word"
  done
}

in_runs() { [[ "$1" == runs/?* && "$1/" != */../* ]]; }

is_slice() {  # is_slice KINDS NAME: as Cloud spells it, where the number is a power of two or a multiple of 128
  [[ "$2" =~ ^($1)-([1-9][0-9]*)$ ]] && ((!(BASH_REMATCH[2] & BASH_REMATCH[2] - 1) || BASH_REMATCH[2] % 128 == 0))
}

only_committed() {  # what is committed is what runs
  git diff --quiet HEAD || echo "note: changes that are not committed stay here" >&2
}

set -E  # the trap holds in functions too
trap 'echo "error: exit status $? of: ${doing:-$0}" >&2' ERR
