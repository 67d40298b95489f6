"""Atomic writes of files and folders, and errors of disks and file systems as UserError."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from utils import UserError


def why_unreadable(path: Path | str) -> str | None:
    """Returns the reason why `Path.exists` would raise, such as a parent folder without permission or a name that is
    too long; None if it would not."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Returns the free space of the disk that holds a folder, which may not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def reason_of(error: BaseException) -> str:
    """Returns the first line of an exception's message, with the next one if it announces that."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join([first, *(line.strip() for line in others[:1] if first.rstrip().endswith(":"))])


def read_weights(path: Path, own: dict, what: str) -> dict:
    """Reads the tensors of a safetensors file, by name. Raises UserError if it cannot be read, or if names or shapes
    differ from `own`, the weights of `what`."""
    from safetensors.torch import load_file  # imports torch

    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
    check_weights(path, own, saved, what)
    return saved


def check_weights(source, own: dict, saved: dict, what: str = "model") -> None:
    """Raises UserError if the names or shapes of `saved` differ from those of `own`."""
    mismatched = [
        f"{name} {list(saved[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    check_names(source, own.keys() - saved.keys(), saved.keys() - own.keys(), mismatched, what)


def check_names(source, missing, unexpected, mismatched=(), what: str = "model") -> None:
    """Raises UserError if any of the lists holds names; the message shows the first four of each."""
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names:
            names = sorted(names)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{title}: {', '.join(names[:4])}{more}")
    if problems:
        raise UserError(f"{source} does not fit the {what}: weights {'; '.join(problems)}")


def retried(action: Callable, seconds: float = 30):
    """Returns the result of an action that reads what another process has just written; retries while the file is not
    found, because network file systems may show it late."""
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def reading() -> Iterator[None]:
    """Raises UserError for a file or folder without read permission. Also a decorator."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


@contextmanager
def parsing(what: object, *others: type[Exception]) -> Iterator[None]:
    """Raises UserError, which says that `what` is damaged, for what damaged records may raise, and for `others`."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, *others) as error:
        raise UserError(f"{what} is damaged: {error!r}") from None


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises UserError for a full or broken disk or missing permissions while writing a file or folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def replaced(path: Path, overwrites: tuple[str, ...] | None = None) -> Iterator[Path]:
    """Yields a path to write to: a file, or an existing empty folder. On success it is synced to the disk and renamed
    to `path`; a kill or an exception leaves nothing partial under that name.

    overwrites: None for a file; for a folder, the names or patterns that an existing one may contain.
    Raises UserError if the path cannot be written, or if the folder contains anything else.
    """
    target = path.resolve()  # writes through a link; '.' has no name
    with writing(path):
        if overwrites is None:
            aside, old = target.with_name(f".{os.getpid()}.{target.name}"), None  # keeps the suffix: it sets the format
            if target.exists() and not target.is_file():
                aside = target  # a device; a folder is an error
            target.parent.mkdir(parents=True, exist_ok=True)
        else:
            aside = target.with_name(f".writing-{target.name}.{os.getpid()}")  # two processes may make the same folder
            old = target.with_name(f".replaced-{target.name}")
            if old.exists() and not target.exists():
                old.rename(target)  # a kill between the two renames below
            if target.exists() and not target.is_dir():
                raise UserError(f"{path} exists and is not a folder")
            there = sorted(part.name for part in target.iterdir()) if target.exists() else []
            if others := [name for name in there if not any(fnmatch(name, pattern) for pattern in overwrites)]:
                raise UserError(f"{path} exists and is not overwritten, because it contains {others[0]}")
            for leftover in (old, aside, *_abandoned(target)):
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


def _abandoned(target: Path) -> Iterator[Path]:
    """Yields the folders that ended processes were writing, to become `target`."""
    for path in target.parent.glob(".writing-*.*"):
        pid = path.suffix[1:]
        if path.stem == f".writing-{target.name}" and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                yield path
            except PermissionError:
                continue  # another user's


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically (`replaced`). Raises UserError."""
    with replaced(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path, deep: bool = True) -> None:
    """Syncs a file, or a folder with its content, to the disk, so that it survives a power cut. Gives files in a folder
    the mode of the umask, because safetensors makes them 0600. Ignores file systems that cannot sync folders."""
    parts = [*path.rglob("*")] if deep and path.is_dir() else []
    mode = path.stat().st_mode & 0o666
    for part in [*parts, path]:
        is_folder = part.is_dir()
        if part != path and not is_folder:
            with suppress(OSError):  # a file system without modes
                part.chmod(mode)
        try:
            handle = os.open(part, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if not is_folder or error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
