# Sourced by the sbatch scripts.
# shellcheck shell=bash

if [[ -e .venv/bin/activate ]]; then source .venv/bin/activate; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# on_nodes SRUN_OPTION... COMMAND...: srun, with the CPUs that sbatch gave each task. Since Slurm 22.05 srun does not take
# them over from sbatch by itself: all ranks of a node would share one core.
on_nodes() { srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@"; }

# interface_to HOST: the network interface by which this node reaches another. Gloo listens where the node's own name
# leads to: where that is 127.0.0.1, as in many /etc/hosts, no other node can connect.
interface_to() {
    local address
    address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')
    [[ -z $address ]] || ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'
}

# run_steps COMMAND...: runs a training step; requeues the job where a signal has stopped the training before its end.
run_steps() {
    export INTERRUPTED_FILE=$PWD/.interrupted-$SLURM_JOB_ID # run.py creates it
    rm -f "$INTERRUPTED_FILE"
    local status=0
    "$@" || status=$?
    if [[ -e $INTERRUPTED_FILE ]]; then
        rm -f "$INTERRUPTED_FILE"
        echo "interrupted: job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return $status
}
