"""Faults of clusters: signals, kills, full and broken disks, other world sizes, NaN, two jobs on one folder."""

import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import forked
import numpy as np
import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT, command, digest, epochs, main, raising, refuses, start, steps, together, weights
from safetensors.torch import save_file
from transformers import AutoTokenizer

import run as run_module
from config import Config
from preprocessing.tokens import Tokens
from trainer import checkpoint, distributed
from trainer.checkpoint import checkpoints, save_random_state
from trainer.distributed import StopSignal, World
from trainer.logger import read_log
from trainer.setup import Step
from trainer.step_log import report_nonfinite

SLOW_VALIDATION = ("max_new_tokens=100", "eval_batch_size=1")  # takes seconds, so that a signal comes before the end
LONG = ("num_epochs=3", "max_train_examples=144", "max_new_tokens=4", "global_batch_size=16", "log_every_steps=1")
BRIEF = ("num_epochs=1", "max_train_examples=32", "max_new_tokens=2")


def begin(place: Path, *arguments: str, ranks: int = 0) -> subprocess.Popen:
    """Starts run.py as a cluster does: its launcher ignores SIGUSR1, which all processes of a job get."""
    words = command(ROOT / "run.py", place / "run.yaml", *conftest.last_of_each(*arguments), ranks=ranks)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "-", *words]
    return subprocess.Popen(ignoring, text=True, start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> str:
    """Waits for a job, which must succeed; returns its output."""
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    return printed


def processes_of(place: Path, name: str) -> list[int]:
    """The process ids of a run's ranks, rank 0 first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        # the name alone may be that of a run of another pytest process
        ours = {f"name={name}".encode(), bytes(place / "run.yaml")} <= set(command)
        if ours and b"torch.distributed.run" not in command:
            rank = next((int(e[5:]) for e in environment if e.startswith(b"RANK=")), 0)
            found.append((rank, int(folder.name)))
    return [pid for _, pid in sorted(found)]


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)


# --- Signals ---


@pytest.fixture
def handlers():
    """Restores the signal handlers that a test sets."""
    before = {number: signal.getsignal(number) for number in StopSignal.numbers()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_only_sigxcpu_may_come_again(monkeypatch):
    """Bug: the kernel repeats SIGXCPU every second of CPU time, which ended the run before it had saved."""
    ends = []
    monkeypatch.setattr("os._exit", ends.append)
    stop = StopSignal()
    stop._receive(signal.SIGXCPU, None)
    stop.received -= 2
    stop._receive(signal.SIGXCPU, None)
    assert ends == []
    stop._receive(signal.SIGUSR2, None)
    assert ends == [128 + signal.SIGUSR2]


@pytest.mark.slow
def test_a_signal_saves_and_the_next_job_continues_inside_the_epoch(place, tmp_path, monkeypatch):
    """SIGTERM here; SIGUSR1 in test_slurm.py."""
    name, run = "signal", place / "runs" / "signal"
    arguments = (*LONG, f"model_id={conftest.with_dropout(place)}", f"name={name}")
    together(place / "run.yaml", *arguments, "name=undisturbed")
    monkeypatch.setenv("INTERRUPTED_FILE", str(tmp_path / "interrupted"))
    process = begin(place, *arguments, *SLOW_VALIDATION, ranks=2)
    wait_for(lambda: len(steps(run)) >= 12)
    victims = processes_of(place, name)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGTERM)  # rank 0 stops too
    assert "stopped by a signal" in ended(process)
    assert (tmp_path / "interrupted").exists()
    saved, n_steps = checkpoints(run)[-1], len(steps(run))
    assert 12 <= n_steps < 27
    # within an epoch, unless validation had begun
    assert saved.name in (f"checkpoint_{(n_steps - 1) // 9}_step_{n_steps}", f"checkpoint_{n_steps // 9}")
    assert f"continuing from {saved}" in together(place / "run.yaml", *arguments).stderr
    assert conftest.equal(weights(run / "checkpoint_3"), weights(place / "runs" / "undisturbed" / "checkpoint_3"))
    assert not list(run.glob("checkpoint_*_step_*"))  # removed at the end of the run


def test_a_checkpoint_of_a_signal_has_the_stage_of_its_step(place, monkeypatch):
    """Bug: that of the epoch's last step. iCoT's stages change within an epoch."""
    train_step, stages = run_module.train_step, []
    monkeypatch.setattr(run_module, "train_step", lambda *a: stages.append(len(stages)) or train_step(*a))
    monkeypatch.setattr(StopSignal, "requested", lambda *_, **__: len(stages) == 3)
    keys = ("method=icot", "icot_tokens_per_epoch=4", "icot_smoothing=0", "uniform_prob=0", "max_train_examples=32")
    run = main(place, *keys, "name=icot-signal", "max_new_tokens=2")
    assert conftest.read_json(run / "checkpoint_0_step_3" / "coconut.json")["stage"] == stages[-1]


def test_a_signal_during_validation_ends_the_run_after_it(place, monkeypatch):
    """And not after another step."""
    original, keys = run_module.validate, (*LONG, "name=validating")

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "validate", interrupted)
        run = main(place, *keys)
    assert (len(steps(run)), len(epochs(run))) == (9, 1)
    main(place, *keys)
    assert (len(steps(run)), len(epochs(run))) == (27, 3)


@pytest.mark.usefixtures("handlers")
def test_a_signal_before_the_first_step_trains_nothing(place, tmp_path, monkeypatch, capsys):
    """The first Ctrl-C while data were tokenized did nothing for minutes, then trained and saved a step. SLURM's signal
    waits for the end of the set-up (StopSignal.early) and requeues the job."""
    original = run_module.setup_run

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setenv("INTERRUPTED_FILE", str(tmp_path / "interrupted"))
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "setup_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(place, *BRIEF, "name=tokenizing")
        config = Config.from_file(place / "run.yaml", [*BRIEF, "name=early-signal"])
        with StopSignal() as stop:
            assert run_module.main(config, stop) == 0
    assert "stopped by a signal; start the same command again to begin" in capsys.readouterr().err
    assert (tmp_path / "interrupted").exists()
    for name in ("tokenizing", "early-signal"):
        assert not steps(place / "runs" / name)
        assert not checkpoints(place / "runs" / name)
        assert len(epochs(main(place, *BRIEF, f"name={name}"))) == 1


def test_a_run_that_dies_in_validation_validates_again(place, here, monkeypatch):
    """Without save_every_steps the whole epoch was lost."""
    arguments = (*LONG, "name=again", "num_epochs=1")
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "validate", raising(RuntimeError("dead")))
        with pytest.raises(RuntimeError, match="dead"):
            main(place, *arguments)
    done, run = here(place / "run.yaml", *arguments), place / "runs" / "again"
    assert "checkpoint_0_step_9, after 0 of 1 epochs and 144 examples" in done.stderr
    assert len(steps(run)) == 9
    assert [path.name for path in run.glob("checkpoint_*")] == ["checkpoint_1"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_stop_a_run_unless_the_user_ignores_them(number):
    """A closed terminal and the first Ctrl-C lost the epoch. nohup and background jobs ignore theirs."""
    for handler, stops in ((signal.SIG_IGN, number == signal.SIGTERM), (signal.default_int_handler, True)):
        signal.signal(number, handler)
        with StopSignal(World(0, 0, 1, None)) as stop:
            signal.raise_signal(number)
            assert stop.requested() == stops
        assert signal.getsignal(number) == handler


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_run_is_saved_inside_its_epoch(place, monkeypatch, number):
    """train_loss was the sum of the means of steps of several sizes, divided by the number of the last ones."""
    signal.signal(number, signal.default_int_handler)  # pytest may have been started with it ignored, as by nohup
    original, name = run_module.train_step, f"interrupted-{number.name}"

    def interrupted(run, *others):
        if run.progress.step == 4:
            os.kill(os.getpid(), number)
        return original(run, *others)

    monkeypatch.setattr(run_module, "train_step", interrupted)
    keys = (f"name={name}", "max_train_examples=100", "num_epochs=1", "max_new_tokens=2", "log_every_steps=1")
    run = main(place, *keys)
    assert [path.name for path in checkpoints(run)] == ["checkpoint_0_step_5"]
    monkeypatch.setattr(run_module, "train_step", original)
    main(place, *keys, "gradient_accumulation_steps=3", "continue_changed=true")  # as on three ranks
    losses = [record["loss"] for record in steps(run)]
    assert len(losses) == 8
    sizes = [*(5 * [8]), 24, 24, 12]
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / 100
    assert epochs(run)[0]["train_loss"] == pytest.approx(mean)


@pytest.mark.parametrize("debugger", [[], ["-m", "pdb", "-c", "continue"]], ids=["plain", "pdb"])
def test_a_debugger_gets_the_exception(tmp_path, debugger):
    """The process exited without a post mortem."""
    (tmp_path / "program.py").write_text("from trainer import distributed\ndistributed.run_main(lambda: 1 / 0)\n")
    path = {"PYTHONPATH": str(ROOT)}
    code = 0 if debugger else 1
    done = conftest.python(*debugger, tmp_path / "program.py", environment=path, code=code, input="q\n")
    assert "ZeroDivisionError" in done.stdout + done.stderr
    assert ("Entering post mortem debugging" in done.stdout) == bool(debugger), done.stdout


def test_a_second_signal_exits_at_once(monkeypatch):
    """Unless it comes within a second of the first: launchers forward signals that all processes have received."""
    exits, clock = [], [10.0]
    monkeypatch.setattr(distributed, "os", SimpleNamespace(_exit=exits.append))
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with StopSignal(World(0, 0, 1, None)) as stop:
        for moment, wanted in ((10.0, []), (10.9, []), (11.1, [128 + signal.SIGTERM])):
            clock[0] = moment
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested()
            assert exits == wanted


# --- Other numbers of ranks ---

STOP_AFTER_FIVE_STEPS = """
import os, runpy, sys

sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from trainer.distributed import StopSignal

calls = []
StopSignal.requested = lambda *_, **__: calls.append(1) or len(calls) > 5  # the first call is before the first step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_a_run_continues_on_another_number_of_ranks(place, here, tmp_path, before, after):
    """No example is repeated or left out, and the optimizer is re-sharded: only the order of additions differs."""
    name, run = f"ranks-{before}-{after}", place / "runs" / f"ranks-{before}-{after}"
    arguments = (*LONG, "batch_size_training=4", f"name={name}", "num_epochs=1")
    whole = place / "runs" / "ranks-whole"
    if not whole.exists():
        main(place, *arguments, "name=ranks-whole")
    (tmp_path / "job.py").write_text(STOP_AFTER_FIVE_STEPS)
    done = forked.run(
        before, tmp_path / "job.py", ROOT / "run.py", place / "run.yaml", *conftest.last_of_each(*arguments)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [path.name for path in checkpoints(run)] == ["checkpoint_0_step_5"]
    strategy = "strategy=fsdp" if after == 2 else "strategy=ddp"
    done = (together if after == 2 else here)(place / "run.yaml", *arguments, strategy)
    assert "continuing from" in done.stderr
    found, begun = weights(run / "checkpoint_1"), weights(place / "model")
    assert conftest.distance(found, weights(whole / "checkpoint_1")) < 1e-5
    assert conftest.distance(found, {n: value for n, value in begun.items() if value.shape == found[n].shape}) > 1e-3


PROBE = """
import atexit, os, runpy, sys

class Probe:
    def __del__(self):
        os.write(1, b"finalizing\\n")

PROBE = Probe()
atexit.register(print, "an exit handler runs")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "code"), [(("strategy=fsdp",), 0), (("model_id=nowhere", "name=nowhere"), 2)])
def test_a_rank_ends_without_finalizing_the_interpreter(place, tmp_path, changes, code):
    """A thread of gloo that runs during finalization can kill a rank that has finished its work."""
    (tmp_path / "probe.py").write_text(PROBE)
    keys = conftest.last_of_each("name=ending", *BRIEF, *changes)
    environment = {"PYTHONPATH": str(ROOT)}
    done = conftest.python(
        tmp_path / "probe.py", ROOT / "run.py", place / "run.yaml", *keys, code=code, environment=environment
    )
    assert done.stdout.endswith("an exit handler runs\n"), done.stdout
    assert "finalizing" not in done.stdout


# --- Disks ---

FEW = ("name=run", "max_train_examples=16", "max_new_tokens=2")


@pytest.fixture(scope="module")
def two_epochs_of_all(place, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_epochs")
    main(place, *FEW, f"save_path={folder}", "num_epochs=2")
    return folder


@pytest.fixture
def two_epochs(two_epochs_of_all, tmp_path) -> tuple[Path, tuple]:
    """A run with checkpoints after epochs 1 and 2 of 3."""
    shutil.copytree(two_epochs_of_all, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run", (f"save_path={tmp_path}", *FEW)


DAMAGES = {
    "a bit flipped": lambda folder: conftest.flip(folder / "model.safetensors"),
    "half a file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "a file missing": lambda folder: (folder / "trainer" / "random_0.pt").unlink(),
    "its description missing": lambda folder: (folder / "coconut.json").unlink(),
    "the digests broken": lambda folder: os.truncate(folder / "trainer" / "manifest.json", 10),
    "the state missing": lambda folder: (folder / "trainer" / "state.json").unlink(),
    "an empty state": lambda folder: os.truncate(folder / "trainer" / "state.json", 0),
    "the optimizer broken": lambda folder: conftest.flip(next((folder / "trainer" / "optimizer").glob("*.distcp"))),
}


def test_a_damaged_checkpoint_is_skipped(place, two_epochs, here, capsys):
    run, arguments = two_epochs
    keep = shutil.copytree(run, run.parent / "kept")
    for damage, act in DAMAGES.items():
        shutil.rmtree(run)
        shutil.copytree(keep, run)
        act(run / "checkpoint_2")
        capsys.readouterr()
        assert checkpoint.newest_whole(run) == run / "checkpoint_1", damage
        (found,) = capsys.readouterr().err.splitlines()
        assert re.search("warning: .*checkpoint_2 is damaged .*skipped", found), damage
    done = here(place / "run.yaml", *arguments)  # run.py with the last damage
    assert re.search(r"warning: .*continuing from .*checkpoint_1, after 1 of 3", done.stderr, re.DOTALL)
    assert len(list(run.glob("checkpoint_2.replaced-*"))) == 1


def test_checkpoints_after_a_damaged_one_are_kept(place, two_epochs, here, monkeypatch):
    """Bug: the damaged checkpoint counted as the newest. Each step checkpoint was removed as soon as it was saved, and
    with keep_checkpoints=1 the last whole checkpoint too."""
    run, arguments = two_epochs
    conftest.flip(run / "checkpoint_2" / "model.safetensors")
    train_step, count = run_module.train_step, []
    monkeypatch.setattr(run_module, "train_step", lambda *a: count.append(1) or train_step(*a))
    monkeypatch.setattr(StopSignal, "requested", lambda *_, **__: len(count) == 2)
    here(place / "run.yaml", *arguments, "save_every_steps=1", "keep_checkpoints=1")
    found = [path.name for path in checkpoints(run)]
    assert found[0] == "checkpoint_1"
    assert found[-2].startswith("checkpoint_1_step_")
    assert checkpoint.newest_whole(run).name == found[-2]


@pytest.mark.parametrize("file", ["metrics.json", "coconut.json"])
def test_a_damaged_old_checkpoint_does_not_prevent_pruning(place, two_epochs, here, file):
    """With keep_checkpoints every save ended in a traceback."""
    run, arguments = two_epochs
    os.truncate(run / "checkpoint_1" / file, 3)
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    here(place / "run.yaml", *arguments, "num_epochs=3", "keep_checkpoints=1")
    assert (run / "checkpoint_1").is_dir()  # kept: its owner may want to restore it
    assert (run / "checkpoint_3").is_dir()


def test_a_run_with_only_damaged_checkpoints_does_not_train_from_scratch(place, two_epochs, here):
    run, arguments = two_epochs
    shutil.rmtree(run / "checkpoint_1")
    conftest.flip(run / "checkpoint_2" / "model.safetensors")
    before = digest(run)
    assert f"all checkpoints in {run} are damaged" in here(place / "run.yaml", *arguments, code=2).stderr
    evaluation = (*arguments, "name=eval", "only_eval=true", f"load_model_path={run}")
    done = here(place / "run.yaml", *evaluation, code=2)
    assert "is damaged: model.safetensors differs from what was written" in done.stderr
    assert digest(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint(place, two_epochs, ranks):
    run, arguments = two_epochs
    before = digest(run / "checkpoint_2")
    # with two ranks a step has more examples: continue_changed
    arguments = (place / "run.yaml", *arguments, "num_epochs=3", "continue_changed=true")
    limit = (resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes of a file
    done = start(*arguments, ranks=ranks, code=None, preexec_fn=lambda: resource.setrlimit(*limit))
    sentence = r"checkpoint_2_step_\d cannot be written: .*earlier checkpoints are untouched"
    assert re.search(sentence, conftest.complaint_of(done))
    assert "OSError" not in done.stderr
    assert digest(run / "checkpoint_2") == before
    assert not list(run.glob(".writing-*"))
    assert not (run / "checkpoint_3").exists()


def test_accuracies_of_another_validation_are_not_compared(place, two_epochs, here):
    """An epoch was judged by the best accuracy on the earlier file, without a word."""
    run, arguments = two_epochs
    state = run / "checkpoint_2" / "trainer" / "state.json"
    assert json.loads(state.read_text())["best"]
    arguments = (place / "run.yaml", *arguments, "num_epochs=3")
    assert "accuracies differ" not in here(*arguments).stderr
    shutil.rmtree(run / "checkpoint_3")
    printed = here(*arguments, "max_eval_examples=3", "answer_match=number").stderr
    assert printed.count("answer_match and max_eval_examples changed: accuracies differ") == 1
    assert [*json.loads((run / "checkpoint_3" / "trainer" / "state.json").read_text())["best"]] == ["2"]


FULL_DISKS = {  # a file on a full disk -> keys of the run
    "metrics.jsonl": (),
    "config.yaml": (),
    "eval/predictions.jsonl": ("only_eval=true",),
    "eval/metrics.json": ("only_eval=true",),
    "nonfinite.jsonl": ("lr=1e30", "weight_decay=0", "log_every_steps=1"),
}


@pytest.fixture(scope="module")
def trained_once(place) -> Path:
    """A checkpoint after an epoch."""
    return main(place, *BRIEF, "name=once") / "checkpoint_1"


@pytest.mark.parametrize("file", FULL_DISKS)
def test_a_full_disk_is_an_error_without_traceback(place, trained_once, here, file):
    """An evaluation of an hour printed nothing but a traceback."""
    name = "full-" + file.replace("/", "-")
    target = place / "runs" / name / file
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    overrides = (*BRIEF, f"name={name}", *FULL_DISKS[file], f"load_model_path={trained_once}")
    done = here(place / "run.yaml", *overrides, code=2)
    assert f"{target.name} cannot be written: No space left on device" in conftest.complaint_of(done)
    assert ("accuracy" in done.stdout) == ("only_eval=true" in overrides)  # the table is printed nevertheless


def test_a_full_disk_under_the_token_cache(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("dataset.np.save", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    main(place, f"save_path={tmp_path}", "name=full", code=2)
    assert re.search(r"error: .*/.tokens/\w+ cannot be written: No space left", capsys.readouterr().err)
    assert not list((tmp_path / ".tokens").iterdir())


@pytest.mark.parametrize("missing", [1, 600, 5000])
def test_a_disk_that_is_full_for_the_last_bytes(tmp_path, missing):
    """numpy published a cut token cache without a word; torch raised a RuntimeError of C++, a traceback."""
    tokens = Tokens(*(np.arange(9000, dtype=np.int32) for _ in Tokens.NAMES))
    (tmp_path / "trainer").mkdir()
    actions = {
        tmp_path / "examples.npy": lambda: tokens.save(tmp_path),
        tmp_path / "trainer" / "random_0.pt": lambda: save_random_state(tmp_path, World(0, 0, 1, torch.device("cpu"))),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for path, action in actions.items():
        action()
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                action()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_logs_the_size_of_its_checkpoints_and_warns_of_a_smaller_disk(place, here, monkeypatch):
    """Checkpoints of GPT-2 took 75 GB without a warning."""
    arguments = (place / "run.yaml", "name=disk", *BRIEF, "max_train_examples=8")
    printed = here(*arguments, "tf32=true").stderr
    assert torch.get_float32_matmul_precision() == "high"
    assert re.search(r"^checkpoints take at most 0\.00\d+ GB$", printed, re.MULTILINE)
    assert "GB free" not in printed
    free = shutil.disk_usage(place)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    printed = here(*arguments, "name=small-disk").stderr
    assert "GB free, and the checkpoints of this run may take 0.00" in printed
    assert "see keep_checkpoints" in printed
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_checkpoint_does_not_need_the_model_that_training_started_from(place, tmp_path):
    """Restart and evaluation were errors, although the checkpoint has everything."""
    shutil.copytree(place / "model", tmp_path / "model")
    arguments = (*BRIEF, f"model_id={tmp_path / 'model'}", "name=moved")
    run = main(place, *arguments)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    gone = f"load_model_path={tmp_path / 'gone'}"  # it may no longer exist either
    main(place, *arguments, "num_epochs=2", gone, "resume=1")  # as users of the reference do after a crash
    main(place, *arguments, f"model_id={tmp_path / 'elsewhere'}", "num_epochs=3")  # the same model in another folder
    assert [record["epoch"] for record in epochs(run)] == [0, 1, 2]
    for source, name in ((run, "evaluated-moved"), (run / "checkpoint_3", "evaluated-moved-3")):
        main(place, *arguments, "only_eval=true", f"load_model_path={source}", f"name={name}")
    refuses(r"model_id .* does not exist", main, place, *arguments, "name=new")


def with_settings(place: Path, folder: Path, settings: dict) -> str:
    """Writes a model with this generation_config; returns its key."""
    shutil.copytree(place / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return f"model_id={folder}"


def test_checkpoints_of_ddp_and_fsdp_have_the_same_files(place, tmp_path):
    """FSDP lost the model's stop tokens and sampling settings."""
    settings, found = {"eos_token_id": [0, 5], "top_k": 7, "do_sample": True}, {}
    model = with_settings(place, tmp_path / "model", settings)
    for strategy in ("ddp", "fsdp"):
        folder = main(place, *BRIEF, model, f"strategy={strategy}", f"name=files-{strategy}") / "checkpoint_1"
        found[strategy] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
        found[strategy].pop("metrics.json")  # seconds
        assert settings.items() <= conftest.read_json(folder / "generation_config.json").items()
    assert found["ddp"] == found["fsdp"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_contradictory_generation_settings_are_kept(place, tmp_path, strategy):
    """transformers refuses to save them once a stop token has been added, and an epoch of training was lost."""
    settings = {"eos_token_id": 5, "temperature": 0.6, "top_p": 0.9}  # without do_sample, as in many published models
    keys = (*BRIEF, with_settings(place, tmp_path / "model", settings), f"strategy={strategy}")
    for n_epochs in (1, 2):
        run = main(place, *keys, f"name=contradicting-{strategy}", f"num_epochs={n_epochs}")
    kept = conftest.read_json(run / "checkpoint_2" / "generation_config.json")
    kept.pop("transformers_version")
    assert kept == settings | {"eos_token_id": [0, 5]}


# --- Folders ---


def test_a_folder_of_another_configuration_is_refused_unless_continue_changed_is_set(place, two_epochs, here):
    run, arguments = two_epochs
    before, changed = digest(run), (place / "run.yaml", *arguments, "lr=0.5", "seed=2")
    printed = here(*changed, code=2).stderr
    assert "another configuration (seed 1, not 2; lr 0.001, not 0.5)" in printed
    assert "continue_changed=true" in printed
    other = shutil.copy(place / "valid.json", place / "other_train.json")
    done = here(place / "run.yaml", *arguments, f"train_path={other}", code=2)
    assert "was trained on other data" in done.stderr
    assert digest(run) == before
    assert "after 2 of 3 epochs" in here(*changed, "continue_changed=true").stderr
    assert yaml.safe_load((run / "config.yaml").read_text())["lr"] == 0.5


def test_a_run_continues_after_half_written_files(place, two_epochs, here):
    run, arguments = two_epochs
    for damage in ("", "- just a list\n"):
        (run / "config.yaml").write_text(damage)
        with (run / "metrics.jsonl").open("a") as log:
            log.write('{"event": "st')
        done = here(place / "run.yaml", *arguments, "num_epochs=3")
        assert "continuing from" in done.stderr
        assert "validation, stage 2" in done.stdout
    assert yaml.safe_load((run / "config.yaml").read_text())["num_epochs"] == 3


@pytest.mark.parametrize("moved", ["the file", "the tokenizer"])
def test_a_moved_data_file_or_another_release_of_the_tokenizer_is_no_other_data(
    place, two_epochs, here, monkeypatch, moved
):
    """The error was "was trained on other data", because a flag or a class name had changed."""
    _, arguments = two_epochs
    if moved == "the file":
        arguments += (f"train_path={shutil.copy(place / 'train.json', place / 'moved.json')}",)
    else:
        monkeypatch.setattr("preprocessing.tokens._tokenizer_state", lambda _: "written to disk otherwise")
    assert "after 2 of 3 epochs" in here(place / "run.yaml", *arguments).stderr


def test_evaluations_under_one_name_have_separate_folders(place, two_epochs):
    """The second replaced results of the first without a message, and their files were mixed."""
    run, (save_path, *_) = two_epochs
    keys = (save_path, "name=one", "only_eval=true", "max_new_tokens=2")
    for checkpoint_dir, val in (("1", "valid"), ("2", "valid"), ("2", "train"), ("2", "train")):
        folder = main(place, *keys, f"load_model_path={run}@{checkpoint_dir}", f"val_path={place}/{val}.json")
    main(place, *keys, f"load_model_path={run}@2", f"val_path={place}/train.json", "eval_latents=1")
    found = []
    for name in ("eval_1", "eval_2", "eval_3", "eval"):
        metrics = conftest.read_json(folder / name / "metrics.json")
        found.append((Path(metrics["checkpoint"]).name, Path(metrics["file"]).name))
        records = read_log(folder / name / "metrics.jsonl")
        assert len(records) == (2 if name == "eval_3" else 1)
        assert {record["checkpoint"] for record in records} == {metrics["checkpoint"]}
        assert len((folder / name / "predictions.jsonl").read_text().splitlines()) == metrics["examples"]
    assert found[:2] == [("checkpoint_1", "valid.json"), ("checkpoint_2", "valid.json")]
    assert found[2:] == [("checkpoint_2", "train.json")] * 2
    assert not (folder / "eval_4").exists()
    examples = conftest.read_json(place / "valid.json")
    for n_examples in (2, 2, 1):  # the same path with other content
        (place / "changing.json").write_text(json.dumps(examples[:n_examples]))
        folder = main(place, *keys, "name=two", f"load_model_path={run}@2", f"val_path={place}/changing.json")
    sizes = [conftest.read_json(path)["examples"] for path in sorted(folder.glob("*/metrics.json"))]
    assert sizes == [1, 2]


HOLDER = """
import sys
from pathlib import Path
from trainer.distributed import World, lock_run_dir

with lock_run_dir(World(0, 0, 1, None), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_on_the_same_folder_is_refused(place, two_epochs, here):
    """Two evaluations ran at once."""
    run, (save_path, *_) = two_epochs
    holding = command("-c", HOLDER, run.parent / "held")
    holder = subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    evaluation = (save_path, "name=held", "only_eval=true", "max_new_tokens=2", f"load_model_path={run}")
    for keys in (evaluation, (save_path, "name=held")):
        printed = here(place / "run.yaml", *keys, code=2).stderr
        assert re.search(rf"held is in use by another job .process {holder.pid} on ", printed), printed
    holder.kill()  # a dead job holds nothing
    holder.communicate()
    here(place / "run.yaml", *evaluation)


# --- Ranks and losses ---


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(place):
    run = place / "runs" / "orphans"
    process = begin(place, *LONG, "num_epochs=50", "name=orphans", ranks=2)
    wait_for(lambda: len(steps(run)) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not processes_of(place, "orphans"))


def model_with_a_broken_token(place: Path) -> Path:
    """Returns a model whose embedding of the letter x is NaN; one example of with_x.json contains an x."""
    examples = conftest.read_json(place / "train.json")[:32]
    examples[5]["question"] = "x" + examples[5]["question"]
    (place / "with_x.json").write_text(json.dumps(examples))
    folder = place / "broken"
    tiny_model.write_model([place / "with_x.json"], folder, "char", "llama", 32, 1, 2, 128, tied=False)
    state = weights(folder)
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("x")
    state["model.embed_tokens.weight"][token] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nonfinite_examples_are_named_by_their_records(world, tmp_path):
    """Bug: with max_train_tokens it named the index among the examples that were left."""
    tokens = Tokens(np.zeros(12, np.int32), np.array([0, 1, 5, 6, 7, 8, 9, 10]), np.array([0, 2, 4, 6]))
    tokens.leave_out_longer_than(4)
    config = SimpleNamespace(run_dir=tmp_path, skip_nonfinite=True)
    step = Step(torch.zeros(1), None, 0.1, 0, [1, 0])
    run = SimpleNamespace(config=config, world=world, data=SimpleNamespace(train=tokens))
    report_nonfinite(run, 0, 3, math.nan, step)
    assert conftest.read_json(tmp_path / "nonfinite.jsonl")["examples"] == [1, 2]


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(place, here, ranks):
    folder = model_with_a_broken_token(place)
    run = place / "runs" / f"nan-{ranks}"
    arguments = (
        *(place / "run.yaml", f"model_id={folder}", f"train_path={place / 'with_x.json'}", f"name=nan-{ranks}"),
        *("num_epochs=1", "global_batch_size=8", "batch_size_training=4", "max_new_tokens=2", "seed=3"),
    )
    done = start(*arguments, ranks=ranks, code=None) if ranks else here(*arguments, code=2)
    record = conftest.read_json(run / "nonfinite.jsonl")
    assert 5 in record["examples"]
    assert len(record["examples"]) == 8  # all examples of its step
    sentence = f"the loss of step {record['step']}, in epoch 0, is nan.*the last good checkpoint is none"
    assert re.search(sentence, conftest.complaint_of(done))
    shutil.rmtree(run)
    assert "skipped, its examples are in" in (together if ranks else here)(*arguments, "skip_nonfinite=true").stderr
    record = epochs(run)[-1]
    assert record["skipped"] == 1
    losses = [step["loss"] for step in steps(run)]  # of 8 examples each
    assert record["train_loss"] == pytest.approx(np.nanmean(losses))  # bug: the skipped examples counted as 0
    after, before = weights(run / "checkpoint_1"), weights(folder)
    assert all(value.isfinite().all() for name, value in after.items() if "embed" not in name and "lm_head" not in name)
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_weights_that_are_not_finite_are_not_saved(place, two_epochs, monkeypatch, capsys):
    """The loss of a step is computed before its update, and may be finite when the weights no longer are."""
    run, arguments = two_epochs
    before = digest(run / "checkpoint_2")
    original = run_module.train_step

    def overflowing(current, *others):
        result = original(current, *others)
        next(current.model.parameters()).data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(run_module, "train_step", overflowing)
    main(place, *arguments, "save_every_steps=1", code=2)
    sentence = r"error: the weights after step 5 are not finite and not saved; .*checkpoint_2;"
    assert re.search(sentence, capsys.readouterr().err)
    assert digest(run / "checkpoint_2") == before
    assert [path.name for path in sorted(run.glob("checkpoint_*"))] == ["checkpoint_1", "checkpoint_2"]


@pytest.mark.slow
def test_torture():
    """A short form of `make torture`."""
    done = conftest.python(ROOT / "tests" / "torture.py", "--runs", "1", "--seed", "1", timeout=1800)
    assert done.stdout.count("as undisturbed") == 1
