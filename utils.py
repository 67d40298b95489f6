"""What every module may need: errors and messages, seeds, progress bars, JSON, files that appear whole or not at all.

tqdm and torch are imported where they are needed: `--help` and every error in a configuration come at once.
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


class UserError(ValueError):
    """Something a user can put right. `run.py` prints its text once, without a traceback, and exits with 2."""

    is_shared = False  # whether all ranks raise it

    @classmethod
    def of_all(cls, text: str) -> UserError:
        """One that every rank raises, with the same text."""
        error = cls(text)
        error.is_shared = True
        return error


def launched_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) without it: some schedulers set a RANK of their own."""
    is_launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if is_launched else (0, 1)


class _AboveProgressBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with suppress(OSError):  # nobody reads standard error any more, or its disk is full: no reason to end
            tqdm.write(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage(), sys.stderr)


log = logging.getLogger("coconut")  # on standard error, by rank 0
log.setLevel(logging.INFO)
log.propagate = False
log.addHandler(_AboveProgressBars())
log.addFilter(lambda _: launched_ranks()[0] == 0)


def print_result(text: str) -> None:
    """Prints a result; nothing where standard output is closed (`| head`). Raises UserError where its disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would write it again at its exit
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output cannot be written: {error.strerror}") from None


def print_error(error: UserError) -> int:
    """Prints what is wrong, on one rank; returns the exit code."""
    rank = launched_ranks()[0]
    if rank > 0:
        with suppress(ValueError):  # in a thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which slurm/launch.sh has the ranks ignore
        # torchrun stops a node's ranks when one of them exits: rank 0 prints first. A rank that is still there after
        # that is alone with the error, or on another node, where the ranks take turns too
        time.sleep(3 + int(os.environ.get("LOCAL_RANK", 0)))
        if error.is_shared:
            return 2
        error = UserError(f"{error} (rank {rank} on {socket.gethostname()})")
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def progress_bar(iterable, title: str, unit: str, shown: bool):
    """tqdm, on one rank; in a log file it writes a line now and then instead of many a second."""
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
    """Whether a debugger watches this process, or has started it (python -m pdb, IPython's %run -d)."""
    monitoring = getattr(sys, "monitoring", None)  # what debuggers use from Python 3.12 on
    if sys.gettrace() is not None or (monitoring and monitoring.get_tool(monitoring.DEBUGGER_ID)):
        return True
    return any(frame.f_globals.get("__name__") == "bdb" for frame, _ in traceback.walk_stack(None))


def parse_json(text: str):
    """`json.loads`, whose only error is ValueError: a bracket repeated often enough is a RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError where it is damaged."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: it is no object")
    return content


def as_json(content) -> str:
    """As this program writes its JSON files."""
    return json.dumps(content, indent=1) + "\n"
