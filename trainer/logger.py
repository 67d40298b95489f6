"""The one place that speaks to wandb: start, log, finish.

Whatever a tracker, its server or its helper process does, it must not end a training, hold it up or change what it
says. Every call is made in a thread of its own and waited for so long at most; after the first thing that goes wrong
there is one warning and nothing more is sent.
"""

from __future__ import annotations

import json
import netrc
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

from utils import UserError, parse_json, why_unreadable, writing

LIMITS = {"start": 90, "log": 20, "finish": 120, "hurry": 5}  # seconds


class Tracker:
    """A run of wandb, or nothing: where `mode` is disabled, or after something has gone wrong.

    Args:
        warn: says a line to the person who watches.
    """

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.run = None
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, mode: str, config: dict, folder: Path, run_id: str | None) -> str | None:
        """Begins a run, or goes on with that of an id; returns its id, where there is one."""
        if mode == "disabled":
            return run_id
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()
        self.run = self._call("start", lambda: self._start(mode, config, folder, run_id))
        return self.run.id if self.run is not None else run_id

    def _start(self, mode: str, config: dict, folder: Path, run_id: str | None):
        import wandb

        # the configuration and the numbers are all that is sent: no code, no console, no machine metadata
        settings = {"init_timeout": 30, "silent": True, "console": "off", "save_code": False, "x_disable_meta": True}
        arguments = {
            "project": config["project"],
            "name": config["name"],
            "config": config,
            "dir": str(folder),
            "id": run_id,
            "resume": "allow" if run_id else None,
        }
        try:
            return wandb.init(mode=mode, settings=wandb.Settings(**settings), **arguments)
        except Exception as error:
            if mode == "offline":
                raise
            self.warn(f"wandb did not start, logging offline: {_one_line(error)}")
            return wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)

    def log(self, values: dict, step: int | None) -> None:
        if self.run is not None:
            run = self.run
            self._call("log", lambda: run.log(values, step=step))

    def finish(self, exit_code: int, interrupted: bool, hurry: Callable[[], bool]) -> None:
        """Ends the run with the program's exit code; `interrupted` where a signal has stopped it and another job goes
        on. Once `hurry` says so, there are only seconds for it."""
        if self.run is None:
            return
        run = self.run

        def finish() -> None:
            if interrupted:
                run.mark_preempting()
            run.finish(exit_code=exit_code)

        self._call("finish", finish, hurry)
        self.run = None

    def _call(self, what: str, action: Callable, hurry: Callable[[], bool] = lambda: False):
        """The result of an action, made in the tracker's thread; None, a warning and silence where there is none."""
        done: Future = Future()
        self._calls.put((action, done))
        end = time.monotonic() + LIMITS[what]
        hurried = False
        while not done.done() and time.monotonic() < end:
            if not hurried and hurry():
                hurried, end = True, min(end, time.monotonic() + LIMITS["hurry"])
            wait([done], timeout=0.1)
        if not done.done():
            problem = "a signal has come first" if hurried else f"no answer within {LIMITS[what]} seconds"
        elif (error := done.exception()) is not None:
            problem = _one_line(error)
        else:
            return done.result()
        self.run = None
        _ignore_its_exit_handlers()
        self.warn(
            f"warning: wandb failed ({what}: {problem}); the run goes on without it, metrics.jsonl has everything"
        )
        return None

    def _work(self) -> None:
        while True:
            action, done = self._calls.get()
            try:
                done.set_result(action())
            except BaseException as error:  # wandb also calls sys.exit
                done.set_exception(error)


def _ignore_its_exit_handlers() -> None:
    """wandb's own exit handler fails like all else once its helper process is gone: of that there was a warning."""
    before = sys.unraisablehook

    def hook(failed) -> None:
        if not (getattr(failed.object, "__module__", None) or "").startswith("wandb"):
            before(failed)

    sys.unraisablehook = hook


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def wandb_mode(wanted: str) -> str:
    """online | offline | disabled: what is wanted, but never a login prompt."""
    mode = os.environ.get("WANDB_MODE") or wanted
    if mode != "online" or os.environ.get("WANDB_API_KEY"):
        return mode
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return "offline"


class RunLogger:
    """metrics.jsonl always, wandb where it is wanted; silent on every rank but 0. A context: at its end, whatever
    brings it about, the log is closed with the exit code that the program will have.

    Args:
        folder: where metrics.jsonl and wandb/ go.
        is_main: whether this is rank 0.
    """

    def __init__(self, folder: Path, is_main: bool):
        self.folder, self.is_main = folder, is_main
        self.started = time.time()
        self.file = None
        self.tracker = Tracker(self.say)
        self.interrupted = False  # whether a signal has stopped the run
        self.hurry: Callable[[], bool] = lambda: False  # whether nothing may be waited for any more

    def open(self, config: dict, wandb_id: str | None = None) -> str | None:
        """Opens the log of a run with this configuration, on rank 0; returns the id that wandb gives it.

        wandb_id: of the run that is being continued, so that its curves go on.
        Raises UserError where the folder cannot be written to.
        """
        path = self.folder / "metrics.jsonl"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
            self.file = path.open("a", encoding="utf-8", buffering=1)
            if torn:
                self.file.write("\n")  # a job that died has left half a line
        mode = "disabled" if config["debug"] else wandb_mode(config["wandb"])
        return self.tracker.start(mode, config, self.folder, wandb_id)

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bars."""
        if self.is_main:
            from tqdm import tqdm

            with suppress(OSError):  # a log on a full disk
                tqdm.write(text, file=sys.stderr)

    def log(self, event: str, **values) -> None:
        """One line of metrics.jsonl: {"event", "time" (seconds since the run started), ...values}.

        Raises UserError, on rank 0 only, where it cannot be written.
        """
        if self.file is None:
            return
        record = {"event": event, "time": round(time.time() - self.started, 3), **values}
        with writing(self.file.name):
            self.file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        self.tracker.log({f"{event}/{k}": v for k, v in numbers.items()}, step=values.get("step"))

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self.file is not None:
            with suppress(OSError):  # of what a full disk has kept from being written there was a complaint already
                self.file.close()
        code = 0 if kind is None else 2 if issubclass(kind, UserError) else 1
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            code = 128 + signal.SIGINT
        self.tracker.finish(code, self.interrupted, self.hurry)


def read_log(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, none where there is no such file; lines that a job left half written are passed
    over, and what is no record. Raises UserError."""
    if reason := why_unreadable(path):
        raise UserError(f"cannot read {path}: {reason}")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            records.append(parse_json(line))
    return [record for record in records if isinstance(record, dict) and "event" in record]
