#!/usr/bin/env bash
# What launch/slurm.sh puts into the queue: the command on all nodes, and again from the queue when its time is up.
#SBATCH --job-name=align_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}" XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# USR1 comes to this script alone, two minutes before the end; the processes get TERM, save and exit. A job that is
# cancelled, or that fails, has no USR1 and does not come back.
time_is_up=
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 "$@" &
while wait $! && status=0 || status=$?; kill -0 $! 2>/dev/null; do :; done  # a signal ends the wait, not srun
[ -z "$time_is_up" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
