"""What every module may need: errors and messages, seeds, progress bars, JSON, files that appear whole or not at all.

tqdm and torch are imported where they are needed: `--help` and every error in a configuration come at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from safetensors import SafetensorError


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
    import torch

    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def why_unreadable(path: Path | str) -> str | None:
    """Why the system does not even answer whether a path exists, where `Path.exists` raises: a folder on the way may
    not be entered, or a name is too long. None where it answers."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def retried(action: Callable, seconds: float = 30):
    """The result of an action that reads what another process has just written: the file system of several nodes may
    show it only a while later."""
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises UserError for what a full or broken disk, or missing rights, make of writing a file or a folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def replaced(path: Path, overwrites: tuple[str, ...] | None = None) -> Iterator[Path]:
    """A path to write to: a file, or a folder, which is there already and empty. It gets the name `path` when it is
    whole and on the disk; a kill, or an exception, leaves nothing half-written under that name.

    overwrites: None for a file. Of a folder, the names, or their patterns, that an existing one may hold.
    Raises UserError where it cannot be written, and where the folder holds anything else.
    """
    target = path.resolve()  # a link is written through, and '.' has no name
    with writing(path):
        if overwrites is None:
            aside, old = target.with_name(f".{os.getpid()}.{target.name}"), None  # its suffix is the format
            if target.exists() and not target.is_file():
                aside = target  # a device; a folder is an error
            target.parent.mkdir(parents=True, exist_ok=True)
        else:
            aside, old = (target.with_name(f".{what}-{target.name}") for what in ("writing", "replaced"))
            if old.exists() and not target.exists():
                old.rename(target)  # a kill came between the two renames below
            if target.exists() and not target.is_dir():
                raise UserError(f"{path} is there already, and is no folder")
            there = sorted(part.name for part in target.iterdir()) if target.exists() else []
            if others := [name for name in there if not any(fnmatch(name, pattern) for pattern in overwrites)]:
                raise UserError(f"{path} is there already, and nothing of it is overwritten: it holds {others[0]}")
            for leftover in (aside, old):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir(parents=True)
        try:
            yield aside
            if aside != target:
                sync_to_disk(aside)
                if old is not None and target.exists():
                    target.rename(old)
                aside.rename(target)
                sync_to_disk(target.parent, deep=False)
        finally:
            if old is not None:
                shutil.rmtree(aside, ignore_errors=True)
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
            elif aside != target:
                aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file through `replaced`. Raises UserError."""
    with replaced(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path, deep: bool = True) -> None:
    """Waits until a file or folder, and what is in it, would survive a power cut. Files in a folder get the mode of the
    umask, which some libraries keep from others. Some file systems refuse to sync folders."""
    parts = [*path.rglob("*")] if deep and path.is_dir() else []
    mode = path.stat().st_mode & 0o666
    for part in [*parts, path]:
        is_folder = part.is_dir()
        if part != path and not is_folder:
            part.chmod(mode)
        try:
            handle = os.open(part, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if not (is_folder and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)):
                raise
