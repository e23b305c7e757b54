#!/usr/bin/env bash
#SBATCH --job-name=moejax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#
# Trains on a Slurm cluster: one process per node, each with all devices of its node.
#
#   sbatch --nodes=8 --gpus-per-node=8 --cpus-per-task=64 launch/slurm.sh gpus COMMAND...
#   sbatch --nodes=2 --cpus-per-task=32 launch/slurm.sh cpus:4 COMMAND...    4 simulated devices each
#
# The job puts itself back into the queue, and goes on from its checkpoint, when it was asked to stop
# (SIGTERM: a preemption, or 180 s before the time limit), when the watchdog ended it, and when a
# process was killed, these two at most MOEJAX_MAX_RESTARTS times (default 20). `scancel JOB` ends it
# for good. The workdir, and the folder from which it is submitted, must be on shared storage.
set -uo pipefail

usage() {
  echo "usage: sbatch [SBATCH OPTIONS] launch/slurm.sh gpus|cpus:N COMMAND..." >&2
  exit 2
}
devices=${1:-}
[[ $devices =~ ^(gpus|cpus:[1-9][0-9]*)$ && $# -ge 2 ]] || usage
shift
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "launch/slurm.sh: submit it with sbatch" >&2; exit 2; }

STOPPED=85 EXPIRED=75 # of the watchdog: stopped in good order, and ended where it was stuck
export MOEJAX_COORDINATOR=auto MOEJAX_WATCHDOG=${MOEJAX_WATCHDOG-on} MOEJAX_STOPPED_STATUS=$STOPPED
export MOEJAX_GRACE=${MOEJAX_GRACE-180} # as --signal says above
unset MOEJAX_NUM_PROCESSES MOEJAX_PROCESS_ID # Slurm knows them
# srun takes sbatch's --cpus-per-task only from this variable, and gives one processor else.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
if [[ $devices == gpus ]]; then
  gpus=${SLURM_GPUS_ON_NODE:-0}
  ((gpus > 0)) || { echo "launch/slurm.sh gpus: the job has none; --gpus-per-node=N" >&2; exit 2; }
  # Else JAX, which counts one task per device, takes the first one of each node only.
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
  # Of a GPU's memory JAX takes three quarters else. It refuses the old name beside the new one.
  [[ -n ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]] ||
    export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}
else
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${devices#cpus:}
  # Threads: a simulated device that waits in a collective holds one, and must leave others some.
  export NPROC=${NPROC:-$((4 * JAX_NUM_CPU_DEVICES))}
fi

ended=$PWD/.moejax-$SLURM_JOB_ID.ended # a line "PROCESS STATUS" for each that has ended, in order
: >"$ended" || exit 1
trap 'rm -f "$ended"' EXIT # also where the job is cancelled

# One failure ends all. A stop is none: it would end the others while they leave. Signals are for
# the command, not for the shell around it.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  trap : TERM INT HUP USR1 USR2
  "${@:3}"
  status=$?
  # Appended to the file if it is still there: a cancelled job may have ended before its tasks.
  echo "$SLURM_PROCID $status" | dd of="$1" oflag=append conv=notrunc,nocreat status=none 2>/dev/null
  exit $((status == $2 ? 0 : status))
' task "$ended" "$STOPPED" "$@"
status=$?
first=$(grep -m 1 -v ' 0$' "$ended")
[[ -n $first ]] && status=${first#* }

again() {
  echo "launch/slurm.sh: $1; back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))" >&2
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  exit "$status"
}
# Slurm's own count holds the restarts after an orderly stop too, which are no failures.
counted=$PWD/.moejax-$SLURM_JOB_ID.failures
failures=$(cat "$counted" 2>/dev/null || echo 0)
if ((status == STOPPED)); then
  again "asked to stop"
elif ((status == EXPIRED || status > 128)) && ((failures < ${MOEJAX_MAX_RESTARTS:-20})); then
  echo $((failures + 1)) >"$counted"
  again "process ${first%% *} ended with status $status"
fi
rm -f "$counted"
exit "$status"
