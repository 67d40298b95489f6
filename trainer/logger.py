"""A run's two logs: metrics.jsonl and wandb.

Failures of wandb, its server or its helper process must not end a training, delay it or change its exit code. Each call
runs in its own thread with a timeout; the first failure logs one warning and ends all logging to wandb.
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

TIMEOUTS = {"start": 90, "log": 20, "finish": 120, "signal": 5}  # seconds; "signal": for finish, after a signal


class RunLogger:
    """Writes metrics.jsonl in a folder and, unless it is disabled, logs to wandb, on rank 0. A context: however it
    ends, it closes the logs and tells wandb the program's exit code."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.time()
        self.file = None
        self.tracked = None  # wandb's run; None if wandb is disabled or has failed
        self.interrupted = False  # whether a signal has stopped the run, which another job will continue
        self.signalled: Callable[[], float | None] = lambda: None  # when a signal arrived (time.monotonic)

    def open(self, config: dict, wandb_id: str | None = None) -> str | None:
        """Opens the logs of a run with this configuration, on rank 0; returns its wandb id. wandb_id: of the run to
        continue, whose curves go on. Raises UserError if the folder cannot be written to."""
        path = self.folder / "metrics.jsonl"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            if config["debug"]:  # it continues from no checkpoint: an earlier run's epochs are no part of it
                path.unlink(missing_ok=True)
            torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
            self.file = path.open("a", encoding="utf-8", buffering=1)
            if torn:
                self.file.write("\n")  # ends the half line of a job that died
        mode = "disabled" if config["debug"] else os.environ.get("WANDB_MODE") or config["wandb"]
        if mode != "disabled":
            self.tracked = self._call("start", lambda: _start_wandb(mode, config, self.folder, wandb_id))
        return wandb_id if self.tracked is None else self.tracked.id

    def log(self, event: str, **values) -> None:
        """Writes one line of metrics.jsonl: {"event", "time" (seconds since the run started), ...values}, and logs its
        numbers to wandb. Raises UserError, on rank 0 only, if the line cannot be written."""
        if self.file is None:
            return
        record = {"event": event, "time": round(time.time() - self.started, 3), **values}
        with writing(self.file.name):
            self.file.write(json.dumps(record) + "\n")
        if (run := self.tracked) is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            shown = {k if k == "step" else f"{event}/{k}": v for k, v in numbers.items()}
            self._call("log", lambda: run.log(shown))

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self.file is not None:
            with suppress(OSError):  # a full disk: `log` has raised already
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
        """Returns the result of an action run in a thread; warns and returns None if it fails or times out."""
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
            problem = "interrupted by a signal" if signalled() else f"no answer within {TIMEOUTS[what]} seconds"
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
    # send only the configuration and the numbers: no code, no console output, no machine metadata
    settings = {"init_timeout": 30, "silent": True, "console": "off", "save_code": False, "x_disable_meta": True}
    if mode == "offline":
        settings["identity_token_file"] = None
    options = {"project": config["project"], "name": config["name"], "config": config, "dir": str(folder)}
    options |= {"id": run_id, "resume": "allow" if run_id else None}
    try:
        run = wandb.init(mode=mode, settings=wandb.Settings(**settings), **options)
    except Exception as error:
        if mode == "offline":
            raise
        log.warning(f"wandb logs offline: {_one_line(error)}")
        run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **options)
    # "step" is a value: wandb's own step never goes back, and it would drop what a restarted run repeats
    for event in ("step", "epoch"):
        run.define_metric(f"{event}/*", step_metric="step")
    return run


def _ignore_its_exit_handlers() -> None:
    """Silences wandb's own exit handler, which also fails once its helper process has died."""
    before = sys.unraisablehook

    def hook(failed) -> None:
        if not (getattr(failed.object, "__module__", None) or "").startswith("wandb"):
            before(failed)

    sys.unraisablehook = hook


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def why_offline() -> str | None:
    """Returns why wandb cannot log online, None if it can, by wandb's own reading of environment, netrc and settings.
    Without credentials wandb.init would wait for input."""
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.wbauth import authenticate_session

    settings = wandb_setup.singleton().settings
    host = settings.base_url
    try:
        if settings.identity_token_file:  # wandb's helper process would crash on an unreadable one
            Path(settings.identity_token_file).read_bytes()
        found = authenticate_session(host=host, source="run.py", prompt=False, update_session=False)
    except (AuthenticationError, OSError, ValueError) as error:
        return f"the credentials for {host} cannot be used: {_one_line(error)}"
    return None if found else f"nobody is logged in at {host}; `wandb login` does that"


def read_log(path: Path) -> list[dict]:
    """Reads the records of a metrics.jsonl, none if the file does not exist; skips partial lines of jobs that died and
    lines that are no records. Raises UserError."""
    if reason := why_unreadable(path):
        raise UserError(f"cannot read {path}: {reason}")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            records.append(parse_json(line))
    return [record for record in records if isinstance(record, dict) and "event" in record]


def latest(records: list[dict], event: str) -> dict[int, dict]:
    """Returns number -> record of the events of a kind, "epoch" or "step", in ascending order. A restarted run repeats
    those that it lost: a record replaces all earlier ones with its number or a higher one."""
    found: dict[int, dict] = {}
    for record in reversed([record for record in records if record["event"] == event]):
        if not found or record[event] < next(reversed(found)):
            found[record[event]] = record
    return dict(reversed(found.items()))
