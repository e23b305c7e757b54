#!/usr/bin/env bash
# Trains on Cloud TPU VMs without a cluster, through gcloud's queued resources.
#
#   launch/tpu_vm.sh [OPTIONS] create NAME TYPE [SLICES]   asks for slices of a type, and waits for them
#   launch/tpu_vm.sh [OPTIONS] install NAME FOLDER         copies a checkout to all hosts, installs it
#   launch/tpu_vm.sh [OPTIONS] run NAME COMMAND...         runs the command on all hosts
#   launch/tpu_vm.sh [OPTIONS] stop NAME                   training stops with a checkpoint
#   launch/tpu_vm.sh [OPTIONS] delete NAME                 gives the slices back
#
#   launch/tpu_vm.sh --zone us-east5-a create moe v5p-128
#   launch/tpu_vm.sh --zone us-east5-a run moe moejax train configs/olmoe_1b_7b.py:v5p_128 ...
#
# --zone ZONE (or TPU_ZONE), --project PROJECT (or gcloud's own), --runtime VERSION of the VM's image
# (or TPU_RUNTIME; by type else), --spot for slices that can be taken back, --dry-run to print
# gcloud's commands instead of running them.
set -euo pipefail

usage() {
  sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
fail() {
  echo "launch/tpu_vm.sh: $1" >&2
  exit 2
}

zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} runtime=${TPU_RUNTIME:-} dry_run="" spot=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --zone | --project | --runtime)
      [[ $# -ge 2 ]] || usage
      printf -v "${1#--}" %s "$2"
      shift ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=yes ;;
    *) usage ;;
  esac
  shift
done
action=${1:-} name=${2:-}
[[ -n $action && -n $name ]] || usage
shift 2
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "'$name' is no name of a resource (a-z, 0-9, -)"
[[ -n $zone ]] || fail "name the zone: --zone us-east5-a, or TPU_ZONE"
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")

gcloud_() {
  if [[ -n $dry_run ]]; then
    printf '%q ' gcloud "$@" | sed 's/ $//'
    echo
  else
    gcloud "$@"
  fi
}
everywhere() { # a shell command, on every host of every slice at once
  gcloud_ alpha compute tpus queued-resources ssh "$name" "${where[@]}" --node=all --worker=all \
    --command "$1"
}

PID=.moejax.pid # on each host, in the home folder
# What was copied takes the place of what was there, but for runs and the environment.
# shellcheck disable=SC2016
INSTALL='shopt -s dotglob nullglob; mkdir -p moejax && cd moejax && for f in ../moejax.new/*; do \
case ${f##*/} in runs | .venv) ;; *) rm -rf "${f##*/}" && mv "$f" . || exit 1 ;; esac; done && rm -rf ../moejax.new && \
for p in python3.13 python3.12 python3.11; do command -v $p && break; done && \
$p -m venv .venv && .venv/bin/pip install --constraint constraints.txt --editable ".[tpu]" || \
{ echo "moejax needs Python 3.11 to 3.13 with venv on $(hostname)" >&2; exit 1; }'
POLL=${TPU_POLL_SECONDS:-30}

wait_until_active() {
  local state=""
  while [[ $state != ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format "value(state.state)")
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "launch/tpu_vm.sh: $name is $state: delete it and ask again" >&2
        exit 1 ;;
      *)
        echo "launch/tpu_vm.sh: $name is ${state:-unknown}" >&2
        sleep "$POLL" ;;
    esac
  done
}

case $action in
  create)
    type=${1:-} slices=${2:-1}
    [[ -n $type && $# -le 2 ]] || usage
    [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "'$slices' is no number of slices"
    if [[ -z $runtime ]]; then
      case $type in
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) fail "which image has $type? --runtime VERSION" ;;
      esac
    fi
    nodes=(--node-id "$name")
    ((slices == 1)) || nodes=(--node-count "$slices" --node-prefix "$name")
    gcloud_ compute tpus queued-resources create "$name" "${where[@]}" "${nodes[@]}" \
      --accelerator-type "$type" --runtime-version "$runtime" "${spot[@]}"
    [[ -n $dry_run ]] || wait_until_active ;;
  install)
    [[ $# == 1 ]] || usage
    everywhere "rm -rf moejax.new" # or the copy would lie within it
    gcloud_ alpha compute tpus queued-resources scp --recurse "$1" "$name:moejax.new" "${where[@]}" \
      --node=all --worker=all
    everywhere "$INSTALL" ;;
  run)
    [[ $# -ge 1 ]] || usage
    printf -v quoted '%q ' "$@"
    # The number of the process that `stop` asks to stop; exec keeps it.
    settings="MOEJAX_COORDINATOR=auto MOEJAX_WATCHDOG=${MOEJAX_WATCHDOG-on}"
    everywhere "cd moejax && export PATH=\$PWD/.venv/bin:\$PATH $settings && \
echo \$\$ >~/$PID && exec ${quoted% }" ;;
  stop) everywhere "kill -TERM \"\$(cat ~/$PID)\"" ;;
  delete)
    gcloud_ compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
  *) usage ;;
esac
