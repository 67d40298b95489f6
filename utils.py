"""Small things that every room needs: errors, progress bars, the run logger, what is on disk.

wandb and tqdm are imported where they are needed: `--help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

import json
import netrc
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

# ---------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something a user can put right. `run.py` prints its text once, without a traceback, and exits with 2."""

    is_shared = False  # whether all ranks raise it


def report(error: UserError) -> int:
    """Says what is wrong, on one rank; returns the exit code."""
    rank = launched_ranks()[0]
    if rank > 0:
        # torchrun stops a node's ranks when one of them exits: rank 0 must have had its say. Whoever is still there
        # then is alone with the error, or on another node, where one speaks before its neighbours too
        time.sleep(3 + int(os.environ.get("LOCAL_RANK", 0)))
        if error.is_shared:
            return 2
        error = UserError(f"{error} (rank {rank} on {socket.gethostname()})")
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def launched_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ---------------------------------------------------------------------------------------------------------------
# Progress and the run logger
# ---------------------------------------------------------------------------------------------------------------


def progress_bar(iterable, title: str, unit: str, shown: bool):
    """tqdm, on one rank; in a log file it writes a line now and then instead of many a second."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, title, unit=unit, leave=False, disable=not shown, mininterval=interval, dynamic_ncols=True)


class RunLogger:
    """metrics.jsonl always, wandb where it is wanted; silent on every rank but 0.

    Args:
        config: the run's configuration, all keys with their values.
        folder: where metrics.jsonl and wandb/ go; made if it is not there.
        is_main: whether this is rank 0.
        wandb_id: of the run that is being continued, so that its curves go on.
    """

    def __init__(self, config: dict, folder: Path, is_main: bool, wandb_id: str | None = None):
        self.is_main = is_main
        self.wandb = None
        self.wandb_id = wandb_id
        self.started = time.time()
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self.file.write("\n")  # a job that died has left half a line
        mode = "disabled" if config["debug"] else wandb_mode(config["wandb"])
        if mode != "disabled":
            self._start_wandb(config, folder, mode)

    def _start_wandb(self, config: dict, folder: Path, mode: str) -> None:
        import wandb

        # the configuration and the numbers are all that is sent: no code, no console, no machine metadata
        settings = {"init_timeout": 30, "silent": True, "console": "off", "save_code": False, "x_disable_meta": True}
        arguments = {
            "project": config["project"],
            "name": config["name"],
            "config": config,
            "dir": str(folder),
            "id": self.wandb_id,
            "resume": "allow" if self.wandb_id else None,
        }
        try:
            self.wandb = wandb.init(mode=mode, settings=wandb.Settings(**settings), **arguments)
        except Exception as error:  # whatever a tracker's server does, training goes on
            self.say(f"wandb did not start, logging offline: {' '.join(str(error).split())[:200]}")
            self.wandb = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
        self.wandb_id = self.wandb.id

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bars."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def log(self, event: str, **values) -> None:
        """One line of metrics.jsonl: {"event", "time" (seconds since the run started), ...values}."""
        if not self.is_main:
            return
        record = {"event": event, "time": round(time.time() - self.started, 3), **values}
        try:
            self.file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.file.name} cannot be written: {error.strerror}") from None
        if self.wandb is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
            self.wandb.log({f"{event}/{k}": v for k, v in numbers.items()}, step=values.get("step"))

    def close(self) -> None:
        if self.is_main:
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def wandb_mode(wanted: str) -> str:
    """online | offline | disabled: what is wanted, but never a login prompt."""
    mode = os.environ.get("WANDB_MODE", wanted)
    if mode != "online" or os.environ.get("WANDB_API_KEY"):
        return mode
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def read_log(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; lines that a job left half written are passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


# ---------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------


def sync_to_disk(path: Path, deep: bool = True) -> None:
    """Waits until a folder, and what is in it, would survive a power cut."""
    for part in [*path.rglob("*"), path] if deep else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_config(values: dict, folder: Path, world_size: int) -> None:
    """Writes a resolved configuration, the commit and the library versions to folder/config.yaml.

    The file is itself a configuration: `python run.py FOLDER/config.yaml` repeats the run.
    """
    comments = [f"git commit: {_git_commit()}", f"python: {sys.version.split()[0]}", f"world size: {world_size}"]
    for package in ("torch", "transformers", "numpy", "wandb"):
        try:
            comments.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            comments.append(f"{package}: not installed")
    text = "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".config.yaml"
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / "config.yaml")  # never half of it


def _git_commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with uncommitted changes" if changed else "")


# ---------------------------------------------------------------------------------------------------------------
# Ranks and seeds
# ---------------------------------------------------------------------------------------------------------------
