"""Jobs that hung instead of ending: exceptions on one rank, slow ranks, other files on one rank, folders not shared."""

import contextlib
import fcntl
import json
import re
import subprocess

import forked
import pytest
import tiny_model
import yaml
from conftest import ROOT, command, complaint_of, last_of_each, python, refuses
from test_faults import processes_of

from trainer import distributed as ranks
from trainer.distributed import World
from trainer.files import retried

SHORT = ("max_train_examples=96", "max_new_tokens=2", "num_epochs=1", "log_every_steps=1")
AS_RUN = """
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BRIEF_COLLECTIVES = """
import os, runpy, sys, time
from datetime import timedelta
import torch.distributed as dist

original = dist.init_process_group

def init(*arguments, **options):
    original(*arguments, **options)
    dist.barrier()  # the ranks may start at different times
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4))

dist.init_process_group = init
"""
FAILING = """
import runpy, sys
from coconut import Coconut

original, calls = Coconut._loss, []

def failing(self, *arguments):
    calls.append(1)
    if len(calls) == 8:
        raise RuntimeError("device-side assert")
    return original(self, *arguments)

Coconut._loss = failing
"""


@pytest.fixture
def job(tmp_path):
    """Runs a program with this repository on its path."""

    def job(text: str, *arguments, environment: dict | None = None, **options) -> subprocess.CompletedProcess:
        (tmp_path / "job.py").write_text(text)
        environment = {"PYTHONPATH": str(ROOT), **(environment or {})}
        return python(tmp_path / "job.py", *arguments, environment=environment, **options)

    return job


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [0, 2])
def test_any_exception_ends_the_job_at_once(place, job, n_ranks):
    """The rank waited for ever for a process that made its batches, and held GPU and lock."""
    name = f"failing-{n_ranks}"
    overrides = (*SHORT, f"name={name}")
    done = job(FAILING + AS_RUN, ROOT / "run.py", place / "run.yaml", *overrides, ranks=n_ranks, code=1)
    assert "RuntimeError: device-side assert" in done.stderr
    if n_ranks:  # @record has seen it: torchrun's report has more than "to enable traceback see"
        assert re.search('"message": "RuntimeError: device-side assert|traceback : Traceback', done.stderr)
    with (place / "runs" / name / ".lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody holds it
    assert not processes_of(place, name)


def test_a_hanging_exit_handler_does_not_keep_a_rank(job):
    """A tracker's, for example."""
    text = "import atexit, time\nfrom trainer import distributed as ranks\nranks.EXIT_HANDLERS_SECONDS = 1\n"
    job(text + "atexit.register(time.sleep, 1000)\nranks.run_main(lambda: 7)\n", code=7)


def test_a_message_of_sys_exit_is_printed(job):
    """It was lost in a TypeError of os._exit."""
    text = "import sys\nfrom trainer import distributed as ranks\nranks.run_main(lambda: sys.exit('no API key'))\n"
    assert job(text, code=1).stderr == "no API key\n"


ONE_RANK = """
import os, runpy, signal, sys
from coconut import Coconut

def failing(*_, **__):
    if os.environ["HOW"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyError("no")

if os.environ["RANK"] == "1":
    Coconut.generate = failing
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "dies"])
def test_a_rank_that_fails_in_validation_ends_the_others(place, job, how):
    """The others waited on, for half a minute, until torchrun killed them."""
    name = f"waited-for-{how}"
    arguments = (ROOT / "run.py", place / "run.yaml", *SHORT, f"name={name}", "batch_size_training=8")
    done = job(ONE_RANK + AS_RUN, *arguments, ranks=2, code=1, environment={"HOW": how})
    assert "rank 0 exits because another rank has failed" in done.stderr  # it was not killed
    cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in cause
    assert ("Signal 9 (SIGKILL) received" in cause) == (how == "dies")
    assert not processes_of(place, name)


def test_a_run_goes_on_when_its_output_cannot_be_written(place):
    """The progress bar's exception ended the training where the log was on the full disk."""
    words = command(ROOT / "run.py", place / "run.yaml", *SHORT, "name=no-log")
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, stdout=full, stderr=full, timeout=300).returncode == 0
    assert (place / "runs" / "no-log" / "checkpoint_1").is_dir()


SLOW_RANK = """
from trainer import checkpoint, evaluate

def slow(module, name):
    do, calls = getattr(module, name), []

    def slowly(*arguments):
        if not calls:
            time.sleep(6)
        calls.append(1)
        return do(*arguments)

    setattr(module, name, slowly)

if os.environ["RANK"] == "1":
    slow(evaluate, "collate_for_device")  # of the validation loss
    slow(checkpoint, "load_random_state")
else:
    slow(evaluate, "warn_unscorable_answers")
"""


@pytest.mark.slow
def test_ranks_wait_for_a_slower_rank_longer_than_the_timeout_of_collectives(place, job):
    """In the validation loss, at the end of a restart, and while rank 0 checks the answers."""
    arguments = (ROOT / "run.py", place / "run.yaml", "name=slow-rank", "batch_size_training=8")
    for n_epochs in (1, 2):
        keys = last_of_each(*SHORT, f"num_epochs={n_epochs}")
        job(BRIEF_COLLECTIVES + SLOW_RANK + AS_RUN, *arguments, *keys, ranks=2)


OTHER_FILES = """
import os, runpy, sys

folder, *overrides = sys.argv[2:]
sys.argv[1:] = [sys.argv[1]]
if os.environ["RANK"] == "1":
    os.chdir(folder)
    sys.argv += overrides
sys.argv[0] = {run!r}
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OTHER_KEYS = ["lr=0.002", "log_every_steps=7", "strategy=fsdp", "method=cot"]
DIFFERING = {
    "configuration": [
        *("lr is 0.001 on rank 0 but 0.002 on rank 1", "log_every_steps is 10 on rank 0 but 7 on rank 1"),
        *("strategy is 'auto' on rank 0", "method is 'coconut' on rank 0 but 'cot'"),
    ],
    "files": [
        *("SHA-256 of val_path", "SHA-256 of train_path", "SHA-256 of the vocabulary", "norm of the weights"),
        *("SHA-256 of the model's config.json", "SHA-256 of reward"),
    ],
}


@pytest.mark.parametrize("differing", DIFFERING)
def test_ranks_that_read_different_files_are_an_error_that_names_them(place, tmp_path, differing):
    """They trained on, each with its own learning rate or weights, or hung."""
    for number, (folder, pieces) in enumerate((("one", "char"), ("two", "word"))):
        (tmp_path / folder).mkdir()
        for name in ("train", "valid"):
            examples = json.loads((place / f"{name}.json").read_text())[number:][:16]
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(examples))
        (tmp_path / folder / "reward.py").write_text(f"def reward(question, gold, outputs): return [{number}] * 8")
        files = [tmp_path / folder / "train.json"]
        tiny_model.write_model(files, tmp_path / folder / "model", pieces, "gpt2", 32, 1, 2, 128)
    paths = {"train_path": "train.json", "val_path": "valid.json", "model_id": "./model", "wandb": "disabled"}
    keys = yaml.safe_load((place / "run.yaml").read_text()) | paths | {"name": tmp_path.name, "num_epochs": 1}
    keys |= (
        {"method": "grpo", "coconut": False, "reward": "reward.py", "uniform_prob": 0} if differing == "files" else {}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    script = tmp_path / "job.py"
    script.write_text(OTHER_FILES.format(run=str(ROOT / "run.py")))
    overrides = OTHER_KEYS if differing == "configuration" else []
    with contextlib.chdir(tmp_path / "one"):
        done = forked.run(2, script, tmp_path / "run.yaml", tmp_path / "two", *overrides)
    assert done.returncode == 2, done.stderr[-3000:]
    line = complaint_of(done)
    assert line.startswith("error: the ranks must all read the same files: ")
    assert all(text in line for text in DIFFERING[differing]), line


def test_a_folder_that_is_not_shared_is_an_error(tmp_path, monkeypatch):
    """A FileNotFoundError, or a whole epoch and then "cannot be written"."""
    written: list = []
    monkeypatch.setattr(ranks, "retried", lambda action: action())  # without waiting
    monkeypatch.setattr(ranks, "agree", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ranks, "on_main_rank", lambda _, action: written.append(action()) or written[-1])
    rank_0, rank_1 = World(0, 0, 2, None), World(1, 1, 2, None)
    ranks.check_shared(rank_0, tmp_path / "shared")
    assert written
    assert not any((tmp_path / "shared").iterdir())  # the file is removed
    monkeypatch.setattr(ranks, "on_main_rank", lambda *_: ".seen-by-all")
    sentence = r"save_path is not shared: rank 1 on .* does not see what rank 0 has written in .* \({}\)"
    refuses(sentence.format("No such file or directory"), ranks.check_shared, rank_1, tmp_path / "shared")
    (tmp_path / "file").touch()  # what rank 1 has there
    refuses(sentence.format("Not a directory"), ranks.check_shared, rank_1, tmp_path / "file" / "shared")


def test_a_file_of_another_node_is_retried(tmp_path):
    """Network file systems show a new folder seconds later."""
    answers = [FileNotFoundError, FileNotFoundError, None]

    def look() -> str:
        if (error := answers.pop(0)) is not None:
            raise error
        return "there"

    assert retried(look) == "there"
    with pytest.raises(FileNotFoundError):
        retried((tmp_path / "never").stat, seconds=0.2)
