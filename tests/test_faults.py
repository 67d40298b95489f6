"""What clusters do to jobs: signals, kills, full and broken disks, other world sizes, NaN, two jobs on one folder."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT, settled
from safetensors.torch import load_file, save_file
from test_run import digest, epochs, main, start, together, weights, with_dropout
from test_run import here as here  # a fixture
from test_run import place as place

import run as run_module
from config import Config
from trainer import checkpoint
from trainer.checkpoint import checkpoints
from trainer.logger import read_log
from utils import UserError

SLOW_VALIDATION = ("max_new_tokens=100", "eval_batch_size=1")  # seconds in which a run cannot end before its kill
LONG = ("num_epochs=3", "max_train_examples=144", "max_new_tokens=4", "global_batch_size=16", "log_every_steps=1")


def steps(run: Path) -> list[dict]:
    return [record for record in read_log(run / "metrics.jsonl") if record["event"] == "step"]


def begin(place: Path, *arguments: str, ranks: int = 0) -> subprocess.Popen:
    """Starts run.py as a cluster would: its launcher does not die of SIGUSR1, which all processes of a job get."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = ["bash", "-c", 'trap "" USR1; exec "$@"', "-", *launcher, str(ROOT / "run.py"), str(place / "run.yaml")]
    return subprocess.Popen(
        [*command, *settled(*arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def processes_of(place: Path, name: str) -> list[int]:
    """The ranks of a run, the lowest first; without launcher and loader."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        # the tests may be running twice on this machine: a name alone may be another's
        ours = {f"name={name}".encode(), bytes(place / "run.yaml")} <= set(command)
        if ours and b"torch.distributed.run" not in command:
            rank = next((int(e[5:]) for e in environment if e.startswith(b"RANK=")), 0)
            found.append((rank, int(folder.name)))
    return [pid for _, pid in sorted(found)]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(place) -> dict[str, torch.Tensor]:
    """The weights of a run on two ranks, with dropout, that nothing has happened to."""
    together(place / "run.yaml", *LONG, f"model_id={with_dropout(place)}", "name=undisturbed")
    return weights(place / "runs" / "undisturbed" / "checkpoint_3")


# ---- signals ----


@pytest.mark.slow
def test_a_signal_saves_and_the_next_job_goes_on_inside_the_epoch(place, undisturbed, tmp_path, monkeypatch):
    """SIGTERM here; SIGUSR1 in test_slurm.py."""
    name, run = "signal", place / "runs" / "signal"
    arguments = (*LONG, f"model_id={with_dropout(place)}", f"name={name}")
    monkeypatch.setenv("INTERRUPTED_FILE", str(tmp_path / "interrupted"))
    process = begin(place, *arguments, *SLOW_VALIDATION, ranks=2)
    wait_for(lambda: len(steps(run)) >= 12)
    victims = processes_of(place, name)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGTERM)  # all ranks have to agree
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert "stopped by a signal" in printed
    assert (tmp_path / "interrupted").exists()
    saved, n_steps = checkpoints(run)[-1], len(steps(run))
    assert 12 <= n_steps < 27
    # within an epoch, unless validation had begun
    assert saved.name in (f"checkpoint_{n_steps // 9}_step_{n_steps}", f"checkpoint_{n_steps // 9}")
    done = together(place / "run.yaml", *arguments)
    assert f"continuing from {saved}" in done.stderr
    assert same(weights(run / "checkpoint_3"), undisturbed)
    assert not list(run.glob("checkpoint_*_step_*"))  # the run is done: nobody needs them


@pytest.mark.slow
def test_a_signal_during_validation_ends_the_run_after_it(place, here):
    """And not after another step."""
    run, arguments = place / "runs" / "validating", (*LONG, "name=validating")
    process = begin(place, *arguments, *SLOW_VALIDATION)
    wait_for(lambda: len(steps(run)) >= 9)  # of the epoch
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert len(steps(run)) == 9
    done = here(place / "run.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr
    assert len(epochs(run)) == 3


@pytest.mark.slow
def test_a_run_that_was_killed_in_validation_validates_again(place, here):
    """Without save_every_steps the whole epoch was lost."""
    run, arguments = place / "runs" / "again", (*LONG, "name=again", "num_epochs=1")
    process = begin(place, *arguments, *SLOW_VALIDATION)
    wait_for(lambda: (run / "checkpoint_0_step_9").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = here(place / "run.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    assert "checkpoint_0_step_9, after 0 of 1 epochs and 144 examples" in done.stderr
    assert len(steps(run)) == 9
    assert [path.name for path in run.glob("checkpoint_*")] == ["checkpoint_1"]


STOPPED = """
import os
import signal
import sys

from trainer.distributed import StopSignal, World

number = int(sys.argv[1])
signal.signal(number, signal.SIG_IGN)
with StopSignal(World(0, 0, 1, None)) as stop:
    os.kill(os.getpid(), number)
    print(stop.requested())
signal.signal(number, signal.default_int_handler)
with StopSignal(World(0, 0, 1, None)) as stop:
    os.kill(os.getpid(), number)
    print(stop.requested())
print(signal.getsignal(number) is signal.default_int_handler)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_stop_a_run_unless_its_user_has_them_ignored(number):
    """A closed terminal and the first Ctrl-C lost the epoch. nohup and background jobs ignore theirs."""
    command = [sys.executable, "-c", STOPPED, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(number == signal.SIGTERM), "True", "True"], done.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_run_is_saved_inside_its_epoch(place, monkeypatch, number):
    """And train_loss was the sum of the means of steps of several sizes, over the number of the last ones."""
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


def test_a_debugger_gets_the_exception(tmp_path):
    """The process had exited before there could be a post mortem."""
    (tmp_path / "program.py").write_text("from trainer import distributed\ndistributed.run_main(lambda: 1 / 0)\n")
    for debugger in ([], ["-m", "pdb", "-c", "continue"]):
        done = subprocess.run(
            [sys.executable, *debugger, str(tmp_path / "program.py")],
            input="q\n",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert "ZeroDivisionError" in done.stdout + done.stderr
        assert ("Entering post mortem debugging" in done.stdout) == bool(debugger), done.stdout


def test_a_second_signal_exits_at_once():
    """But not one that comes together with the first, as launchers hand on what all processes have got anyway."""
    program = (
        "import sys, time; from trainer.distributed import StopSignal, World\n"
        "with StopSignal(World(0, 0, 1, None)) as stop:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"
        "        if stop.requested(): print('asked', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


# ---- other numbers of ranks ----


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(place, here, before, after):
    """No example of the epoch is repeated or left out, and the optimizer's state is re-sharded: the weights are those
    of an undisturbed run, but for the order of additions."""
    name, run = f"ranks-{before}-{after}", place / "runs" / f"ranks-{before}-{after}"
    arguments = (*LONG, "batch_size_training=4", "save_every_steps=5", f"name={name}", "num_epochs=1")
    whole = place / "runs" / "ranks-whole"
    if not whole.exists():
        main(place, *arguments, "name=ranks-whole")
    process = begin(place, *arguments, *SLOW_VALIDATION, ranks=before)
    wait_for(lambda: (run / "checkpoint_0_step_5").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(run / "checkpoint_0_step_9", ignore_errors=True)  # where it was faster than the kill
    strategy = "strategy=fsdp" if after == 2 else "strategy=ddp"
    done = (together if after == 2 else here)(place / "run.yaml", *arguments, strategy)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr
    found, wanted = weights(run / "checkpoint_1"), weights(whole / "checkpoint_1")
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-5
    begun = weights(place / "model")
    assert max((found[n] - begun[n]).abs().max() for n in begun if begun[n].shape == found[n].shape) > 1e-3


@pytest.mark.slow
def test_the_mean_loss_of_an_epoch_that_ends_on_fewer_ranks(place, here):
    """2.36 where the steps averaged 3.00; a step of two ranks has twice the examples of one of one rank."""
    run = place / "runs" / "fewer"
    arguments = ("name=fewer", "max_train_examples=144", "num_epochs=1", "log_every_steps=1", "save_every_steps=3")
    process = begin(place, *arguments, *SLOW_VALIDATION, ranks=2)
    wait_for(lambda: (run / "checkpoint_0_step_3").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for path in run.glob("checkpoint_0_step_[69]"):  # where it was faster than the kill
        shutil.rmtree(path)
    done = here(place / "run.yaml", *arguments, "max_new_tokens=2", "continue_changed=true")
    assert done.returncode == 0, done.stderr
    losses = {record["step"]: record["loss"] for record in steps(run)}  # of a repeated step the last
    assert len(losses) == 3 + 12
    mean = sum(loss * (16 if step <= 3 else 8) for step, loss in losses.items()) / 144
    assert epochs(run)[0]["train_loss"] == pytest.approx(mean)


PROBE = """
import atexit
import os
import runpy
import sys


class Probe:
    def __del__(self):
        os.write(1, b"the interpreter goes down\\n")


PROBE = Probe()
atexit.register(print, "an exit handler runs")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "code"), [(("strategy=fsdp",), 0), (("model_id=nowhere", "name=nowhere"), 2)])
def test_a_rank_ends_without_taking_the_interpreter_down(place, tmp_path, changes, code):
    """A thread of gloo that is still there while Python goes down can kill a rank that has done all of its work."""
    (tmp_path / "probe.py").write_text(PROBE)
    short = ("name=ending", "num_epochs=1", "max_train_examples=16", "max_new_tokens=2")
    done = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "probe.py"),
            str(ROOT / "run.py"),
            str(place / "run.yaml"),
            *settled(*short, *changes),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == code, done.stderr[-4000:]
    assert done.stdout.endswith("an exit handler runs\n"), done.stdout
    assert "goes down" not in done.stdout


# ---- disks ----


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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit flipped": lambda folder: flip(folder / "model.safetensors"),
    "half a file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "a file missing": lambda folder: (folder / "trainer" / "random_0.pt").unlink(),
    "its description missing": lambda folder: (folder / "coconut.json").unlink(),
    "the digests broken": lambda folder: os.truncate(folder / "trainer" / "manifest.json", 10),
    "the state missing": lambda folder: (folder / "trainer" / "state.json").unlink(),
    "an empty state": lambda folder: os.truncate(folder / "trainer" / "state.json", 0),
    "the optimizer broken": lambda folder: flip(next((folder / "trainer" / "optimizer").glob("*.distcp"))),
}


def test_a_damaged_checkpoint_is_passed_over(place, two_epochs, here, capsys):
    run, arguments = two_epochs
    keep = run.parent / "kept"
    shutil.copytree(run, keep)
    for damage, act in DAMAGES.items():
        shutil.rmtree(run)
        shutil.copytree(keep, run)
        act(run / "checkpoint_2")
        capsys.readouterr()
        assert checkpoint.newest_whole(run) == run / "checkpoint_1", damage
        (found,) = capsys.readouterr().err.splitlines()
        assert re.search("warning: .*checkpoint_2 is damaged .*passed over", found), damage
    done = here(place / "run.yaml", *arguments)  # the last of them, in the program
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr
    assert "continuing from" in done.stderr
    assert "checkpoint_1, after 1 of 3" in done.stderr
    assert len(list(run.glob("checkpoint_2.replaced-*"))) == 1


@pytest.mark.parametrize("file", ["metrics.json", "coconut.json"])
def test_an_old_checkpoint_that_is_damaged_stops_no_pruning(place, two_epochs, here, file):
    """With keep_checkpoints every save ended in a traceback."""
    run, arguments = two_epochs
    os.truncate(run / "checkpoint_1" / file, 3)
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    done = here(place / "run.yaml", *arguments, "num_epochs=3", "keep_checkpoints=1")
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoint_1").is_dir()  # for whoever wants to restore it
    assert (run / "checkpoint_3").is_dir()


def test_only_damaged_checkpoints_are_an_error_and_no_new_start(place, two_epochs, here):
    run, arguments = two_epochs
    shutil.rmtree(run / "checkpoint_1")
    flip(run / "checkpoint_2" / "model.safetensors")
    before = digest(run)
    done = here(place / "run.yaml", *arguments)
    assert done.returncode == 2
    assert "holds damaged checkpoints only" in done.stderr
    done = here(place / "run.yaml", *arguments, "name=eval", "only_eval=true", f"load_model_path={run}")
    assert done.returncode == 2
    assert "is damaged: model.safetensors is not what was written" in done.stderr
    assert digest(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint(place, two_epochs, ranks):
    run, arguments = two_epochs
    before = digest(run / "checkpoint_2")

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    # for two ranks a step has other examples
    arguments = (*arguments, "num_epochs=3", "continue_changed=true")
    done = subprocess.run(
        [*launcher, str(ROOT / "run.py"), str(place / "run.yaml"), *settled(*arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=no_large_files,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    complaints = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1, done.stderr
    assert re.search(r"checkpoint_2_step_\d cannot be written: .*earlier checkpoints are untouched", complaints[0])
    assert digest(run / "checkpoint_2") == before
    assert not list(run.glob(".writing-*"))
    assert not (run / "checkpoint_3").exists()


FULL_DISKS = {  # what is on a full disk -> overrides, what stands there before
    "metrics.jsonl": (),
    "config.yaml": (),
    "eval/predictions.jsonl": ("only_eval=true",),
    "eval/metrics.json": ("only_eval=true",),
    "nonfinite.jsonl": ("lr=1e30", "weight_decay=0", "log_every_steps=1"),
}


@pytest.mark.parametrize("file", FULL_DISKS)
def test_a_full_disk_is_one_sentence(place, trained_once, capsys, file):
    """OSError tracebacks; an hour's evaluation printed nothing."""
    name = "full-" + file.replace("/", "-")
    target = place / "runs" / name / file
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    overrides = ["num_epochs=1", "max_train_examples=32", "max_new_tokens=2", f"name={name}", *FULL_DISKS[file]]
    config = Config.from_file(place / "run.yaml", settled(*overrides, f"load_model_path={trained_once}"))
    assert run_module.main(config) == 2
    printed = capsys.readouterr()
    (complaint,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert f"{target.name} cannot be written: No space left on device" in complaint
    assert ("accuracy" in printed.out) == config.only_eval  # the table, before it is written


def test_a_full_disk_under_the_token_cache(place, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dataset.np.save", full)
    config = Config.from_file(place / "run.yaml", [f"save_path={tmp_path}", "name=full"])
    assert run_module.main(config) == 2
    assert re.search(r"error: .*/.tokens/\w+ cannot be written: No space left", capsys.readouterr().err)
    assert not list((tmp_path / ".tokens").iterdir())


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_of_one_rank(place):
    """Seven tracebacks on two ranks."""
    folder = place / "runs" / "full-ranks"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    done = start(place / "run.yaml", "num_epochs=1", "max_train_examples=32", "name=full-ranks", ranks=2)
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "OSError" not in done.stderr


def test_a_run_names_the_size_of_its_checkpoints_and_warns_of_a_smaller_disk(place, here, monkeypatch):
    """75 GB, unannounced."""
    arguments = (str(place / "run.yaml"), "name=disk", "num_epochs=1", "max_train_examples=8", "max_new_tokens=2")
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


@pytest.fixture(scope="module")
def trained_once(place) -> Path:
    """A checkpoint after an epoch."""
    folder = place / "runs" / "once"
    overrides = ["num_epochs=1", "max_train_examples=32", "max_new_tokens=2", "name=once"]
    assert run_module.main(Config.from_file(place / "run.yaml", settled(*overrides))) == 0
    return folder / "checkpoint_1"


def test_a_checkpoint_does_not_need_the_model_that_it_began_with(place, tmp_path):
    """Restart and evaluation were refused, although the checkpoint has everything."""
    shutil.copytree(place / "model", tmp_path / "model")
    arguments = [f"model_id={tmp_path / 'model'}", "max_train_examples=32", "max_new_tokens=2", "name=moved"]

    def main(*more: str) -> int:
        return run_module.main(Config.from_file(place / "run.yaml", settled(*arguments, *more)))

    assert main("num_epochs=1") == 0
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    gone = f"load_model_path={tmp_path / 'gone'}"  # what a run began with may be gone too
    assert main("num_epochs=2", gone) == 0
    assert main(f"model_id={tmp_path / 'elsewhere'}", "num_epochs=3") == 0  # the same model at another place
    assert [record["epoch"] for record in epochs(place / "runs" / "moved")] == [0, 1, 2]
    for where in ("moved", "moved/checkpoint_3"):
        name = "name=evaluated-" + where.replace("/", "-")
        assert main("only_eval=true", f"load_model_path={place / 'runs' / where}", name) == 0
    with pytest.raises(UserError, match=r"model_id .* does not exist"):
        main("name=new")


def test_sharded_or_not_a_checkpoint_has_the_same_files(place, tmp_path):
    """Under FSDP the model's stop tokens and sampling settings were gone."""
    shutil.copytree(place / "model", tmp_path / "model")
    settings = {"eos_token_id": [0, 5], "top_k": 7, "do_sample": True}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    found = {}
    for strategy in ("ddp", "fsdp"):
        overrides = [f"model_id={tmp_path / 'model'}", "num_epochs=1", "max_train_examples=32", "max_new_tokens=2"]
        overrides += [f"strategy={strategy}", f"name=files-{strategy}"]
        assert run_module.main(Config.from_file(place / "run.yaml", settled(*overrides))) == 0
        folder = place / "runs" / f"files-{strategy}" / "checkpoint_1"
        found[strategy] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
        found[strategy].pop("metrics.json")  # seconds
        kept = json.loads(found[strategy]["generation_config.json"])
        assert {name: kept[name] for name in settings} == settings
    assert found["ddp"] == found["fsdp"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_settings_that_contradict_each_other_are_kept(place, tmp_path, strategy):
    """Transformers refuses to save them once a stop token has been added, and an epoch of training was lost."""
    shutil.copytree(place / "model", tmp_path / "model")
    settings = {"eos_token_id": 5, "temperature": 0.6, "top_p": 0.9}  # without do_sample, as in many published models
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    overrides = [f"model_id={tmp_path / 'model'}", "max_train_examples=32", "max_new_tokens=2", f"strategy={strategy}"]
    for n_epochs in (1, 2):
        more = [f"name=contradicting-{strategy}", f"num_epochs={n_epochs}"]
        assert run_module.main(Config.from_file(place / "run.yaml", settled(*overrides, *more))) == 0
    folder = place / "runs" / f"contradicting-{strategy}" / "checkpoint_2"
    kept = json.loads((folder / "generation_config.json").read_text())
    kept.pop("transformers_version")
    assert kept == settings | {"eos_token_id": [0, 5]}


# ---- folders ----


def test_a_folder_of_another_configuration_is_refused_unless_continue_changed_is_set(place, two_epochs, here):
    run, arguments = two_epochs
    before = digest(run)
    done = here(place / "run.yaml", *arguments, "lr=0.5", "seed=2")
    assert done.returncode == 2
    assert "another configuration (seed 1, not 2; lr 0.001, not 0.5)" in done.stderr
    assert "continue_changed=true" in done.stderr
    shutil.copy(place / "valid.json", place / "other_train.json")
    done = here(place / "run.yaml", *arguments, f"train_path={place / 'other_train.json'}")
    assert done.returncode == 2
    assert "was trained on other data" in done.stderr
    assert digest(run) == before
    done = here(place / "run.yaml", *arguments, "lr=0.5", "seed=2", "continue_changed=true")
    assert done.returncode == 0, done.stderr
    assert "after 2 of 3 epochs" in done.stderr
    assert yaml.safe_load((run / "config.yaml").read_text())["lr"] == 0.5


def test_what_a_dying_job_left_half_written_stops_nobody(place, two_epochs, here):
    run, arguments = two_epochs
    for damage in ("", "- just a list\n"):
        (run / "config.yaml").write_text(damage)
        with (run / "metrics.jsonl").open("a") as log:
            log.write('{"event": "st')
        done = here(place / "run.yaml", *arguments, "num_epochs=3")
        assert done.returncode == 0, done.stderr
        assert "continuing from" in done.stderr
        assert "validation, stage 2" in done.stdout
    assert yaml.safe_load((run / "config.yaml").read_text())["num_epochs"] == 3


def test_a_changed_weight_decay_counts(place, two_epochs):
    run, arguments = two_epochs
    shutil.copytree(run, run.parent / "other")
    plain = (*arguments, "lr_scheduler=constant", "num_epochs=3")
    main(place, *plain)
    main(place, *plain, "name=other", "weight_decay=50", "continue_changed=true")
    assert not same(weights(run / "checkpoint_3"), weights(run.parent / "other" / "checkpoint_3"))


def test_another_release_of_the_tokenizer_is_the_same_data(place, two_epochs, here, monkeypatch):
    """ "was trained on other data", because a flag or the class's name had changed."""
    _, arguments = two_epochs
    monkeypatch.setattr("preprocessing.tokens._what_decides_ids", lambda _: "written to disk otherwise")
    done = here(place / "run.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    assert "after 2 of 3 epochs" in done.stderr


def test_a_moved_data_file_is_the_same_data(place, two_epochs, here):
    _, arguments = two_epochs
    shutil.copy(place / "train.json", place / "moved.json")
    done = here(place / "run.yaml", *arguments, f"train_path={place / 'moved.json'}")
    assert done.returncode == 0, done.stderr
    assert "after 2 of 3 epochs" in done.stderr


def test_evaluations_under_one_name_are_kept_apart(place, two_epochs, here):
    """The second replaced the first's results without a word, and their files were mixed."""
    run, (save_path, *_) = two_epochs

    def evaluate(*more: str) -> Path:
        done = here(place / "run.yaml", save_path, "name=one", "only_eval=true", "max_new_tokens=2", *more)
        assert done.returncode == 0, done.stderr
        return run.parent / "one"

    for checkpoint_dir, val in (("1", "valid"), ("2", "valid"), ("2", "train"), ("2", "train")):
        folder = evaluate(f"load_model_path={run}@{checkpoint_dir}", f"val_path={place}/{val}.json")
    evaluate(f"load_model_path={run}@2", f"val_path={place}/train.json", "eval_latents=1")
    found = {}
    for name in ("eval_1", "eval_2", "eval_3", "eval"):
        metrics = json.loads((folder / name / "metrics.json").read_text())
        found[name] = (Path(metrics["checkpoint"]).name, Path(metrics["file"]).name)
        logged = read_log(folder / name / "metrics.jsonl")
        assert len(logged) == (2 if name == "eval_3" else 1)
        assert {record["checkpoint"] for record in logged} == {metrics["checkpoint"]}
        assert len((folder / name / "predictions.jsonl").read_text().splitlines()) == metrics["examples"]
    assert list(found.values()) == [
        *(("checkpoint_1", "valid.json"), ("checkpoint_2", "valid.json")),
        *(("checkpoint_2", "train.json"), ("checkpoint_2", "train.json")),
    ]
    assert not (folder / "eval_4").exists()


HOLDER = """
import fcntl
import sys

file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_an_evaluation_holds_the_lock(place, two_epochs, here):
    """Two evaluations at once."""
    run, (save_path, *_) = two_epochs
    (run.parent / "held").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.parent / "held" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    arguments = (save_path, "name=held", "only_eval=true", "max_new_tokens=2", f"load_model_path={run}")
    done = here(place / "run.yaml", *arguments)
    assert done.returncode == 2
    assert "held is in use by another job" in done.stderr
    holder.communicate()
    assert here(place / "run.yaml", *arguments).returncode == 0


@pytest.mark.slow
def test_a_second_job_on_the_same_folder_is_refused(place, here):
    run = place / "runs" / "shared"
    process = begin(place, *LONG, "num_epochs=500", "name=shared")
    try:
        wait_for(lambda: len(steps(run)) >= 2)
        done = here(place / "run.yaml", *LONG, "name=shared")
        assert done.returncode == 2
        assert re.search(rf"shared is in use by another job .process {process.pid} on ", done.stderr), done.stderr
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    main(place, *LONG, "num_epochs=1", "name=shared")  # a dead job holds nothing
    assert len(epochs(run)) >= 1


# ---- ranks and losses ----


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down(place):
    run = place / "runs" / "dying"
    process = begin(place, *LONG, "num_epochs=50", "name=dying", ranks=2)
    wait_for(lambda: len(steps(run)) >= 2)
    os.kill(processes_of(place, "dying")[1], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert re.search(r"rank +: 1 ", printed)
    assert "Signal 9 (SIGKILL) received" in printed
    assert not processes_of(place, "dying")


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(place):
    run = place / "runs" / "orphans"
    process = begin(place, *LONG, "num_epochs=50", "name=orphans", ranks=2)
    wait_for(lambda: len(steps(run)) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    wait_for(lambda: not processes_of(place, "orphans"), seconds=10)


def model_with_a_broken_token(place: Path) -> tuple[Path, list[dict]]:
    """A model that makes NaN of whatever holds the letter x, and data in which one example does."""
    examples = json.loads((place / "train.json").read_text())[:32]
    examples[5]["question"] = "x" + examples[5]["question"]
    (place / "with_x.json").write_text(json.dumps(examples))
    folder = place / "broken"
    tiny_model.write_model([place / "with_x.json"], folder, "char", "llama", 32, 1, 2, 128, tied=False)
    from transformers import AutoTokenizer

    state = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("x")
    state["model.embed_tokens.weight"][token] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, examples


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(place, here, ranks):
    folder, _ = model_with_a_broken_token(place)
    run = place / "runs" / f"nan-{ranks}"
    arguments = (
        *(f"model_id={folder}", f"train_path={place / 'with_x.json'}", f"name=nan-{ranks}", "num_epochs=1"),
        *("global_batch_size=8", "batch_size_training=4", "max_new_tokens=2", "seed=3"),
    )
    arguments = (place / "run.yaml", *arguments)
    done = start(*arguments, ranks=ranks) if ranks else here(*arguments)
    assert done.returncode != 0
    (complaint,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    record = json.loads((run / "nonfinite.jsonl").read_text())
    assert 5 in record["examples"]
    assert len(record["examples"]) == 8  # of the step that it was in
    assert f"the loss of step {record['step']}, in epoch 0, is nan" in complaint
    assert "the last good checkpoint is none" in complaint
    shutil.rmtree(run)
    arguments = (*arguments, "skip_nonfinite=true")
    done = together(*arguments) if ranks else here(*arguments)
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stderr
    assert epochs(run)[-1]["skipped"] == 1
    after, before = weights(run / "checkpoint_1"), load_file(folder / "model.safetensors")
    assert all(value.isfinite().all() for name, value in after.items() if "embed" not in name and "lm_head" not in name)
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_weights_that_are_not_finite_are_not_saved(place, two_epochs, monkeypatch, capsys):
    """The loss of a step is that of the weights before it: it may be fine when they no longer are."""
    run, arguments = two_epochs
    before = digest(run / "checkpoint_2")
    original = run_module.train_step

    def overflowing(current, *others):
        result = original(current, *others)
        next(current.model.parameters()).data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(run_module, "train_step", overflowing)
    config = Config.from_file(place / "run.yaml", (*arguments, "save_every_steps=1"))
    assert run_module.main(config) == 2
    assert re.search(
        r"error: the weights after step 5 are not finite and not saved; .*checkpoint_2;", capsys.readouterr().err
    )
    assert digest(run / "checkpoint_2") == before
    assert [path.name for path in sorted(run.glob("checkpoint_*"))] == ["checkpoint_1", "checkpoint_2"]


# ---- what is not trusted ----


def test_a_configuration_cannot_write_elsewhere(place):
    for name in ("../outside", "/tmp/outside", "a/b", "..", "."):
        done = start(place / "run.yaml", f"name={name}")
        assert done.returncode == 2
        assert "must be a plain folder name" in done.stderr


def test_yaml_makes_no_objects(place, tmp_path):
    (tmp_path / "evil.yaml").write_text("name: !!python/object/apply:os.getcwd []\n")
    done = start(tmp_path / "evil.yaml")
    assert done.returncode == 2
    assert "name must be text" in done.stderr


# ---- all together ----


@pytest.mark.slow
def test_torture():
    """A short form of `make torture`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "torture.py"), "--runs", "1", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("as undisturbed") == 1
