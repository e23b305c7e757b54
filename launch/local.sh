#!/usr/bin/env bash
# Runs a command as several processes on this machine, each with simulated CPU devices.
#
#   launch/local.sh NUM_PROCESSES DEVICES_PER_PROCESS COMMAND...
#   launch/local.sh 2 4 moejax train configs/tiny.py:smoke mesh.expert=4 mesh.data=2 batch_size=8
#
# The first process writes to this terminal, the others to log files that are shown if they fail.
# Where one fails, the others are ended, and its status is the exit status. Ctrl-C and SIGTERM reach
# all of them as SIGTERM (training then saves and ends with status 0); the second one kills them.
set -uo pipefail

usage() {
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} =~ ^[1-9][0-9]*$ && $# -ge 3 ]] || usage
num_processes=$1 devices=$2
shift 2
command -v "$1" >/dev/null || { echo "launch/local.sh: there is no command '$1'" >&2; exit 127; }

PATIENCE=50 # tenths of a second in which the others may end by themselves after a failure
folder=$(mktemp -d "${TMPDIR:-/tmp}/moejax-local.XXXXXX") || exit 1
ended=$folder/ended # a line "PROCESS STATUS" for each process that has ended, in that order
: >"$ended"

port_in_use() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((20000 + RANDOM % 12000)) # below the ports that systems hand out themselves
while port_in_use "$port"; do port=$((20000 + RANDOM % 12000)); done

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
# Threads: a simulated device that waits in a collective holds one, and must leave others some.
export NPROC=${NPROC:-$((4 * devices))}
export MOEJAX_COORDINATOR=127.0.0.1:$port MOEJAX_NUM_PROCESSES=$num_processes
export MOEJAX_WATCHDOG=${MOEJAX_WATCHDOG-on} # a run that is stuck ends

# One process, and the line that it has ended. Signals are for the command, not for this shell.
run_process() {
  trap : INT TERM
  MOEJAX_PROCESS_ID=$1 "${@:2}" </dev/null
  echo "$1 $?" >>"$ended"
}

# Gloo, which carries the collectives, reports every connection on the standard output.
without_gloo() (
  trap '' INT TERM # it ends when the process has ended
  grep --line-buffered -v '^\[Gloo\] Rank'
)

groups=()
set -m # every process gets a group of its own, so that a signal reaches whatever it has started
for ((i = 0; i < num_processes; i++)); do
  if ((i == 0)); then
    { trap : INT TERM; PYTHONUNBUFFERED=1 run_process 0 "$@" | without_gloo; } &
  else
    run_process "$i" "$@" >"$folder/process-$i.log" 2>&1 &
  fi
  groups+=("$!")
done
set +m

signal_all() {
  local group
  for group in "${groups[@]}"; do kill "-$1" -- "-$group" 2>/dev/null; done
}

signals=0
stop() {
  signals=$((signals + 1))
  if ((signals == 1)); then
    echo "launch/local.sh: asking $num_processes processes to stop; once more to kill them" >&2
    signal_all TERM
  else
    signal_all KILL
    echo "launch/local.sh: killed; logs: $folder" >&2
    exit 130
  fi
}
trap stop INT TERM HUP

all_ended() { (($(wc -l <"$ended") >= num_processes)); }
failed() { grep -m 1 -v ' 0$' "$ended"; }

until all_ended || failed >/dev/null; do sleep 0.1; done
if ! first=$(failed); then
  wait
  rm -rf "$folder"
  exit 0
fi

read -r process status <<<"$first"
for ((waited = 0; waited < PATIENCE; waited++)); do
  all_ended && break
  sleep 0.1
done
signal_all KILL
wait 2>/dev/null # bash's own lines on who was killed
{
  echo "launch/local.sh: process $process of $num_processes failed with status $status; the others were ended"
  if ((process > 0)); then
    echo "the end of $folder/process-$process.log:"
    grep -v '^\[Gloo\] Rank' "$folder/process-$process.log" | tail -n 20 | sed 's/^/  /'
  elif ((num_processes > 1)); then
    echo "its output is above; that of the others is in $folder"
  fi
} >&2
exit "$status"
