"""Saves, finds and restores checkpoints. The layout of a run's folder:

    save_path/name/
      config.yaml  metrics.jsonl  wandb/
      checkpoint_12/                       an epoch checkpoint: after 12 epochs
        model.safetensors config.json ...  a Hugging Face folder with its tokenizer
        thought.safetensors                the thought's parameters, if it has any
        adapter/                           LoRA's weights, with lora_rank
        coconut.json                       method, stage, c_thought, thought, markers, the validation file
        trainer/                           optimizer, random states, progress: needed only to restart
        predictions.jsonl  metrics.json
      checkpoint_12_step_3400/             a step checkpoint, inside the 13th epoch: without the last two files

A checkpoint is written under another name and renamed once it is complete, so a kill never leaves a partial checkpoint
that a restart would load. trainer/manifest.json holds each file's size, and later its SHA-256, to detect damaged files.
"""

from __future__ import annotations

import io
import pickle
import random
import shutil
import socket
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import IO

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.utils import GENERATION_CONFIG_NAME

from coconut import Coconut
from config import GENERATION_KEYS, Config
from methods import modern, rules_of
from model import lora
from trainer import parallel, run_folder
from trainer.distributed import World, agree, on_main_rank
from trainer.files import file_digest, reading, retried, sync_to_disk, write_whole
from trainer.pretrained import BASE, Pretrained, read_description
from trainer.run_folder import best, checkpoints, is_epoch_checkpoint, is_on_hub, rating, resolve, run_checkpoints
from utils import UserError, as_json, log, parse_json, read_object

FORMAT = 2  # of state.json, and of coconut.json beside it
OPTIMIZER = "trainer/optimizer"
STATE = "trainer/state.json"
MANIFEST = "trainer/manifest.json"  # file -> its size; its SHA-256 once `add_digests` has run
# keys that decide what a model's sequences look like
DESCRIBED = [field.name for field in fields(Config) if field.metadata["shapes"]]
Weights = dict[str, torch.Tensor]


# --- Progress ---


@dataclass
class Progress:
    """How far a run is. Part of every checkpoint."""

    epoch: int = 0  # finished epochs: the number of the next one
    step: int = 0  # finished optimizer steps
    seen: int = 0  # examples of the unfinished epoch trained on so far, in the epoch's order
    losses: float = 0.0  # sum over these examples of their step's loss
    lost: int = 0  # those of these examples whose step had a loss that is not finite
    seconds: float = 0.0  # training time of the unfinished epoch
    skipped: int = 0  # steps that skip_nonfinite has skipped in the whole run
    at_goal: int = 0  # consecutive epochs of the current stage whose accuracy has reached advance_at
    begun: int | None = None  # the epoch in which the run began: `resume` of that time, from which lr_factor counts
    passed_over: int = 0  # epochs left out because a stage ended early; the learning rate schedule ignores them
    best: dict[int, float] = field(default_factory=dict)  # stage -> best validation accuracy
    wandb_id: str | None = None
    token_ids: str | None = None  # digest of the training data's token ids (`Tokens.digest`)
    scored_by: dict | None = None  # SHA-256 of the validation file ("val_path"), and the keys that affect accuracies
    started_from: str | None = None  # the checkpoint that load_model_path resolved to when the run began


def save_progress(folder: Path, progress: Progress, world_size: int) -> None:
    state = {"format": FORMAT, "world_size": world_size, **asdict(progress)}
    (folder / STATE).write_text(as_json(state), encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    state = read_object(folder / STATE)
    known = {field.name for field in fields(Progress)}
    progress = Progress(**{name: value for name, value in state.items() if name in known})
    progress.best = {int(stage): accuracy for stage, accuracy in progress.best.items()}
    return progress


# --- Saving ---


def save(
    config: Config,
    world: World,
    pretrained: Pretrained,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    stage: int,
    files: dict[str, str] | None = None,
) -> Path:
    """Writes a checkpoint of the current state; returns its folder. Collective: every rank must call it.

    Rank 0 writes the model and `files` (name -> text), the results of a finished epoch; without `files` it is a step
    checkpoint, which is removed once two newer ones, or its epoch's, exist. Each rank writes its random state, all
    ranks together the optimizer.

    Raises UserError, on every rank, if it cannot be written; earlier checkpoints are then unchanged.
    """
    name = step_checkpoint_name(progress) if files is None else f"checkpoint_{progress.epoch}"
    target, aside = config.run_dir / name, config.run_dir / f".writing-{name}"
    weights = parallel.whole_weights(pretrained.model)  # all ranks
    try:
        with agree(world), _writing(target):  # all ranks
            if world.is_main:
                for path in [*config.run_dir.glob(".writing-*"), *config.run_dir.glob(".removing-*")]:
                    with suppress(OSError):  # another process has a file of it open: the next save tries again
                        _delete(path)
                (aside / OPTIMIZER).mkdir(parents=True)
        with agree(world), _writing(target):  # all ranks
            retried((aside / OPTIMIZER).stat)  # rank 0 has made it, perhaps on another node
            save_random_state(aside, world)
            if world.is_main:
                digest = (progress.scored_by or {}).get("val_path")
                validated_on = {"file": config.val_path, "sha256": digest}  # it also chooses the best checkpoint
                write_model(aside, config, pretrained, stage, weights, validated_on)
                for file, text in (files or {}).items():
                    (aside / file).write_text(text, encoding="utf-8")
                save_progress(aside, progress, world.size)
        with _writing(target):
            save_optimizer(aside, pretrained.model, optimizer)  # all ranks; if one fails, torch raises on all
        with agree(world), _writing(target):  # all ranks
            if world.is_main:
                _publish(aside, target, world.size)
    except UserError:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    with agree(world):  # all ranks
        if world.is_main:
            _prune(config, target)
    return target


def write_model(
    folder: Path, config: Config, pretrained: Pretrained, stage: int, weights: Weights, validated_on: dict | None = None
) -> None:
    """Writes model, thought, tokenizer and coconut.json, which describes the model's sequences and names the file it
    was validated on. weights: the unsharded state dict of pretrained.model."""
    base_weights, updates = lora.split(_with_prefix(BASE, weights))
    base = pretrained.model.base_causallm
    # transformers refuses to save contradictory settings, such as a temperature without do_sample, once one of them
    # has changed; here the stop tokens change, and many published models have such settings
    with pretrained.model.backbone.own_generation_config():
        base.save_pretrained(folder, state_dict=base_weights)
    if base.can_generate():
        base.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
    if updates:
        lora.save(folder, updates, config.lora_rank, config.lora_alpha)
    for part in ("thought", *getattr(pretrained.model, "saved_parts", ())):
        if learnt := _with_prefix(f"{part}.", weights):
            save_file({name: value.contiguous() for name, value in learnt.items()}, folder / f"{part}.safetensors")
    pretrained.tokenizer.save_pretrained(folder)
    chosen = {name: getattr(config, name) for name in DESCRIBED}
    description = {"format": FORMAT, "stage": stage, **chosen, "markers": pretrained.markers._asdict()}
    if validated_on is not None:
        description["validated_on"] = validated_on
    (folder / "coconut.json").write_text(as_json(description), encoding="utf-8")


def _with_prefix(prefix: str, weights: Weights) -> Weights:
    """Returns the weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def step_checkpoint_name(progress: Progress) -> str:
    return f"checkpoint_{progress.epoch}_step_{progress.step}"


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Raises UserError for the errors that libraries raise on a full or broken disk. Other exceptions, such as a GPU
    out of memory or a dead rank, propagate unchanged."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        if not is_io_error(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{target} cannot be written: {lines[-1].strip()}; earlier checkpoints are untouched"
        ) from error


def is_io_error(error: BaseException) -> bool:
    if isinstance(error, dcp.CheckpointException):  # holds the error of each rank that failed to write its shard
        return all(is_io_error(failure) for failure, _ in error.failures.values())
    of_torch_save = "inline_container.cc" in str(error)  # torch's RuntimeError
    return isinstance(error, (OSError, SafetensorError)) or of_torch_save


def _publish(aside: Path, target: Path, world_size: int) -> None:
    """Writes the manifest, syncs a complete folder to the disk and renames it to `target`."""
    # includes the files that other nodes have written, which this node may see only later
    paths = rank_files(aside, world_size) | {path for path in aside.rglob("*") if path.is_file()}
    sizes = {str(path.relative_to(aside)): retried(path.stat).st_size for path in sorted(paths)}
    (aside / MANIFEST).write_text(as_json(sizes), encoding="utf-8")
    sync_to_disk(aside)
    if target.exists():  # an unrelated file, such as a reference checkpoint, or a damaged one: rename it
        number = next(n for n in range(1, 1 << 20) if not target.with_name(f"{target.name}.replaced-{n}").exists())
        moved = target.rename(target.with_name(f"{target.name}.replaced-{number}"))
        log.warning(f"{target} was there already; it is now {moved.name}")
    aside.rename(target)
    sync_to_disk(target.parent, deep=False)


def add_digests(folder: Path) -> None:
    """Replaces the sizes in a checkpoint's manifest by SHA-256 digests. Runs in a thread beside the training: for GPT-2
    it takes half as long as the save itself."""
    with suppress(OSError, UserError):  # the disk is full, or the folder has been moved: the sizes stay
        names = list(read_object(folder / MANIFEST))
        digests = _digests([folder / name for name in names])
        write_whole(folder / MANIFEST, as_json(dict(zip(names, digests, strict=True))))


def _digests(paths: list[Path]) -> list[str]:
    """Returns the SHA-256 of each file."""
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        return list(pool.map(file_digest, paths))


def _prune(config: Config, newest: Path) -> None:
    """Removes old checkpoints once `newest` is saved: step checkpoints, except the newest two since the last finished
    epoch; the optimizers of all epoch checkpoints but the newest two; epoch checkpoints beyond keep_checkpoints, except
    the best (`run_folder.best`)."""
    everything = checkpoints(config.run_dir)
    del everything[everything.index(newest) + 1 :]  # damaged ones, which the run has passed over
    finished = [path for path in everything if is_epoch_checkpoint(path)]
    since = everything.index(finished[-1]) if finished else 0
    for path in everything[: max(since, len(everything) - 2)]:
        if not is_epoch_checkpoint(path):
            _remove(path)
    for path in finished[:-2]:
        _remove_optimizer(path)
    if config.keep_checkpoints is None:
        return
    kept = best(config.run_dir)
    for path in finished[: -config.keep_checkpoints]:
        if path != kept and rating(path) is not None:  # a damaged one is kept: its owner may want to restore it
            _remove(path)


def remove_step_checkpoints(run_dir: Path) -> None:
    """Removes the step checkpoints of a run that has ended, except the newest checkpoint: with save_only_improve it may
    be the only one that shows that the run has ended."""
    for path in checkpoints(run_dir)[:-1]:
        if not is_epoch_checkpoint(path):
            _remove(path)


def _remove(path: Path, folder: Path | None = None) -> None:
    """Removes a checkpoint, or a part of it; a kill halfway leaves no partial checkpoint. Only warns if it cannot be
    removed. folder: the run's folder, by default the parent of `path`."""
    aside = (folder or path.parent) / f".removing-{path.name}"
    try:
        path.rename(aside)
        _delete(aside)
    except OSError as error:
        log.warning(f"{path} cannot be removed: {error.strerror or error}")


def _remove_optimizer(path: Path) -> None:
    """Removes the optimizer of an undamaged checkpoint; one that was moved and linked is left unchanged."""
    if (path / OPTIMIZER).is_dir() and not path.is_symlink():
        with suppress(UserError):  # damaged: its owner may want to restore it
            digests = read_object(path / MANIFEST)
            kept = {name: digest for name, digest in digests.items() if not name.startswith(f"{OPTIMIZER}/")}
            write_whole(path / MANIFEST, as_json(kept))
            _remove(path / OPTIMIZER, path.parent)


def _delete(path: Path) -> None:
    """Deletes a folder, or only the link if it is a symbolic link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


# --- Optimizer and random state ---

# the classes in the `.metadata` of tensors; not BytesStorageMetadata, whose entries torch would unpickle
METADATA_CLASSES = (
    *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, _StorageInfo, torch.Size),
    *(metadata.TensorStorageMetadata, metadata.TensorProperties, metadata.ChunkStorageMetadata),
    *(metadata._MEM_FORMAT_ENCODING, torch.serialization._get_layout),
)


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles METADATA_CLASSES only. Raises UserError, on every rank, for any other class: it could run code."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.path = file.name

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # the path it was saved under
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        for kind in METADATA_CLASSES:
            if (module, name) == (kind.__module__, kind.__name__):
                return kind
        raise UserError.of_all(
            f"{self.path} is not read: it names {module}.{name}, which could run code and which no optimizer needs"
        )


class MetadataReader(dcp.FileSystemReader):
    """torch's reader of what `save_optimizer` writes, but reads `.metadata` by MetadataUnpickler."""

    def read_metadata(self, *_, rank: int | None = None, **__) -> metadata.Metadata:
        with Path(self._get_metadata_path(rank)).open("rb") as file:
            found = MetadataUnpickler(file).load()
        found.storage_meta.load_id = self.load_id
        return found


def save_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the optimizer's state, and the weights of the model's companions. Collective: every rank must call it."""
    # torch would make the state of an optimizer without any by a step, which counts in later bias corrections
    averages = get_optimizer_state_dict(model, optimizer)["state"] if optimizer.state else {}
    state = {"optimizer": {"state": averages}}
    state |= {name: get_model_state_dict(companion) for name, companion in model.companions.items()}
    dcp.save(state, checkpoint_id=folder / OPTIMIZER)


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer's state (AdamW's averages) from a checkpoint, on any number of ranks; hyper-parameters
    come from the configuration. State that the checkpoint lacks stays at its initial value: a weight that never got a
    gradient has none, and another version of torch may keep more. Collective: every rank must call it."""
    optimizer.zero_grad()  # with gradients set, torch silently initialises no state to load into
    reader = MetadataReader(folder / OPTIMIZER)
    saved = reader.read_metadata().state_dict_metadata
    whole = get_optimizer_state_dict(model, optimizer)
    whole["state"] = {
        name: {key: value for key, value in values.items() if f"optimizer.state.{name}.{key}" in saved}
        for name, values in whole["state"].items()
        if f"optimizer.state.{name}.step" in saved
    }
    dcp.load({"optimizer": {"state": whole["state"]}}, storage_reader=reader)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=whole, options=StateDictOptions(strict=False))


def load_companions(folder: Path, model: Coconut) -> list[str]:
    """Loads the weights of the model's companions; returns the names that the checkpoint lacks. Collective."""
    reader = MetadataReader(folder / OPTIMIZER)
    saved = {name.partition(".")[0] for name in reader.read_metadata().state_dict_metadata}
    for name, companion in model.companions.items():
        if name in saved:
            state = get_model_state_dict(companion)
            dcp.load({name: state}, storage_reader=reader)
            set_model_state_dict(companion, state)
    return [name for name in model.companions if name not in saved]


def save_random_state(folder: Path, world: World) -> None:
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if world.device.type != "cpu":
        state[world.device.type] = torch.get_device_module(world.device).get_rng_state()
    torch.save(state, saved := io.BytesIO())  # its errors of a full disk are RuntimeErrors in C++'s words
    (folder / "trainer" / f"random_{world.rank}.pt").write_bytes(saved.getvalue())


def load_random_state(folder: Path, world: World) -> bool:
    """Restores this rank's random state; returns False if the checkpoint was saved with another world size. Raises
    UserError if the file holds other objects, which torch would advise to trust."""
    if read_object(folder / STATE)["world_size"] != world.size:
        return False
    path = folder / "trainer" / f"random_{world.rank}.pt"
    try:
        saved = torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not read: it holds other objects than random states, which could run code"
        ) from None
    random.setstate(saved["python"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if (of_device := saved.get(world.device.type)) is not None:
        torch.get_device_module(world.device).set_rng_state(of_device)
    return True


def rank_files(folder: Path, world_size: int) -> set[Path]:
    """Returns the files that ranks other than 0 may have written: random states and shards of the optimizer."""
    storage = MetadataReader(folder / OPTIMIZER).read_metadata().storage_data or {}
    shares = {folder / OPTIMIZER / entry.relative_path for entry in storage.values()}
    return shares | {folder / "trainer" / f"random_{rank}.pt" for rank in range(world_size)}


# --- Finding ---


def find_newest(config: Config, world: World) -> Path | None:
    """Returns the newest undamaged checkpoint of this run, the same on all ranks; it has priority over load_model_path.
    None if there are no checkpoints. Raises UserError if its configuration differs or its optimizer is missing.
    Collective."""
    return _wait_until_visible(world, on_main_rank(world, lambda: _newest_to_continue(config)))  # all ranks


def _newest_to_continue(config: Config) -> Path | None:
    newest = newest_whole(config.run_dir)
    if newest is None:
        _check_no_run_of_the_reference(config)
        return None
    described = differences(config, newest)
    others = described if config.continue_changed else changed_keys(config, config.run_dir) | described
    if others:
        hint = "" if described else ", or set continue_changed=true"
        raise UserError(
            f"{newest} was trained with another configuration ({'; '.join(others.values())}): choose another name{hint}"
        )
    if not (newest / OPTIMIZER).is_dir():
        raise UserError(
            f"{newest} cannot be continued: only the newest two epochs keep the optimizer's state; to start from its "
            f"weights, choose another name, load_model_path={newest} and resume={read_progress(newest).epoch}"
        )
    return newest


def _check_no_run_of_the_reference(config: Config) -> None:
    """Raises UserError if the run's folder holds files of the reference, which would continue from the newest one, and
    load_model_path does not name one of them."""
    files = [path for path in config.run_dir.glob("checkpoint_*") if path.is_file() and zipfile.is_zipfile(path)]
    epochs = {int(path.name[11:]): path for path in files if path.name[11:].isdecimal()}
    if epochs and Path(config.load_model_path or "").resolve() not in [path.resolve() for path in files]:
        raise UserError(
            f"{config.run_dir} holds a run of facebookresearch/coconut: to continue from its weights, set "
            f"load_model_path={epochs[max(epochs)]} and resume={max(epochs)}; to start anew, choose another name"
        )


def find_weights(config: Config, world: World) -> Path | None:
    """Returns the folder or file that load_model_path names, the same on all ranks, except that each node has its own
    copy of a file of the hub. Collective. Raises UserError if there is none, or if it is damaged."""
    if config.load_model_path and is_on_hub(config.load_model_path):
        return parallel.in_turn(world, lambda cached: resolve(config.load_model_path, cached))  # all ranks

    def find() -> Path | None:
        path = resolve(config.load_model_path) if config.load_model_path else None
        if path is not None and (path / "trainer").is_dir() and (problem := damage(path)):
            raise UserError(f"load_model_path {str(path)!r} is damaged: {problem}")
        return path

    return _wait_until_visible(world, on_main_rank(world, find))  # all ranks


def _wait_until_visible(world: World, folder: Path | None) -> Path | None:
    """Returns the folder once every rank sees all its files: a network file system may show them late to other nodes.
    Collective. Raises UserError."""

    def listed() -> list[str]:
        path = folder / MANIFEST  # missing in folders that this program did not write
        return [MANIFEST, *read_object(path)] if path.is_file() else []

    if folder is None:
        return None
    names = on_main_rank(world, listed)  # all ranks
    with agree(world):  # all ranks
        for name in names:
            try:
                retried((folder / name).stat)
            except OSError as error:
                where = f"rank {world.rank} on {socket.gethostname()}"
                raise UserError(f"{where} does not see {folder / name}: {error.strerror}") from None
    return folder


def newest_whole(run_dir: Path) -> Path | None:
    """Returns the newest undamaged checkpoint, None if there are no checkpoints; skips damaged ones with a warning.
    Raises UserError if all are damaged: training from scratch would overwrite what can perhaps be restored."""
    damaged = []
    for path in reversed(run_checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path
        damaged.append(path)
        log.warning(f"{path} is damaged ({problem}) and skipped")
    if damaged:
        raise UserError(
            f"all checkpoints in {run_dir} are damaged, the newest is {damaged[0].name}: restore or remove them, or "
            f"choose another name"
        )
    return None


@reading()
def damage(folder: Path, weights_only: bool = False) -> str | None:
    """Describes what is wrong with a checkpoint's files; None if nothing is. Raises UserError for missing permissions.
    weights_only: whether to check the weights alone; a user may have edited the other files."""
    try:
        listed = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(listed, dict) or STATE not in listed:
            raise ValueError
        listed = {name: listed[name] for name in listed if not weights_only or name.endswith(".safetensors")}
        sizes = {name: (folder / name).stat().st_size for name in listed}
        hashed = [name for name, value in listed.items() if isinstance(value, str)]
        found = sizes | dict(zip(hashed, _digests([folder / name for name in hashed]), strict=True))
    except PermissionError:  # the files may be fine
        raise
    except OSError as error:
        name = Path(error.filename).relative_to(folder) if error.filename else "a file"  # bad sectors have no filename
        return f"{name}: {error.strerror}"
    except ValueError:
        return f"{MANIFEST} is not readable"
    return next((f"{name} differs from what was written" for name in listed if listed[name] != found[name]), None)


def differences(config: Config, folder: Path) -> dict[str, str]:
    """Returns the keys in which a configuration differs from a checkpoint's coconut.json: key -> "key 1, not 2"."""
    description = read_description(folder)
    others = _differing(config, description, [name for name in DESCRIBED if name not in GENERATION_KEYS])
    if "method" in others:  # variants of a method train differently, on the same sequences
        theirs = rules_of(description["method"]).variant_of or description["method"]
        if theirs == (config.rules.variant_of or config.method):
            del others["method"]
    return others


def _differing(config: Config, before: dict, names: Iterable[str]) -> dict[str, str]:
    pairs = {name: (before[name], getattr(config, name)) for name in names if name in before}
    return {name: f"{name} {then!r}, not {now!r}" for name, (then, now) in pairs.items() if then != now}


def check_method(config: Config, source: Path) -> list[str]:
    """Returns warnings about a checkpoint to evaluate whose training configuration differs. Raises UserError for
    another method or thought, which would make the evaluation meaningless."""
    others = differences(config, source)
    if {"method", "thought"} & others.keys():
        raise UserError(f"{source} was trained with another configuration ({'; '.join(others.values())})")
    others |= _differing(config, read_description(source), GENERATION_KEYS)
    return [f"{source} was trained with another configuration: {text}" for text in others.values()]


def warn_if_seen(source: Path, digests: dict[str, str]) -> list[str]:
    """Returns a warning for each file to evaluate on (path -> SHA-256) that is, under any name, the validation file
    that chose the checkpoint."""
    chosen_by = read_description(source).get("validated_on") or {}
    return [
        f"{path} is the validation file of {source} ({chosen_by['file']}): it has chosen the checkpoint, so accuracy "
        f"on it is too high"
        for path, digest in digests.items()
        if digest == chosen_by.get("sha256")
    ]


def changed_keys(config: Config, run_dir: Path) -> dict[str, str]:
    """Returns the keys that affect the weights and differ from the run's config.yaml: key -> "key 1, not 2"."""
    try:
        before = modern(run_folder.read_config(run_dir / "config.yaml")[0])
    except UserError:
        return {}
    free = {key.name for key in fields(Config) if key.metadata["free"]}
    if config.global_batch_size is not None:
        free |= {"batch_size_training", "gradient_accumulation_steps"}
    if config.lr_scheduler == "constant":
        free |= {"num_epochs"} | ({"resume"} if not config.warmup_steps else set())
    if config.rules.generates:  # its training answers questions
        free -= {"max_new_tokens", "answer_match", "eval_latents_from_steps"}
    return _differing(config, before, [key.name for key in fields(Config) if key.name not in free])
