"""The scripts of slurm/, with a stand-in for srun that sets what SLURM sets."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, last_of_each, read_json, steps
from test_faults import LONG, SLOW_VALIDATION, ended, processes_of, wait_for

SRUN = """#!/usr/bin/env bash
cpus=none
while [[ $1 == --* ]]; do
    if [[ $1 == --cpus-per-task=* ]]; then cpus=${1#*=}; fi
    shift
done
# since Slurm 22.05 a task gets one core unless srun has this option
[[ $cpus == "${SLURM_CPUS_PER_TASK:-none}" ]] || { echo "srun: $cpus CPUs for a task" >&2; exit 1; }
status=0 tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


# on PYTHONPATH: run.py imports `dataset` after it has begun to handle signals
SLOW_IMPORT = """
import sys, time

class SlowImport:
    @staticmethod
    def find_spec(name, *_):
        if name == "dataset":
            time.sleep(5)

sys.meta_path.insert(0, SlowImport)
"""


def free_job() -> str:
    """Returns a job id whose port (train_multinode.sbatch computes it) is free. All such ports are below 32768, the
    first that the kernel assigns to other programs."""
    while True:
        number = secrets.randbelow(12_768)
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", 20_000 + number))
            except OSError:
                continue
        return str(number)


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """A job's environment, with stand-ins for srun and scontrol on PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # torchrun of this interpreter, whether or not there is a .venv
    (tmp_path / "torchrun").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    slurm = {"SLURM_JOB_ID": free_job(), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    slurm |= {"SLURM_CPUS_PER_TASK": "3", "CUDA_VISIBLE_DEVICES": ""}  # the ranks use the CPU
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm |= {"SLURM_JOB_NODELIST": "localhost", "REQUEUED": str(tmp_path / "requeued")}
    return {**os.environ, **slurm, "PATH": path, "OMP_NUM_THREADS": "1"}


def submit(script: str, cluster: dict[str, str], *arguments) -> subprocess.Popen:
    """Runs a script as sbatch would."""
    words = ["bash", str(ROOT / "slurm" / script), *last_of_each(*arguments)]
    return subprocess.Popen(words, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def commands_below(pid: int) -> dict[int, bytes]:
    """Returns the descendants of a process, parents first: process id -> command line."""
    below, words = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended since it was listed
            words[int(folder.name)] = (folder / "cmdline").read_bytes()
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            below.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for parent in found:
        found += below.get(parent, [])
    return {pid: words[pid] for pid in found[1:]}


def task_of(job: subprocess.Popen) -> int:
    """Returns the process that srun starts, which SLURM signals."""
    return next(pid for pid, words in commands_below(job.pid).items() if words.startswith(b"bash\0slurm/launch.sh"))


@pytest.mark.parametrize("script", ["train.sbatch", "train_multinode.sbatch", "eval.sbatch"])
def test_tasks_get_the_cpus_that_sbatch_was_given(cluster, tmp_path, script):
    """Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch: every task had one core."""
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\necho "$@"\n')
    assert "--cpus-per-task=3 " in ended(submit(script, cluster, "a.yaml"))
    del cluster["SLURM_CPUS_PER_TASK"]  # sbatch was given --cpus-per-gpu, or nothing
    printed = ended(submit(script, cluster, "a.yaml"))
    assert "a.yaml" in printed
    assert "cpus-per-task" not in printed


@pytest.mark.slow
def test_one_rank_prints_what_is_wrong(place, cluster):
    """All ranks did: launch.sh starts torchrun with SIGTERM ignored, and the ranks inherited that."""
    printed = submit("train.sbatch", cluster, place / "run.yaml", "lrr=3").communicate(timeout=600)[0]
    assert printed.count("unknown key 'lrr'") == 1, printed


@pytest.mark.slow
def test_a_signal_during_the_slow_imports_takes_effect(place, cluster, tmp_path):
    """It was ignored: the job trained until its time limit and was not requeued."""
    run = place / "runs" / "sbatch-early"
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    slow = {**cluster, "PYTHONPATH": str(tmp_path)}
    job = submit("train.sbatch", slow, place / "run.yaml", *LONG, "name=sbatch-early")

    def ranks_handle_signals() -> bool:
        words = commands_below(job.pid)
        # torchrun starts `python -u run.py ...`
        ranks = [pid for pid, command in words.items() if command.split(b"\0")[1:3] == [b"-u", b"run.py"]]
        try:
            status = [Path(f"/proc/{pid}/status").read_text() for pid in ranks]
        except OSError:  # a process has ended
            return False
        caught = [int(re.search(r"SigCgt:\s*(\w+)", text)[1], 16) for text in status]
        return len(caught) == 2 and all(mask >> signal.SIGUSR1 - 1 & 1 for mask in caught)

    wait_for(ranks_handle_signals)
    assert not run.exists()  # the ranks are still importing
    os.kill(task_of(job), signal.SIGUSR1)
    assert "stopped by a signal" in ended(job)
    assert Path(cluster["REQUEUED"]).read_text() == f"{cluster['SLURM_JOB_ID']}\n"
    assert len(steps(run)) < 9


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_near_its_time_limit_is_requeued_and_continues(place, cluster, number):
    name, job_id = f"sbatch-{number.name}", cluster["SLURM_JOB_ID"]
    run, arguments = place / "runs" / name, (place / "run.yaml", *LONG, f"name={name}")
    job = submit("train.sbatch", cluster, *arguments, *SLOW_VALIDATION)
    wait_for(lambda: len(steps(run)) >= 5)
    # SLURM signals the task, with some plugins also its descendants; torchrun must survive that
    torchrun = [pid for pid, words in commands_below(job.pid).items() if b"torch.distributed.run" in words]
    for pid in [task_of(job)] if number == signal.SIGUSR1 else [task_of(job), *torchrun]:
        os.kill(pid, number)
    ended(job)
    assert Path(cluster["REQUEUED"]).read_text() == f"{job_id}\n"
    assert not list(ROOT.glob(f".interrupted-{job_id}*"))
    n_steps = len(steps(run))
    assert n_steps < 27
    printed = submit("train.sbatch", cluster, *arguments).communicate(timeout=600)[0]
    # within an epoch, unless validation had begun
    assert f"_step_{n_steps}, after" in printed or f"checkpoint_{n_steps // 9}, after" in printed
    assert len(steps(run)) == 27
    assert Path(cluster["REQUEUED"]).read_text() == f"{job_id}\n"  # once only


@pytest.mark.slow
def test_several_nodes_train_and_the_result_is_evaluated(place, cluster):
    two = {**cluster, "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    job = submit("train_multinode.sbatch", two, place / "run.yaml", *LONG, "name=nodes", "num_epochs=1")
    printed = ended(job)
    assert "on 2 x cpu" in printed
    assert printed.count("validation, stage 0") == 1  # printed by one rank
    run = place / "runs" / "nodes"
    ended(submit("eval.sbatch", cluster, place / "run.yaml", f"load_model_path={run}", "name=nodes-eval"))
    found = read_json(place / "runs" / "nodes-eval" / "eval" / "metrics.json")
    assert found["accuracy"] == read_json(run / "checkpoint_1" / "metrics.json")["accuracy"]
    assert not processes_of(place, "nodes")
