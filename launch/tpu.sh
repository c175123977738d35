#!/usr/bin/env bash
# A Cloud TPU slice: make it, install on all its workers, run the command there, follow it, collect, delete.
#   launch/tpu.sh [--dry_run] create | queue | install | run COMMAND | log | status | stop | collect runs/NAME | delete --yes
#   launch/tpu.sh run python -m align_jax.train --config=configs/dpo.py ...
# Settings are environment variables: NAME, ZONE, TYPE (such as v5litepod-64); if wanted PROJECT, RUNTIME, SPOT=1, SLICES
# and SHARED, a gs://BUCKET or an NFS HOST:/SHARE that becomes runs/ on every worker. launch/README.md goes step by step.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/steps.sh

declare -A runtimes=([v2]=tpu-ubuntu2204-base [v3]=tpu-ubuntu2204-base [v4]=tpu-ubuntu2204-base
                     [v5litepod]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)
for setting in NAME ZONE TYPE; do [ -n "${!setting:-}" ] || fail "$setting is not set, as in: export $setting=..."; done
is_slice 'v2|v3|v4|v5litepod|v5p|v6e' "$TYPE" ||
  fail "TYPE: got '$TYPE', expected v2, v3, v4, v5litepod, v5p or v6e with the number of a slice, as v5litepod-64"
cores="${TYPE#*-}" slices="${SLICES:-1}" runtime="${RUNTIME:-${runtimes[${TYPE%-*}]}}"
[[ "${SHARED:-gs://none}" =~ ^gs://[^/]+$|^[^/:]+:/[^/] && "${SHARED:-}" != gs:/[^/]* ]] ||
  fail "SHARED: got '$SHARED', expected gs://BUCKET or HOST:/SHARE"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "SLICES: got '$slices', expected a number"

case "${SPOT:-0}" in 0) spot=() ;; 1) spot=(--spot) ;; *) fail "SPOT: got '$SPOT', expected 1 or 0" ;; esac

vm=(gcloud compute tpus tpu-vm) queued=(gcloud compute tpus queued-resources)
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
kind=(--accelerator-type="$TYPE" --scopes=https://www.googleapis.com/auth/cloud-platform "${spot[@]}")
nodes=("$NAME")
[ "$slices" -eq 1 ] || mapfile -t nodes < <(seq -f "$NAME-%g" 0 $((slices - 1)))  # as gcloud calls them

create() {
  [ "$slices" -eq 1 ] || fail "create makes one slice; SLICES=$slices needs queue"
  step "${vm[@]}" create "$NAME" "${where[@]}" "${kind[@]}" --version="$runtime"
}

queue() {
  local ids=(--node-id="$NAME")
  [ "$slices" -eq 1 ] || ids=(--node-count="$slices" --node-prefix="$NAME")
  step "${queued[@]}" create "$NAME" "${where[@]}" "${kind[@]}" --runtime-version="$runtime" "${ids[@]}"
  local describe=("${queued[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)") is
  [ -z "$dry_run" ] || { echo "# every 30 s, until it says ACTIVE:"; show "${describe[@]}"; return; }
  until [ "${is:-}" = ACTIVE ]; do
    show "${describe[@]}"
    is="$("${describe[@]}")"
    case "$is" in
      ACTIVE) ;;
      FAILED | SUSPEND*) echo "error: $NAME is $is; delete it and queue again" >&2; exit 1 ;;
      *) echo "$NAME is $is; it stays in the queue if you interrupt this, and status tells" >&2; sleep 30 ;;
    esac
  done
}

on_workers() {  # on_workers WORKERS ACTION [WORD...]: launch/tpu_worker.sh there
  local node workers="$1"; shift
  for node in "${nodes[@]}"; do
    step "${vm[@]}" ssh "$node" "${where[@]}" --worker="$workers" \
      --command="bash align_jax/launch/tpu_worker.sh $(quote "$@")"
  done
}

install() {
  only_committed
  local tree="${TMPDIR:-/tmp}/align_jax-$NAME.tar.gz" node
  step git archive --format=tar.gz --output="$tree" HEAD
  for node in "${nodes[@]}"; do
    step "${vm[@]}" scp "$tree" "$node:align_jax.tar.gz" "${where[@]}" --worker=all
    step "${vm[@]}" ssh "$node" "${where[@]}" --worker=all \
      --command="mkdir -p align_jax && tar -xzf align_jax.tar.gz -C align_jax"
  done
  on_workers all install ${SHARED:+"$SHARED"}
}

check_shared() {
  [ "$cores" -le 8 ] && [ "$slices" -eq 1 ] || [ -n "${SHARED:-}" ] ||
    fail "$TYPE has several hosts, which need one folder for their run: set SHARED to gs://BUCKET or HOST:/SHARE"
}

run() {
  split "$@"
  [ ${#options[@]} -eq 0 ] || fail "run: got '${options[*]}' before the command, expected nothing"
  run_is_shared
  on_workers all start "${command[@]}"
  log
}

log() { nodes=("${nodes[0]}"); on_workers 0 log; }  # the first host tells what there is to tell

status() {
  step "${queued[@]}" list "${where[@]}" --filter="name:$NAME"
  step "${vm[@]}" list "${where[@]}" --filter="name:$NAME"
  on_workers all status
}

stop() { on_workers all stop; }

collect() {
  [ $# -eq 1 ] && in_runs "$1" || fail "collect: got '$*', expected a folder in runs/"
  step mkdir -p "$1"
  case "${SHARED:-}" in
    gs://*) step gcloud storage rsync --recursive "$SHARED/${1#runs/}" "$1" ;;
    *) step "${vm[@]}" scp --recurse "${nodes[0]}:align_jax/$1" "$(dirname "$1")" "${where[@]}" --worker=0 ;;
  esac
}

delete() {
  [ "$*" = --yes ] || fail "delete: $NAME in $ZONE and all that is on its disks goes; add --yes"
  local as_queued as_made
  as_queued="$(quote "${queued[@]}" delete "$NAME" "${where[@]}" --force --quiet)"
  as_made="$(quote "${vm[@]}" delete "$NAME" "${where[@]}" --quiet)"
  step bash -c "$as_queued || $as_made"  # what was not queued is not found there
}

action="${1:-}"; shift || true
case "$action" in create | queue | install | run) check_shared ;; esac  # before it costs anything
case "$action" in
  run | collect | delete) "$action" "$@" ;;
  create | queue | install | log | status | stop)
    [ $# -eq 0 ] || fail "$action: got '$*', expected nothing after it"
    "$action" ;;
  *) fail "got '$action', expected create, queue, install, run, log, status, stop, collect or delete" ;;
esac
