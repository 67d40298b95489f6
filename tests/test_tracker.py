"""wandb must not end a training, delay it or change its exit code: it dies, hangs, is missing, or is not logged in."""

import json
import os
import signal
import sys
import threading
import time
import types

import pytest
import wandb
from test_run import epochs, main
from test_run import place as place  # a fixture

import run as run_module
from config import Config
from trainer import logger as tracker
from trainer.logger import RunLogger, why_offline

SHORT = ("max_train_examples=32", "max_new_tokens=2", "num_epochs=1", "wandb=offline", "log_every_steps=1")


class Wandb(types.ModuleType):
    """A stand-in that records its calls; `failing` names the calls that go wrong, and how."""

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

    def log(self, values, step=None):
        self._do("log", step)

    def mark_preempting(self):
        self._do("mark_preempting")

    def finish(self, exit_code=None):
        self._do("finish", exit_code)


@pytest.fixture
def use(monkeypatch):
    """Puts a stand-in in wandb's place."""

    def use(module):
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setenv("WANDB_MODE", "offline")
        return module

    return use


def broken() -> None:
    raise ConnectionResetError("Connection lost")


def silent() -> None:
    threading.Event().wait()


def leaves() -> None:
    sys.exit(3)


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("how", [broken, silent, leaves])
def test_a_tracker_that_fails_is_one_warning(place, use, capsys, monkeypatch, call, how):
    """Wandb's helper process was killed, and ConnectionResetError ended the run before it was saved; finish
    hung, and nothing but SIGKILL helped."""
    monkeypatch.setattr(tracker, "TIMEOUTS", dict.fromkeys(tracker.TIMEOUTS, 0.3))
    module = use(Wandb({call: how}))
    folder = main(place, *SHORT, f"name=tracker-{call}-{how.__name__}")
    assert (folder / "checkpoint_1").is_dir()
    assert len(epochs(folder)) == 1
    assert capsys.readouterr().err.count("warning: wandb failed") == 1
    assert [name for name, *_ in module.calls].count(call) == 1


def test_a_missing_tracker_is_a_warning(place, use, capsys):
    """A traceback before the first step."""
    use(None)  # what makes `import wandb` fail
    assert len(epochs(main(place, *SHORT, "name=tracker-missing"))) == 1
    assert "warning: wandb failed (start: ModuleNotFoundError" in capsys.readouterr().err


def test_a_file_in_the_trackers_place_ends_nothing(place, monkeypatch):
    """With wandb itself."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = place / "runs" / "tracker-file"
    folder.mkdir(parents=True)
    (folder / "wandb").write_text("in the way")
    assert len(epochs(main(place, *SHORT, "name=tracker-file"))) == 1


def test_the_table_comes_before_the_tracker_and_one_signal_is_enough(place, use, capsys):
    """With `finish` hanging, SIGTERM did nothing, a second gave 143, and there was no table."""

    def hang() -> None:
        shown.append(capsys.readouterr().out)
        restarts.extend((place / "runs" / "tracker-signal").glob("checkpoint_*_step_*"))
        os.kill(os.getpid(), signal.SIGTERM)
        silent()

    shown, restarts = [], []
    use(Wandb({"finish": hang}))
    main(place, *SHORT, "name=tracker-signal")
    assert "validation, stage 0" in shown[0]
    assert not restarts
    assert "wandb failed (finish: a signal has come first)" in capsys.readouterr().err


def test_the_tracker_learns_the_exit_code(place, use, monkeypatch):
    """Runs that failed or were stopped were 'finished', with 0."""

    def ended(name: str) -> list:
        module = use(Wandb())
        config = Config.from_file(place / "run.yaml", [f"name={name}", "num_epochs=1", "max_new_tokens=2"])
        try:
            code = run_module.main(config)
        except RuntimeError:
            code = 1
        assert ("finish", code) in module.calls
        return [call for call in module.calls if call[0] not in ("init", "log")]

    assert ended("exit-0") == [("finish", 0)]
    original = run_module.train_step

    def failing(error):
        def step(run, *others):
            if run.progress.step == 2:
                error()
            return original(run, *others)

        monkeypatch.setattr(run_module, "train_step", step)

    def user_error():
        raise run_module.UserError("no")

    def runtime_error():
        raise RuntimeError("no")

    failing(user_error)
    assert ended("exit-2") == [("finish", 2)]
    failing(runtime_error)
    assert ended("exit-1") == [("finish", 1)]
    failing(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ended("exit-stopped") == [("mark_preempting",), ("finish", 0)]


def test_a_stopped_run_has_seconds_to_finish_its_log(place, use, monkeypatch, capsys):
    """Nothing was waited for, and every run that a signal had stopped warned that wandb had failed."""
    module = use(Wandb({"finish": lambda: time.sleep(0.5)}))
    original = run_module.train_step

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(run_module, "train_step", stopped)
    main(place, *SHORT, "name=tracker-stopped")
    assert "wandb failed" not in capsys.readouterr().err
    assert module.calls[-2:] == [("mark_preempting",), ("finish", 0)]


def test_an_interrupted_run_has_its_exit_code_too(use, tmp_path):
    module = use(Wandb())
    logger = RunLogger(tmp_path)
    logger.open({"project": "p", "name": "n", "debug": False, "wandb": "offline"})
    with pytest.raises(KeyboardInterrupt), logger:
        raise KeyboardInterrupt
    assert module.calls[-1] == ("finish", 130)


def test_what_fails_before_the_first_step_leaves_no_log_open(place, use, monkeypatch):
    """Such a run was 'finished' with 0, by wandb's own exit handler."""
    module = use(Wandb())
    monkeypatch.setattr("trainer.evaluate.warn_unscorable_answers", lambda *_: broken())
    with pytest.raises(ConnectionResetError):
        main(place, *SHORT, "name=tracker-early")
    assert not module.calls or module.calls[-1][0] == "finish"


def test_what_is_logged(place, use):
    module = use(Wandb())
    folder = main(place, *SHORT, "name=tracker-log")
    logged = [step for name, *step in module.calls if name == "log"]
    assert logged == [[1], [2], [3], [4], [4]]  # the steps, then the epoch
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5
    progress = json.loads((folder / "checkpoint_1" / "trainer" / "state.json").read_text())
    assert progress["wandb_id"] == "abc"


@pytest.fixture
def reason(monkeypatch, tmp_path):
    """`why_offline` where nobody is logged in, until a test changes that."""
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


def test_wandb_is_offline_where_nobody_is_logged_in(monkeypatch, tmp_path, reason):
    assert "nobody is logged in at https://" in reason()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert reason() is None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert "cannot be used: AuthenticationError" in reason()
    (tmp_path / ".netrc").write_bytes(b"\xff\xfe\x00")
    assert "cannot be used: UnicodeDecodeError" in reason()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert reason() is None


def test_wandb_reads_its_own_credentials(monkeypatch, tmp_path, reason):
    """Logged in, and offline without a word."""
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o644)
    assert reason() is None
    netrc.write_text(f"machine wandb.lab:8080 login user password {KEY}\n")
    assert "nobody is logged in" in reason()
    (tmp_path / "settings").write_text("[default]\nbase_url = http://wandb.lab:8080\n")  # wandb login --host
    assert reason() is None
    netrc.unlink()
    assert "nobody is logged in at http://wandb.lab:8080" in reason()
    (tmp_path / "token").write_text("a.b.c")
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    assert reason() is None


@pytest.mark.parametrize("offline", ["nobody is logged in", None])
def test_a_run_that_cannot_log_online_warns_once(tmp_path, use, monkeypatch, capsys, offline):
    """No curve, found a week later."""
    module = use(Wandb())
    monkeypatch.setattr(tracker, "why_offline", lambda: offline)
    monkeypatch.setenv("WANDB_MODE", "")  # as good as not set
    with RunLogger(tmp_path) as logger:
        logger.open({"project": "p", "name": "n", "debug": False, "wandb": "online"})
    assert module.calls[0] == ("init", "offline" if offline else "online")
    wanted = f"warning: wandb logs offline: {offline}\n" if offline else ""
    assert capsys.readouterr().err == wanted


def test_the_environment_decides_before_the_configuration(tmp_path, use, monkeypatch):
    module = use(Wandb())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with RunLogger(tmp_path) as logger:
        logger.open({"project": "p", "name": "n", "debug": False, "wandb": "online"})
    assert module.calls == []
