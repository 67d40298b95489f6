"""Save, find, resume. The layout of a run's folder:

    save_path/name/
      config.yaml  metrics.jsonl  wandb/
      checkpoint_12/                       after 12 epochs
        model.safetensors config.json ...  a Hugging Face folder with its tokenizer
        thought.safetensors                what the thought has learnt, where it learns
        adapter/                           LoRA's updates, where there are some
        coconut.json                       method, stage, c_thought, thought, markers, the validation file
        trainer/                           what only a restart needs
        predictions.jsonl  metrics.json
      checkpoint_12_step_3400/             within the 13th epoch: for a restart only, without the last two files

A checkpoint is written aside and renamed when it is whole: there is no moment at which a kill leaves something that a
restart would take for one. A digest of every file tells whether a disk has damaged it since.
"""

from __future__ import annotations

import errno
import shutil
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from config import Config
from methods import modern, rules_of
from model import lora
from trainer import parallel
from trainer.distributed import World, on_every_rank, on_main_rank
from trainer.pretrained import THOUGHT_FILE, Pretrained, read_description
from trainer.run_folder import best, checkpoints, is_of_finished_epoch, is_on_hub, rating, resolve, run_checkpoints
from trainer.trainer_state import (
    FORMAT,
    OPTIMIZER,
    Progress,
    rank_files,
    read_state,
    save_optimizer,
    save_progress,
    save_random_state,
)
from utils import UserError, as_json, file_digest, parse_json, read_object, retried, sync_to_disk

MANIFEST = "trainer/manifest.json"  # file -> SHA-256
# keys that say what a model's sequences look like
DESCRIBED = (
    *("method", "thought", "latent_passes", "c_thought", "max_latent_stage", "pad_latent_to_max"),
    *("latent_markers", "step_separator", "lora_rank", "lora_alpha"),
)
PREFIX, THOUGHT_PREFIX = "base_causallm.", "thought."


# ---------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------


def find_weights(config: Config, world: World) -> Path | None:
    """What load_model_path points to, if it is set; all ranks get the same, but of the hub's files each node has its
    own. Collective.

    Raises UserError where there is nothing, or something damaged.
    """

    if config.load_model_path and is_on_hub(config.load_model_path):
        return parallel.in_turn(world, lambda cached: resolve(config.load_model_path, cached))  # all ranks

    def find() -> Path | None:
        path = resolve(config.load_model_path) if config.load_model_path else None
        if path is not None and (path / "trainer").is_dir() and (problem := damage(path)):
            raise UserError(f"load_model_path {str(path)!r} is damaged: {problem}")
        return path

    return _seen_by_all(world, on_main_rank(world, find))


# ---------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------


def save(
    config: Config,
    world: World,
    pretrained: Pretrained,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    stage: int,
    files: dict[str, str] | None = None,
) -> Path:
    """Writes the checkpoint of this moment. Collective: every rank must call it.

    Rank 0 writes the model and `files` (name -> text), which are those of a finished epoch: without them it is a
    checkpoint for a restart only, which goes when two newer ones are there. Each rank writes its random state, all
    together the optimizer.

    Raises UserError, on every rank, where it cannot be written; the earlier checkpoints are then as they were.
    """
    name = restart_name(progress) if files is None else f"checkpoint_{progress.epoch}"
    target, aside = config.run_dir / name, config.run_dir / f".writing-{name}"
    weights = parallel.whole_weights(pretrained.model)  # all ranks

    def make_room() -> None:
        for path in [*config.run_dir.glob(".writing-*"), *config.run_dir.glob(".removing-*")]:
            with suppress(OSError):  # somebody looks at it: the next save tries again
                _delete(path)  # of a job that was killed
        (aside / OPTIMIZER).mkdir(parents=True)

    def write_mine() -> None:
        retried((aside / OPTIMIZER).stat)  # which rank 0 has made, on another node perhaps
        save_random_state(aside, world)
        if world.is_main:
            validated_on = {"file": config.val_path, "sha256": progress.val}  # and so chosen by
            write_model(aside, config, pretrained, stage, weights, validated_on)
            for file, text in (files or {}).items():
                (aside / file).write_text(text, encoding="utf-8")
            save_progress(aside, progress, world.size)

    try:
        on_main_rank(world, lambda: _writing(target, make_room))
        on_every_rank(world, lambda: _writing(target, write_mine))
        _writing(
            target, lambda: save_optimizer(aside, pretrained.model, optimizer)
        )  # all ranks; torch tells all of them when one fails
        on_main_rank(world, lambda: _writing(target, lambda: _publish(aside, target, world.size)))
    except UserError:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    on_main_rank(world, lambda: _prune(config))
    return target


def write_model(
    folder: Path,
    config: Config,
    pretrained: Pretrained,
    stage: int,
    weights: dict[str, torch.Tensor],
    validated_on: dict | None = None,
) -> None:
    """Model, thought and tokenizer, and coconut.json, which says what the model's sequences look like, and which file
    it was validated on; weights: those of pretrained.model, whole."""
    base_weights, updates = lora.split(_under(PREFIX, weights))
    _save_base(pretrained.model.base_causallm, folder, base_weights)
    if updates:
        lora.save(folder, updates, config.lora_rank, config.lora_alpha)
    if learnt := _under(THOUGHT_PREFIX, weights):
        save_file({name: value.contiguous() for name, value in learnt.items()}, folder / THOUGHT_FILE)
    pretrained.tokenizer.save_pretrained(folder)
    chosen = {name: getattr(config, name) for name in DESCRIBED}
    description = {"format": FORMAT, "stage": stage, **chosen, "markers": pretrained.markers._asdict()}
    if validated_on is not None:
        description["validated_on"] = validated_on
    (folder / "coconut.json").write_text(as_json(description), encoding="utf-8")


def _save_base(base: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """A Hugging Face folder of the model; its generation_config as it is.

    transformers loads settings that contradict each other, such as a temperature without do_sample, of which published
    models have many, but refuses to save them once one has been changed: here the stop tokens.
    """
    settings = base.generation_config if base.can_generate() else None
    if settings is None:
        base.save_pretrained(folder, state_dict=weights)
        return
    base.generation_config = GenerationConfig()
    try:
        base.save_pretrained(folder, state_dict=weights)
    finally:
        base.generation_config = settings
    settings.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def _under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def restart_name(progress: Progress) -> str:
    """Of the checkpoint that only a restart needs."""
    return f"checkpoint_{progress.epoch}_step_{progress.step}"


def _writing(target: Path, action: Callable[[], None]) -> None:
    """Turns what a full or broken disk makes libraries raise into a UserError. Anything else, such as a GPU without
    memory for the optimizer's shares, or a rank that is gone, is what it is."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        if not is_io_error(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{target} cannot be written: {lines[-1].strip()}; earlier checkpoints are untouched"
        ) from error


def is_io_error(error: BaseException) -> bool:
    if isinstance(error, dcp.CheckpointException):  # what the ranks have raised in writing their shares
        return all(is_io_error(failure) for failure, _ in error.failures.values())
    of_torch_save = ("inline_container.cc", "Parent directory", "cannot be opened")  # RuntimeErrors, with these words
    return isinstance(error, (OSError, SafetensorError)) or any(words in str(error) for words in of_torch_save)


def _publish(aside: Path, target: Path, world_size: int) -> None:
    """Gives a complete folder its name, after all of it has reached the disk, with a digest of every file."""
    for path in rank_files(aside, world_size):
        retried(path.stat)  # what another node has written may be seen here only later: it must be in the manifest
    paths = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    digests = dict(zip((str(path.relative_to(aside)) for path in paths), _digests(paths), strict=True))
    for path in rank_files(aside, world_size):
        if str(path.relative_to(aside)) not in digests:
            raise FileNotFoundError(errno.ENOENT, "was written, but is not listed", str(path))
    (aside / MANIFEST).write_text(as_json(digests), encoding="utf-8")
    sync_to_disk(aside)
    if target.exists():  # a stranger, such as a file of the reference: nothing of it is lost
        number = next(n for n in range(1, 1 << 20) if not target.with_name(f"{target.name}.replaced-{n}").exists())
        target.rename(target.with_name(f"{target.name}.replaced-{number}"))
    aside.rename(target)
    sync_to_disk(target.parent, deep=False)


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file."""
    with ThreadPoolExecutor(8) as pool:  # hashing leaves Python's lock
        return list(pool.map(file_digest, paths))


def _prune(config: Config) -> None:
    """Removes what is no longer needed: checkpoints for restarts, but for the newest two since the last finished epoch;
    and finished epochs beyond keep_checkpoints, but never the best (`load_path.best`)."""
    everything = checkpoints(config.run_dir)
    finished = [place for place, path in enumerate(everything) if is_of_finished_epoch(path)]
    needed = everything[max(finished[-1] if finished else 0, len(everything) - 2) :]
    for path in everything:
        if not is_of_finished_epoch(path) and path not in needed:
            _remove(path)
    if config.keep_checkpoints is None:
        return
    kept = best(config.run_dir)
    for path in [path for path in everything if is_of_finished_epoch(path)][: -config.keep_checkpoints]:
        if path != kept and rating(path) is not None:  # damaged: whoever owns it may want to restore it
            _remove(path)


def remove_restarts(run_dir: Path) -> None:
    """Removes the checkpoints that only a restart needs: the run is done."""
    for path in checkpoints(run_dir):
        if not is_of_finished_epoch(path):
            _remove(path)


def _remove(path: Path) -> None:
    """A kill in the middle leaves nothing that is called a checkpoint. What cannot be removed stays, with a warning:
    the run has been saved, and goes on."""
    aside = path.with_name(f".removing-{path.name}")
    try:
        path.rename(aside)
        _delete(aside)
    except OSError as error:
        print(f"warning: {path} cannot be removed: {error.strerror or error}", file=sys.stderr, flush=True)


def _delete(path: Path) -> None:
    """A folder, or a link to one that somebody has moved, which stays where it is."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------


def find_newest(config: Config, world: World) -> Path | None:
    """The newest whole checkpoint of this run, which wins over load_model_path; all ranks get the same. Collective.

    Raises UserError where it is of a run with another configuration.
    """

    def find() -> Path | None:
        newest = newest_whole(config.run_dir, lambda text: print(text, file=sys.stderr, flush=True))
        if newest is None:
            return None
        others = differences(config, newest)
        if not config.continue_changed:
            others = changes(config, config.run_dir) | others
        if others:
            hint = "" if differences(config, newest) else ", or set continue_changed=true"
            raise UserError(
                f"{newest} is of another configuration ({'; '.join(others.values())}): choose another name{hint}"
            )
        return newest

    return _seen_by_all(world, on_main_rank(world, find))


def _seen_by_all(world: World, folder: Path | None) -> Path | None:
    """The folder, once every rank sees all files of it: a network file system may show them late to other nodes.
    Collective. Raises UserError."""

    def listed() -> list[str]:
        path = folder / MANIFEST  # which older checkpoints, and others' folders, have not
        return [MANIFEST, *read_object(path)] if path.is_file() else []

    def look() -> None:
        for name in names:
            try:
                retried((folder / name).stat)
            except OSError as error:
                where = f"rank {world.rank} on {socket.gethostname()}"
                raise UserError(f"{where} does not see {folder / name}: {error.strerror}") from None

    if folder is not None:
        names = on_main_rank(world, listed)  # all ranks
        on_every_rank(world, look)  # all ranks
    return folder


def newest_whole(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; None where there has never been one.

    Damaged ones are passed over with a warning. Raises UserError where all are damaged: starting from scratch would
    lose what may still be saved.
    """
    damaged = []
    for path in reversed(run_checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path
        damaged.append(path)
        warn(f"warning: {path} is damaged ({problem}) and passed over")
    if damaged:
        raise UserError(
            f"{run_dir} holds damaged checkpoints only, {damaged[0].name} the newest: mend or remove them, or choose "
            f"another name"
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    try:
        if read_state(folder)["format"] == 1:
            return None  # had no digests
        digests = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(digests, dict) or not digests:
            raise TypeError
        found = _digests([folder / name for name in digests])
    except OSError as error:
        name = Path(error.filename).relative_to(folder) if error.filename else "a file"  # a bad sector has no name
        return f"{name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} or trainer/state.json is not readable"
    for name, digest in zip(digests, found, strict=True):
        if digests[name] != digest:
            return f"{name} is not what was written"
    return None


def differences(config: Config, folder: Path) -> dict[str, str]:
    """Where a configuration departs from the one that a checkpoint was trained with: key -> "key 1, not 2"."""
    description = read_description(folder) or {}
    others = {name: getattr(config, name) for name in DESCRIBED if name in description}
    others = {name: value for name, value in others.items() if description[name] != value}
    if "method" in others:  # a variant adds to the training of the other, not to its sequences
        theirs = rules_of(description["method"]).variant_of or description["method"]
        if theirs == (config.rules.variant_of or config.method):
            del others["method"]
    return {name: f"{name} {_shown(description[name])}, not {_shown(value)}" for name, value in others.items()}


def _shown(value) -> str:
    """A text of white space needs its quotes to be seen."""
    return repr(value) if isinstance(value, str) and not value.strip() else str(value)


def check_method(config: Config, source: Path) -> list[str]:
    """What to warn of where a checkpoint that is to be evaluated was trained otherwise than the configuration says.

    Raises UserError where that makes an evaluation meaningless.
    """
    others = differences(config, source)
    if {"method", "thought"} & others.keys():
        raise UserError(f"{source} is of another configuration ({'; '.join(others.values())})")
    return [f"{source} is of another configuration: {text}" for text in others.values()]


def check_unseen(source: Path, digests: dict[str, str]) -> list[str]:
    """What to warn of where a file that is to be evaluated on (path -> SHA-256) is the one that the checkpoint was
    chosen by, under whatever name."""
    chosen_by = (read_description(source) or {}).get("validated_on") or {}
    return [
        f"{path} is what {source} was validated on (as {chosen_by['file']}): a checkpoint looks better than it is on "
        f"the set that chose it"
        for path, digest in digests.items()
        if digest == chosen_by.get("sha256")
    ]


def changes(config: Config, run_dir: Path) -> dict[str, str]:
    """Where a configuration departs from that of the run that the folder holds, in what decides the weights: key ->
    "key 1, not 2"."""
    try:
        before = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(before, dict):
        return {}
    before = modern(before)
    free = {key.name for key in fields(Config) if key.metadata["free"]}
    if config.global_batch_size is not None:
        free |= {"batch_size_training", "gradient_accumulation_steps"}
    if config.lr_scheduler == "constant":
        free.add("num_epochs")
    return {
        name: f"{name} {before[name]}, not {value}"
        for name, value in asdict(config).items()
        if name not in free and name in before and before[name] != value
    }
