"""wandb must not end a training, delay it or change its exit code when it dies, hangs, is missing or not logged in."""

import contextlib
import os
import signal
import sys
import threading
import time
import types

import pytest
import wandb
from conftest import epochs, lines_of, main, raising, read_json

import run as run_module
from trainer import logger as tracker
from trainer.logger import RunLogger, why_offline

SHORT = ("max_train_examples=32", "max_new_tokens=2", "num_epochs=1", "wandb=offline", "log_every_steps=1")


class Wandb(types.ModuleType):
    """A stand-in that records its calls. failing: call -> the function that it runs."""

    def __init__(self, failing: dict | None = None):
        super().__init__("wandb")
        self.failing, self.calls, self.id = failing or {}, [], "abc"
        self.Settings = dict

    def _do(self, name: str, *arguments):
        self.calls.append((name, *arguments))
        if name in self.failing:
            self.failing[name]()

    def init(self, **keys):
        self._do("init", keys["mode"])
        return self

    def define_metric(self, name, step_metric):
        self._do("define_metric", name, step_metric)

    def log(self, values):
        self._do("log", values)

    def mark_preempting(self):
        self._do("mark_preempting")

    def finish(self, exit_code=None):
        self._do("finish", exit_code)


LOST = ConnectionResetError("Connection lost")
FAILURES = {"broken": raising(LOST), "silent": threading.Event().wait, "leaves": raising(SystemExit(3))}


@pytest.fixture
def use(monkeypatch):
    """Puts a stand-in in wandb's place."""

    def use(module):
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setenv("WANDB_MODE", "offline")
        return module

    return use


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_of_wandb_is_one_warning(place, use, capsys, monkeypatch, call, how):
    """Wandb's helper process was killed, and the run ended before it was saved; finish hung until SIGKILL."""
    monkeypatch.setitem(tracker.TIMEOUTS, {"init": "start"}.get(call, call), 0.3)
    module = use(Wandb({call: FAILURES[how]}))
    folder = main(place, *SHORT, f"name=tracker-{call}-{how}")
    assert (folder / "checkpoint_1").is_dir()
    assert len(epochs(folder)) == 1
    assert capsys.readouterr().err.count("warning: wandb failed") == 1
    assert [name for name, *_ in module.calls].count(call) == 1


def test_a_missing_wandb_is_a_warning(place, use, capsys):
    """A traceback before the first step."""
    use(None)  # makes `import wandb` fail
    assert len(epochs(main(place, *SHORT, "name=tracker-missing"))) == 1
    assert "warning: wandb failed (start: ModuleNotFoundError" in capsys.readouterr().err


def test_a_file_in_place_of_wandbs_folder_does_not_end_a_run(place, monkeypatch):
    """With the real wandb."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = place / "runs" / "tracker-file"
    folder.mkdir(parents=True)
    (folder / "wandb").write_text("in the way")
    assert len(epochs(main(place, *SHORT, "name=tracker-file"))) == 1


def test_the_table_is_printed_before_wandb_finishes_and_one_signal_ends_that(place, use, capsys):
    """With `finish` hanging, SIGTERM did nothing, a second gave 143, and there was no table."""

    def hang() -> None:
        shown.append(capsys.readouterr().out)
        restarts.extend((place / "runs" / "tracker-signal").glob("checkpoint_*_step_*"))
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    shown, restarts = [], []
    use(Wandb({"finish": hang}))
    main(place, *SHORT, "name=tracker-signal")
    assert "validation, stage 0" in shown[0]
    assert not restarts
    assert "wandb failed (finish: interrupted by a signal)" in capsys.readouterr().err


CALLS = {
    "0": (lambda: None, [("finish", 0)]),
    "2": (raising(run_module.UserError("no")), [("finish", 2)]),
    "1": (raising(RuntimeError("no")), [("finish", 1)]),
    "130": (raising(KeyboardInterrupt()), [("finish", 130)]),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGTERM), [("mark_preempting",), ("finish", 0)]),
}


@pytest.mark.parametrize("end", CALLS)
def test_wandb_gets_the_exit_code_and_has_seconds_to_finish(place, use, monkeypatch, capsys, end):
    """Failed and stopped runs were 'finished', with code 0; each stopped run warned that wandb failed."""
    original, (act, wanted) = run_module.train_step, CALLS[end]

    def step(run, *others):
        if run.progress.step == 2:
            act()
        return original(run, *others)

    monkeypatch.setattr(run_module, "train_step", step)
    module = use(Wandb({"finish": lambda: time.sleep(0.5)}))
    error = {"1": RuntimeError, "130": KeyboardInterrupt}.get(end)
    with pytest.raises(error) if error else contextlib.nullcontext():
        main(place, *SHORT, f"name=exit-{end}", code=2 if end == "2" else 0)
    assert [call for call in module.calls if call[0] not in ("init", "define_metric", "log")] == wanted
    assert "wandb failed" not in capsys.readouterr().err


def test_an_exception_before_the_first_step_leaves_no_log_open(place, use, monkeypatch):
    """Wandb's own exit handler 'finished' such a run with code 0."""
    module = use(Wandb())
    monkeypatch.setattr("trainer.evaluate.warn_unscorable_answers", raising(LOST))
    with pytest.raises(ConnectionResetError):
        main(place, *SHORT, "name=tracker-early")
    assert not module.calls or module.calls[-1][0] == "finish"


def test_what_is_logged(place, use):
    module = use(Wandb())
    folder = main(place, *SHORT, "name=tracker-log")
    logged = [call[1] for call in module.calls if call[0] == "log"]
    assert [values["step"] for values in logged] == [1, 2, 3, 4, 4]  # the steps, then the epoch
    assert [call[1:] for call in module.calls if call[0] == "define_metric"] == [
        ("step/*", "step"),
        ("epoch/*", "step"),
    ]
    assert [{key.partition("/")[0] for key in values} for values in logged] == [{"step"}] * 4 + [{"step", "epoch"}]
    assert len(lines_of(folder / "metrics.jsonl")) == 5
    assert read_json(folder / "checkpoint_1" / "trainer" / "state.json")["wandb_id"] == "abc"


def test_wandbs_own_credentials_decide_whether_it_logs_online(monkeypatch, tmp_path, reason):
    """A user who was logged in got an offline run without a message."""
    netrc, machine = tmp_path / ".netrc", "machine {} login user password {}\n"
    assert "nobody is logged in at https://" in reason()
    netrc.write_text(machine.format("api.wandb.ai", KEY))
    netrc.chmod(0o644)
    assert reason() is None
    netrc.write_text(machine.format("api.wandb.ai", "secret"))
    assert "cannot be used: AuthenticationError" in reason()
    netrc.write_bytes(b"\xff\xfe\x00")
    assert "cannot be used: UnicodeDecodeError" in reason()
    netrc.write_text(machine.format("wandb.lab:8080", KEY))
    assert "nobody is logged in" in reason()
    (tmp_path / "settings").write_text("[default]\nbase_url = http://wandb.lab:8080\n")  # wandb login --host
    assert reason() is None
    netrc.unlink()
    assert "nobody is logged in at http://wandb.lab:8080" in reason()
    (tmp_path / "token").write_text("a.b.c")
    with monkeypatch.context() as patched:
        patched.setenv("WANDB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        assert reason() is None
        (tmp_path / "token").unlink()
        assert "cannot be used: FileNotFoundError" in reason()
    (tmp_path / "settings").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert reason() is None


@pytest.fixture
def reason(monkeypatch, tmp_path):
    """Calls `why_offline`, first without any credentials; a test adds them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))

    def reason() -> str | None:
        wandb.teardown()  # it reads its settings once
        return why_offline()

    yield reason
    wandb.teardown()


KEY = "x" * 40


def opened(folder, mode: str) -> RunLogger:
    logger = RunLogger(folder)
    logger.open({"project": "p", "name": "n", "debug": False, "wandb": mode})
    return logger


@pytest.mark.parametrize("offline", ["nobody is logged in", None])
def test_a_run_that_cannot_log_online_warns_once(tmp_path, use, monkeypatch, capsys, offline):
    """Nothing said that there would be no curves. The environment has priority over the configuration."""
    module = use(Wandb())
    monkeypatch.setattr(tracker, "why_offline", lambda: offline)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with opened(tmp_path, "online"):
        assert module.calls == []
    monkeypatch.setenv("WANDB_MODE", "")  # like an unset variable
    with opened(tmp_path, "online"):
        assert module.calls[0] == ("init", "offline" if offline else "online")
    assert capsys.readouterr().err == (f"warning: wandb logs offline: {offline}\n" if offline else "")
