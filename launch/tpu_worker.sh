#!/usr/bin/env bash
# What launch/tpu.sh does on a worker of a slice, where the home folder has a copy of the repository:
#   tpu_worker.sh install [gs://BUCKET | HOST:/SHARE] | start COMMAND | log | status | stop
set -euo pipefail
cd "$(dirname "$0")/.."
here=.worker  # lock: held while a command runs; pid, log and, once it ended, exit; shared: what runs/ has to be

fail() { echo "error: worker $HOSTNAME: $*" >&2; exit 1; }

install() {  # on a Python that align_jax runs on (the image's is 3.10), and with the shared folder as runs/
  python3 -m pip install -q --user uv
  [ -x .venv/bin/python ] || python3 -m uv venv -q --seed --python=3.12 .venv
  export PYTHON=.venv/bin/python EXTRAS=tpu
  source tools/venv.sh
  mkdir -p runs "$here"
  [ -n "${1:-}" ] || return 0
  echo "$1" >"$here/shared"
  if mountpoint -q runs; then return; fi
  case "$1" in
    gs://*) mount_bucket "${1#gs://}" ;;
    *) mount_nfs "$1" ;;
  esac
}

get() {  # a new machine is still updating itself and holds the lock
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install "$@"
}

# Neither way remembers what was not there: hosts read what the first one has just written.
mount_nfs() {
  get nfs-common
  sudo mount -t nfs -o lookupcache=positive,actimeo=1 "$1" runs
  sudo chmod 777 runs  # the top of a new share is root's
}

mount_bucket() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  if ! command -v gcsfuse >/dev/null; then
    curl -fsS "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    get gcsfuse
  fi
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" runs
}

start() {  # apart from this shell, so that a lost connection ends nothing
  mkdir -p "$here"
  [ ! -e "$here/shared" ] || mountpoint -q runs || fail "runs/ is not mounted: launch/tpu.sh install does it again"
  exec 9>"$here/lock"  # the command inherits the lock, which is free when the last process of it is gone
  flock --nonblock 9 || fail "a command is running here: launch/tpu.sh log follows it, stop ends it"
  rm -f "$here/exit"
  source .venv/bin/activate
  export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu}"  # without a TPU an error instead of a slow run
  # shellcheck disable=SC2016
  setsid nohup bash -c '"$@"; echo $? >.worker/exit' start "$@" >"$here/log" 2>&1 </dev/null &
  echo $! >"$here/pid"
  echo "$HOSTNAME: started"
}

is_running() { ! flock --nonblock "$here/lock" true; }

log() {  # to its end, and with the command's exit status
  [ -e "$here/pid" ] || fail "nothing was started"
  flock "$here/lock" true &  # ends with the command
  tail --lines=+1 --follow --sleep-interval=0.2 --pid=$! "$here/log"
  [ -e "$here/exit" ] || fail "the command was killed"
  return "$(<"$here/exit")"
}

status() {
  local how=running
  [ -e "$here/pid" ] || { echo "$HOSTNAME: nothing was started"; return; }
  is_running || how="ended with exit status $(cat "$here/exit" 2>/dev/null || echo unknown, it was killed)"
  echo "$HOSTNAME: $how: $(tail --lines=1 "$here/log")"
}

stop() {  # the command saves and exits; the shell around it stays to write down how
  if [ -e "$here/pid" ] && is_running; then pkill -TERM --parent "$(<"$here/pid")"; fi
  status
}

action="$1"; shift
"$action" "$@"
