"""Shared by all modules: errors and messages, seeds, progress bars, JSON.

tqdm and torch are imported where they are used, so that `--help` and configuration errors appear at once.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # torchrun sets all, a scheduler or a shell only some


class UserError(ValueError):
    """An error that the user can fix. `run.py` prints its message once, without a traceback, and exits with code 2."""

    is_shared = False  # True if every rank raises it

    @classmethod
    def of_all(cls, text: str) -> UserError:
        """Returns an error that every rank raises with the same message."""
        error = cls(text)
        error.is_shared = True
        return error


def launched_ranks() -> tuple[int, int]:
    """Returns (rank, world size) as set by torchrun, or a launcher like it; (0, 1) without one."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if LAUNCHED.issubset(os.environ) else (0, 1)


class _AboveProgressBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with suppress(OSError):  # a closed pipe or a full disk behind standard error must not end the training
            tqdm.write(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage(), sys.stderr)


log = logging.getLogger("coconut")  # rank 0 writes to standard error, the other ranks write nothing
log.setLevel(logging.INFO)
log.propagate = False
log.addHandler(_AboveProgressBars())
log.addFilter(lambda _: launched_ranks()[0] == 0)


def print_result(text: str) -> None:
    """Prints to standard output. Ignores a closed pipe (`| head`); raises UserError if the disk is full."""
    with suppress(AttributeError):  # closed, or no file
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may not be UTF-8
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes, and fails, again at exit
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output cannot be written: {error.strerror}") from None


def print_error(error: UserError, seconds: float = 5) -> int:
    """Prints an error to standard error, once if all ranks raise it within `seconds`; returns the exit code 2."""
    rank, n_ranks = launched_ranks()
    if rank > 0:
        with suppress(ValueError):  # raised outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ranks started by slurm/launch.sh ignore SIGTERM
        # rank 0 prints first: torchrun ends a node's ranks when one exits. A rank that is still alive after this sleep
        # raised the error alone, or is on another node, where the ranks print in turn
        time.sleep(seconds + int(os.environ.get("LOCAL_RANK", 0)))
        if error.is_shared:
            return 2
        error = UserError(f"{error} (rank {rank} on {socket.gethostname()})")
    print(f"error: {error}", file=sys.stderr, flush=True)
    time.sleep(2 if rank == 0 < n_ranks - 1 else 0)  # ranks that start later must not miss torchrun's SIGTERM
    return 2


def progress_bar(iterable, title: str, unit: str, shown: bool):
    """Wraps an iterable in a tqdm bar, hidden unless `shown`; in a log file it updates every 30 seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, title, unit=unit, leave=False, disable=not shown, mininterval=interval, dynamic_ncols=True)


def seed_everything(*entropy: int) -> None:
    """Seeds python, numpy and torch (CPU and GPU) from the given numbers, such as (seed, rank)."""
    import numpy as np
    import torch

    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def under_debugger() -> bool:
    """Returns whether a debugger watches this process or started it (python -m pdb, IPython's %run -d)."""
    monitoring = getattr(sys, "monitoring", None)  # what debuggers use from Python 3.12 on
    traced = sys.gettrace() or (monitoring and monitoring.get_tool(monitoring.DEBUGGER_ID))
    return bool(traced) or any(frame.f_globals.get("__name__") == "bdb" for frame, _ in traceback.walk_stack(None))


def parse_json(text: str, **options):
    """Parses JSON. Raises ValueError for any mistake: `json.loads` raises RecursionError for deeply nested brackets."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict:
    """Reads a JSON object from a file. Raises UserError if the file is missing or damaged."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return content


def as_json(content) -> str:
    """Returns the text of a JSON file in this program's format."""
    return json.dumps(content, indent=1) + "\n"
