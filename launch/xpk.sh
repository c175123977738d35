#!/usr/bin/env bash
# GKE through XPK: builds an image of the last commit, pushes it, and creates a workload that runs the command on all hosts.
# Options of `xpk workload create` stand before the command; IMAGE names the image without a tag:
#   export IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/align_jax
#   launch/xpk.sh [--dry_run] --cluster=tpus --workload=dpo --tpu-type=v5litepod-64 python -m align_jax.train --config=...
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/steps.sh
split "$@"
[ -n "${IMAGE:-}" ] || fail "IMAGE is not set, as in: export IMAGE=europe-west4-docker.pkg.dev/PROJECT/REPOSITORY/align_jax"
for option in --cluster --workload --tpu-type; do
  [[ " ${options[*]} " == *" $option="?* ]] || fail "$option=... is missing before the command"
done
[[ " ${options[*]} " =~ \ --workload=[a-z]([-a-z0-9]*[a-z0-9])?\  ]] ||
  fail "--workload: expected small letters, digits and -, as Kubernetes has it, in '${options[*]}'"
[[ " ${options[*]} " =~ \ --tpu-type=([^\ ]+) ]] && type="${BASH_REMATCH[1]}"
is_slice 'v4|v5litepod|v5p|v6e|tpu7x' "$type" || [[ "$type" == *-*x* ]] ||  # or its topology
  fail "--tpu-type: got '$type', expected v4, v5litepod, v5p, v6e or tpu7x with the number of a slice, as v5litepod-64"
run_is_shared

only_committed
image="$IMAGE:$(git rev-parse --short=12 HEAD)"
step bash -o pipefail -c "git archive HEAD | docker build --platform=linux/amd64 --file=launch/Dockerfile --tag=$(quote "$image") -"
step docker push "$image"
# exec: a signal to the container reaches the command, which saves and exits; 143 makes XPK start the workload again.
step xpk workload create --docker-image="$image" --max-restarts=50 --termination-grace-period-seconds=120 \
  "${options[@]}" --command="exec $(quote "${command[@]}")"
