# Sourced by the sbatch scripts.
# shellcheck shell=bash

if [[ -e .venv/bin/activate ]]; then source .venv/bin/activate; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# on_nodes SRUN_OPTION... COMMAND...: srun with sbatch's --cpus-per-task. Since Slurm 22.05 srun does not inherit it, and all
# ranks of a node would share one core.
on_nodes() { srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@"; }

# interface_to HOST: prints the network interface through which this node reaches another. By default Gloo listens on the
# address of the node's own name; many /etc/hosts map it to 127.0.0.1, where no other node can connect.
interface_to() {
    local address
    address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')
    [[ -z $address ]] || ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'
}

# run_steps COMMAND...: runs the training; requeues the job if a signal has stopped the training before its end.
run_steps() {
    export INTERRUPTED_FILE=$PWD/.interrupted-$SLURM_JOB_ID # run.py creates it
    rm -f "$INTERRUPTED_FILE"
    local status=0
    "$@" || status=$?
    if [[ -e $INTERRUPTED_FILE ]]; then
        rm -f "$INTERRUPTED_FILE"
        echo "interrupted: requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return $status
}
