#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces with a cable between them. Trains over the cable, cuts it in the middle
# and restarts the job, which must continue from its last checkpoint and end with the weights of an undisturbed run.
#
#     make test-multinode          # needs root and ip (iproute2)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
source slurm/common.sh

[[ $(id -u) == 0 ]] || { echo "error: network namespaces need root" >&2; exit 2; }
command -v ip >/dev/null || { echo "error: ip (iproute2) is not installed" >&2; exit 2; }
place=$(mktemp -d)
first=coconut-a-$$ second=coconut-b-$$

clean_up() {
    stop_job
    ip netns del "$first" 2>/dev/null || true
    ip netns del "$second" 2>/dev/null || true
    rm -rf "$place"
}

stop_job() {
    for host in "$first" "$second"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    done
    wait 2>/dev/null || true
}
trap clean_up EXIT

ip netns add "$first"
ip netns add "$second"
ip -n "$first" link add cable type veth peer name cable netns "$second"
ip -n "$first" addr add 10.77.0.1/24 dev cable
ip -n "$second" addr add 10.77.0.2/24 dev cable
for host in "$first" "$second"; do
    ip -n "$host" link set lo up
    ip -n "$host" link set cable up
done

"$PYTHON" - "$place" <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
import torture

torture.prepare(Path(sys.argv[1]))
PY

# host NUMBER NAME OUTPUT: a host's torchrun of the job NAME
host() {
    local space=$first leads=true # is_host must be given: a host does not recognise 10.77.0.1 as its own address
    if [[ $1 == 2 ]]; then space=$second leads=false; fi
    # as in slurm/launch.sh: this machine's name resolves to 127.0.0.1, or not at all, on both hosts
    local interface
    interface=$(export -f interface_to && ip netns exec "$space" bash -c "interface_to 10.77.0.$((3 - $1))")
    [[ $interface == cable ]] || { echo "error: host $1 has chosen '$interface'" >&2; exit 1; }
    GLOO_SOCKET_IFNAME=$interface \
    ip netns exec "$space" "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 \
        --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29400 --rdzv_id "$2" --local_addr "10.77.0.$1" --rdzv_conf is_host=$leads \
        run.py "$place/job.yaml" "name=$2" >"$3" 2>&1
}

# both NAME TAG: starts the job on both hosts and waits for its end
both() {
    host 1 "$1" "$place/$2-1.txt" &
    local one=$! status=0
    host 2 "$1" "$place/$2-2.txt" || status=$?
    wait $one || status=$?
    [[ $status == 0 ]] || { cat "$place/$2-1.txt"; echo "error: the job $2 ended with $status" >&2; exit 1; }
}

final() { sha256sum "$place/runs/$1/checkpoint_3/model.safetensors" | cut -c 1-64; }

echo "an undisturbed run on two hosts"
both undisturbed undisturbed
grep -q "on 2 x cpu (ddp)" "$place/undisturbed-1.txt"
! grep -q "epoch" "$place/undisturbed-2.txt" || { echo "error: rank 1 prints too" >&2; exit 1; }

echo "a run whose cable is cut after its first checkpoint within epoch 1"
host 1 cut "$place/cut-1.txt" &
one=$!
host 2 cut "$place/cut-2.txt" &
two=$!
until compgen -G "$place/runs/cut/checkpoint_1_step_*" >/dev/null; do
    kill -0 $one 2>/dev/null || { cat "$place/cut-1.txt"; echo "error: it ended before" >&2; exit 1; }
    sleep 0.02
done
ip -n "$first" link set cable down
begin=$SECONDS
while kill -0 $one 2>/dev/null && kill -0 $two 2>/dev/null && ((SECONDS - begin < 60)); do sleep 1; done
if kill -0 $one 2>/dev/null && kill -0 $two 2>/dev/null; then
    echo "both hosts still wait for each other after $((SECONDS - begin)) s; the cluster would kill them now"
else
    echo "a host gave up after $((SECONDS - begin)) s"
fi
stop_job
[[ ! -e $place/runs/cut/checkpoint_3 ]] || { echo "error: the run ended before the cut" >&2; exit 1; }

echo "the cable is mended, the job is started again"
ip -n "$first" link set cable up
both cut again
grep "continuing from" "$place/again-1.txt" || { echo "error: it began from scratch" >&2; exit 1; }
[[ $(final cut) == "$(final undisturbed)" ]] || { echo "error: other weights than undisturbed" >&2; exit 1; }
echo "the same weights as undisturbed: $(final cut | cut -c 1-12)"
