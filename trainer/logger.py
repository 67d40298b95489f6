"""metrics.jsonl and wandb, a run's two logs.

Whatever wandb, its server or its helper process does, it must not end a training, delay it or change its exit code.
Every call is made in a thread of its own, with a timeout; after the first failure there is one warning, and nothing
more is sent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

from trainer.files import why_unreadable, writing
from utils import UserError, log, parse_json

TIMEOUTS = {"start": 90, "log": 20, "finish": 120, "signal": 5}  # seconds; the last is what a signal leaves for finish


class RunLogger:
    """metrics.jsonl always, wandb where it is wanted, in a folder, on rank 0. A context: at its end, whatever causes
    it, the log is closed with the exit code that the program will have."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.time()
        self.file = None
        self.tracked = None  # wandb's run; None where it is disabled, and after a failure
        self.interrupted = False  # whether a signal has stopped the run, and another job will continue it
        self.signalled: Callable[[], float | None] = lambda: None  # when a signal has come (time.monotonic)

    def open(self, config: dict, wandb_id: str | None = None) -> str | None:
        """Opens the log of a run with this configuration; returns the id that wandb gives it. Called on rank 0 only.
        wandb_id: of the run that is being continued, so that its curves go on. Raises UserError where the folder cannot
        be written to."""
        path = self.folder / "metrics.jsonl"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
            self.file = path.open("a", encoding="utf-8", buffering=1)
            if torn:
                self.file.write("\n")  # a job that died has left half a line
        mode = "disabled" if config["debug"] else os.environ.get("WANDB_MODE") or config["wandb"]
        if mode != "disabled":
            self.tracked = self._call("start", lambda: _start_wandb(mode, config, self.folder, wandb_id))
        return wandb_id if self.tracked is None else self.tracked.id

    def log(self, event: str, **values) -> None:
        """One line of metrics.jsonl: {"event", "time" (seconds since the run started), ...values}. Raises UserError, on
        rank 0 only, where it cannot be written."""
        if self.file is None:
            return
        record = {"event": event, "time": round(time.time() - self.started, 3), **values}
        with writing(self.file.name):
            self.file.write(json.dumps(record) + "\n")
        if (run := self.tracked) is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
            shown = {f"{event}/{k}": v for k, v in numbers.items()}
            self._call("log", lambda: run.log(shown, step=values.get("step")))

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self.file is not None:
            with suppress(OSError):  # a full disk: there was an error already
                self.file.close()
        code = 0 if kind is None else 2 if issubclass(kind, UserError) else 1
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            code = 128 + signal.SIGINT
        if (run := self.tracked) is None:
            return

        def finish() -> None:
            if self.interrupted:
                run.mark_preempting()
            run.finish(exit_code=code)

        self._call("finish", finish, self.signalled)

    def _call(self, what: str, action: Callable, signalled: Callable[[], float | None] = lambda: None):
        """The result of an action in a thread; None, after a warning, where it fails or times out."""
        done: Future = Future()

        def work() -> None:
            try:
                done.set_result(action())
            except BaseException as error:  # wandb also calls sys.exit
                done.set_exception(error)

        threading.Thread(target=work, name="tracker", daemon=True).start()
        begin, left = time.monotonic(), TIMEOUTS[what]
        while not done.done() and left > 0:
            wait([done], timeout=min(left, 0.1))
            left = begin + TIMEOUTS[what] - time.monotonic()
            if (moment := signalled()) is not None:
                left = min(left, max(begin, moment) + TIMEOUTS["signal"] - time.monotonic())
        if not done.done():
            problem = "a signal has come first" if signalled() else f"no answer within {TIMEOUTS[what]} seconds"
        elif (error := done.exception()) is not None:
            problem = _one_line(error)
        else:
            return done.result()
        self.tracked = None
        _ignore_its_exit_handlers()
        log.warning(f"wandb failed ({what}: {problem}); the run goes on without it, metrics.jsonl has everything")
        return None


def _start_wandb(mode: str, config: dict, folder: Path, run_id: str | None):
    import wandb

    if mode == "online" and (reason := why_offline()):
        log.warning(f"wandb logs offline: {reason}")
        mode = "offline"
    # the configuration and the numbers are all that is sent: no code, no console, no machine metadata
    settings = {"init_timeout": 30, "silent": True, "console": "off", "save_code": False, "x_disable_meta": True}
    options = {"project": config["project"], "name": config["name"], "config": config, "dir": str(folder)}
    options |= {"id": run_id, "resume": "allow" if run_id else None}
    try:
        return wandb.init(mode=mode, settings=wandb.Settings(**settings), **options)
    except Exception as error:
        if mode == "offline":
            raise
        log.warning(f"wandb logs offline: {_one_line(error)}")
        return wandb.init(mode="offline", settings=wandb.Settings(**settings), **options)


def _ignore_its_exit_handlers() -> None:
    """wandb's own exit handler fails too once its helper process is gone; there was a warning."""
    before = sys.unraisablehook

    def hook(failed) -> None:
        if not (getattr(failed.object, "__module__", None) or "").startswith("wandb"):
            before(failed)

    sys.unraisablehook = hook


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def why_offline() -> str | None:
    """Why wandb cannot log online, by its own reading of environment, netrc and settings; None where it can. Without
    credentials wandb.init would wait for someone to type them."""
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.wbauth import authenticate_session

    host = wandb_setup.singleton().settings.base_url
    try:
        found = authenticate_session(host=host, source="run.py", prompt=False, update_session=False)
    except (AuthenticationError, OSError, ValueError) as error:
        return f"the credentials for {host} cannot be used: {_one_line(error)}"
    return None if found else f"nobody is logged in at {host}; `wandb login` does that"


def read_log(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, none where there is no such file; lines that a job left half-written, and others
    that are no record, are skipped. Raises UserError."""
    if reason := why_unreadable(path):
        raise UserError(f"cannot read {path}: {reason}")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            records.append(parse_json(line))
    return [record for record in records if isinstance(record, dict) and "event" in record]
