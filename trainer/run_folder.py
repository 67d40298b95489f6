"""Resolves load_model_path, and reads and writes the files of a run's folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from trainer.files import reading, why_unreadable, write_whole, writing
from utils import UserError, log, read_object

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+):(?P<file>[^:]+)")


def split_choice(load_model_path: str) -> tuple[Path, str | None]:
    """Splits RUN@best or RUN@12, which choose a checkpoint of a run, into (RUN, choice); returns (path, None) for any
    other path, including an existing one with an @ in its name."""
    run, at, which = load_model_path.rpartition("@")
    is_choice = at and run and not os.path.exists(load_model_path)
    return (Path(run), which) if is_choice else (Path(load_model_path), None)


@reading()
def checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first, without those that lack essential files; `checkpoint.damage`
    checks the rest. Ignores unrelated files."""
    return [*filter(_is_complete, run_checkpoints(run_dir))]


def _is_complete(path: Path) -> bool:
    return all((path / name).is_file() for name in ("coconut.json", "trainer/state.json"))


@reading()
def run_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoints that this program has written, damaged or not, oldest first."""
    found = []
    for path in run_dir.glob("checkpoint_*"):
        numbers = re.fullmatch(r"checkpoint_(\d+)(?:_step_(\d+))?", path.name)
        if numbers and ((path / "coconut.json").is_file() or (path / "trainer").is_dir()):
            found.append((int(numbers[1]), int(numbers[2] or 0), path))
    return [path for *_, path in sorted(found)]


def is_epoch_checkpoint(path: Path) -> bool:
    return "_step_" not in path.name


def has_ended(newest: Path, num_epochs: int) -> bool:
    """Whether a run with this newest checkpoint has finished `num_epochs` epochs; with save_only_improve the newest is
    a step checkpoint if the last epoch has not improved."""
    return newest.name.partition("_step_")[0] == f"checkpoint_{num_epochs}"


def rating(path: Path) -> tuple[int, float] | None:
    """Returns (stage, validation accuracy) of a checkpoint; None if they are missing or damaged."""
    try:
        stage = read_object(path / "coconut.json")["stage"]
        accuracy = read_object(path / "metrics.json")["accuracy"]
    except (UserError, KeyError):
        return None
    return (stage, accuracy) if type(stage) is int and type(accuracy) in (int, float) and 0 <= accuracy <= 1 else None


def best(run_dir: Path) -> Path | None:
    """Returns the checkpoint with the best validation accuracy in the latest stage, the latest of equals; None if no
    checkpoint has an accuracy. Earlier stages are easier, because they keep written steps."""
    rated = {path: rating(path) for path in reversed(checkpoints(run_dir)) if is_epoch_checkpoint(path)}
    return max((path for path in rated if rated[path] is not None), key=rated.get, default=None)


def best_with_warnings(run_dir: Path) -> Path | None:
    """Same as `best`; warns of epoch checkpoints that it cannot compare: one of them may be the best."""
    for path in run_checkpoints(run_dir):
        if is_epoch_checkpoint(path) and rating(path) is None:
            _warn_skipped(path)
    return best(run_dir)


@cache
def _warn_skipped(path: Path) -> None:
    log.warning(f"{path} is damaged (coconut.json, metrics.json or trainer/state.json) and skipped")


@reading()
def resolve(load_model_path: str, cached: bool = False) -> Path:
    """Resolves load_model_path to a folder or file: a reference checkpoint, a Hugging Face folder, a run's newest
    checkpoint, RUN@best, RUN@12 (after 12 epochs), or org/name:file on the hub, downloaded unless it is `cached`.
    Raises UserError if it is none of these."""
    path, which = split_choice(load_model_path)
    if reason := why_unreadable(path):
        raise UserError(f"load_model_path {load_model_path!r} cannot be reached: {reason}")
    if which is not None:
        return _chosen(load_model_path, path, which)
    if (path / "modeling_coconut.py").is_file():
        raise UserError(
            f"{path} is an exported model: load it by AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
        )
    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        return path.parent  # a file of a checkpoint, which alone lacks the stage, the thought and the adapter
    if path.is_file() or (path / "config.json").is_file():
        return path
    everything = run_checkpoints(path)  # one listing: a run that goes on adds and removes checkpoints
    if found := [*filter(_is_complete, everything)]:
        for damaged in everything[everything.index(found[-1]) + 1 :]:
            _warn_skipped(damaged)
        return next((folder for folder in reversed(found) if is_epoch_checkpoint(folder)), found[-1])
    if is_on_hub(load_model_path):
        return _downloaded(load_model_path, cached)
    raise UserError(
        f"load_model_path {load_model_path!r} is no checkpoint: neither a file, nor a folder with a config.json, nor "
        f"a run's folder with a complete checkpoint"
    )


def check_checkpoint(source: str) -> None:
    """Raises UserError for a path that holds no checkpoint, before a command imports torch. Accepts any hub id."""
    if os.path.exists(source) or not HUB_ID.fullmatch(source):
        resolve(source)


def _chosen(load_model_path: str, run: Path, which: str) -> Path:
    there = [path.name.removeprefix("checkpoint_") for path in checkpoints(run) if is_epoch_checkpoint(path)]
    if not there:
        raise UserError(f"load_model_path {load_model_path!r}: {run} is no run's folder with a complete checkpoint")
    if which == "best":
        if found := best_with_warnings(run):
            return found
        raise UserError(f"load_model_path {load_model_path!r}: no checkpoint of {run} has a validation accuracy")
    if which not in there:
        raise UserError(
            f"load_model_path {load_model_path!r}: expected RUN@best or RUN@EPOCHS; {run} has the epochs "
            f"{', '.join(there)}"
        )
    return run / f"checkpoint_{which}"


def is_on_hub(load_model_path: str) -> bool:
    """Whether load_model_path is spelled org/name:file, a file on the hub, and org/name is no local folder."""
    spelled = HUB_FILE.fullmatch(load_model_path)
    return spelled is not None and not Path(spelled["repo"]).exists()


def _downloaded(load_model_path: str, cached: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    spelled = HUB_FILE.fullmatch(load_model_path)
    try:
        return Path(hf_hub_download(spelled["repo"], spelled["file"], local_files_only=cached))
    except (OSError, ValueError, EntryNotFoundError) as error:  # no connection, a wrong name, the hub's answer
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"load_model_path {load_model_path!r} cannot be downloaded from the hub: {reason}") from None


def keep_results(folder: Path, values: dict, checkpoint: str, notes: dict[str, str]) -> None:
    """Renames an evaluation's folder to FOLDER_1, FOLDER_2 ..., unless it evaluated the same checkpoint with the same
    configuration and notes, so that a second evaluation under one name does not overwrite the first. Raises
    UserError."""
    if not (folder / "metrics.json").is_file():
        return
    try:
        metrics, (before, written) = read_object(folder / "metrics.json"), read_config(folder / "config.yaml")
        evaluated = {one["checkpoint"] for one in metrics.get("sets", {"": metrics}).values()}
        same = evaluated == {checkpoint} and written.items() >= notes.items()
        if same and all(before[name] == values[name] for name in before.keys() & values.keys()):
            return
    except (UserError, KeyError, TypeError, AttributeError):
        pass  # damaged: treat it as another evaluation
    with writing(folder):
        number = next(n for n in range(1, 1 << 20) if not folder.with_name(f"{folder.name}_{n}").exists())
        kept = folder.rename(folder.with_name(f"{folder.name}_{number}"))
    log.info(f"moved {folder}, which had results of another checkpoint, set or configuration, to {kept}")


def write_config(values: dict, folder: Path, world_size: int, hardware: str = "unknown", **notes: str) -> None:
    """Writes a resolved configuration, the commit, the hardware, the library versions and further notes to
    folder/config.yaml, which is itself a configuration: `python run.py FOLDER/config.yaml` repeats the run. Raises
    UserError."""
    comments = [f"git commit: {_git_commit()}", f"python: {sys.version.split()[0]}"]
    comments += [f"world size: {world_size}", f"hardware: {hardware}"]
    for package in ("torch", "transformers", "numpy", "wandb"):
        try:
            comments.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            comments.append(f"{package}: not installed")
    comments += [f"{name}: {note}" for name, note in notes.items()]
    text = "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False)
    write_whole(folder / "config.yaml", text)


def read_config(path: Path) -> tuple[dict, dict[str, str]]:
    """Reads the keys and the notes that `write_config` wrote. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return values, notes_of(text)


def notes_of(text: str) -> dict[str, str]:
    """Returns the notes that `write_config` puts above the keys: commit, versions, ranks, hardware."""
    return dict(re.findall(r"^# ([^\n]+?): (.*)$", text, re.MULTILINE))


def evaluations_in(run_dir: Path, checkpoint: str = "*") -> Iterator[tuple[Path, dict]]:
    """Yields (folder, metrics) of each data file that a run was evaluated on: by only_eval under the run's name, and by
    `tools.evaluate --all`, there only those of `checkpoint` if it is given. Raises UserError."""
    for folder in [run_dir / "eval", *sorted(run_dir.glob(f"evaluations/*/{checkpoint}/eval"))]:
        if (folder / "metrics.json").is_file():
            metrics = read_object(folder / "metrics.json")
            for of_set in metrics.get("sets", {"": metrics}).values():
                yield folder, of_set


def _git_commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*git, "--dirty= with uncommitted changes"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
