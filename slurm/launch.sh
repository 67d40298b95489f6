#!/usr/bin/env bash
# A task of srun:    srun bash slurm/launch.sh TORCHRUN_OPTION... run.py ...
#
# SLURM signals this shell, which forwards the signal to the ranks; they save and exit. torchrun ignores it, because it
# would kill the ranks after half a minute.
set -euo pipefail
source "$(dirname "$0")/common.sh"

if [[ ${SLURM_NNODES:-1} -gt 1 && -z ${GLOO_SOCKET_IFNAME:-} ]] && command -v ip >/dev/null; then
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    other=${nodes[0]}
    if [[ ${SLURM_NODEID:-0} == 0 ]]; then other=${nodes[-1]}; fi
    interface=$(interface_to "$other") || true
    if [[ -n $interface ]]; then export GLOO_SOCKET_IFNAME=$interface; fi
fi

(
    trap "" USR1 TERM
    leads=false
    if [[ ${SLURM_NODEID:-0} == 0 ]]; then leads=true; fi
    exec torchrun --signals-to-handle SIGINT,SIGHUP,SIGQUIT --rdzv_conf "is_host=$leads" "$@"
) &
torchrun=$!
trap 'pkill -USR1 -P "$torchrun" || true' USR1 TERM
status=0
while kill -0 "$torchrun" 2>/dev/null; do
    status=0
    wait "$torchrun" || status=$? # a signal interrupts wait
done
exit $status
