#!/usr/bin/env bash
# A task of srun:    srun bash slurm/launch.sh TORCHRUN_OPTION... run.py ...
#
# SLURM signals this shell. It hands on what it gets to the ranks, which save and end by themselves; torchrun, which
# would end them after half a minute, ignores it.
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
    wait "$torchrun" || status=$? # a signal interrupts it
done
exit $status
