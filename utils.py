"""Small things that every room needs: errors, progress bars, the run logger, what is on disk.

tqdm is imported where it is needed: `--help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

# ---------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something a user can put right. `run.py` prints its text once, without a traceback, and exits with 2."""

    is_shared = False  # whether all ranks raise it

    @classmethod
    def of_all(cls, text: str) -> UserError:
        """One that every rank raises, with the same text."""
        error = cls(text)
        error.is_shared = True
        return error


def print_error(error: UserError) -> int:
    """Says what is wrong, on one rank; returns the exit code."""
    rank = launched_ranks()[0]
    if rank > 0:
        with suppress(ValueError):  # of a thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which slurm/launch.sh has the ranks ignore
        # torchrun stops a node's ranks when one of them exits: rank 0 must have had its say. Whoever is still there
        # then is alone with the error, or on another node, where one speaks before its neighbours too
        time.sleep(3 + int(os.environ.get("LOCAL_RANK", 0)))
        if error.is_shared:
            return 2
        error = UserError(f"{error} (rank {rank} on {socket.gethostname()})")
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def is_launched() -> bool:
    """Whether torchrun has started this process; some schedulers set a RANK of their own."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def launched_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) without it."""
    if not is_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ---------------------------------------------------------------------------------------------------------------
# Progress and the run logger
# ---------------------------------------------------------------------------------------------------------------


class ErrorTolerantStream:
    """A stream that nobody reads any more, or whose disk is full, ends nothing: what it cannot take is lost."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def progress_bar(iterable, title: str, unit: str, shown: bool):
    """tqdm, on one rank; in a log file it writes a line now and then instead of many a second."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, title, unit=unit, leave=False, disable=not shown, mininterval=interval, dynamic_ncols=True)


def print_result(text: str) -> None:
    """A result, on standard output. That nobody reads it, or that its disk is full, ends nothing."""
    with suppress(OSError):
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------


def why_unreadable(path: Path | str) -> str | None:
    """Why the system does not even say whether there is something under a path: a folder on the way may not be looked
    into, or a name is too long; None where it says. `Path.exists` raises there."""
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


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Makes a UserError of what a full or broken disk, or missing rights, make of writing a file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError where it is damaged."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: it is no object")
    return content


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(content) -> str:
    """As this program writes its JSON files."""
    return json.dumps(content, indent=1) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Writes a file, and its folder, so that there is never half of it: aside, and renamed. Raises UserError."""
    write_together({path: text})


def write_together(files: dict[Path, str]) -> None:
    """`write_whole` of several files: none of them appears before all are written. A link is written through, to where
    somebody wants the file to be."""
    # others may write the same file
    asides = {path: path if path.is_symlink() else path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, text in files.items():
            with writing(path):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                asides[path].write_text(text, encoding="utf-8")
        for path, aside in asides.items():
            with writing(path):
                aside.replace(path)
    finally:
        for path, aside in asides.items():
            with suppress(OSError):  # it has its name by now, or was never there
                if aside != path:
                    aside.unlink()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, for what is no text; the file has its own name when it is whole. Raises UserError."""
    aside = path.with_name(f".{os.getpid()}.{path.name}")  # its suffix says the format
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            aside.replace(path)
        finally:
            with suppress(OSError):
                aside.unlink()


def retried(action: Callable, seconds: float = 30):
    """The result of an action that looks for what another process has just written: where there are several nodes,
    their file system may show it only a while later."""
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def sync_to_disk(path: Path, deep: bool = True) -> None:
    """Waits until a folder, and what is in it, would survive a power cut."""
    for part in [*path.rglob("*"), path] if deep else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# what a folder with a model holds that this program writes, an exported one too
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
    *("modeling_coconut.py", "__pycache__", "README.md", "config.yaml"),
)


@contextmanager
def whole_folder(target: Path, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to fill, which gets the name `target` when it is full: a kill leaves nothing half under that name.

    Raises UserError where it cannot be written, and where target holds something else than is to be replaced: files of
    these names, which may be patterns.
    """
    target = target.resolve()  # '.' has no name
    aside, old = (target.with_name(f".{what}-{target.name}") for what in ("writing", "replaced"))
    with writing(target):
        if old.exists() and not target.exists():
            old.rename(target)  # a kill came between the two names below
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is there already, and is no folder")
        there = sorted(path.name for path in target.iterdir()) if target.exists() else []
        if strangers := [name for name in there if not any(fnmatch(name, pattern) for pattern in replaces)]:
            raise UserError(f"{target} is there already, and nothing of it is overwritten: it holds {strangers[0]}")
        for path in (aside, old):
            shutil.rmtree(path, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            sync_to_disk(aside)
            if target.exists():
                target.rename(old)
            aside.rename(target)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, SafetensorError):  # what it makes of an OSError
                raise OSError(error) from error
            raise
        sync_to_disk(target.parent, deep=False)
        shutil.rmtree(old, ignore_errors=True)
