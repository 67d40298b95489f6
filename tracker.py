"""The one place that speaks to wandb: start, log, finish.

Whatever a tracker, its server or its helper process does, it must not end a training, hold it up or change what it
says. Every call is made in a thread of its own and waited for so long at most; after the first thing that goes wrong
there is one warning and nothing more is sent.
"""

from __future__ import annotations

import netrc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

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
