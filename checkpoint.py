"""Save, find, load, resume. The layout of a run's folder:

    save_path/name/
      config.yaml  metrics.jsonl  wandb/
      checkpoint_12/                       after 12 epochs
        model.safetensors config.json ...  a Hugging Face folder with its tokenizer
        thought.safetensors                what the thought has learnt, where it learns
        coconut.json                       method, stage, c_thought, thought, markers
        trainer/                           what only a restart needs
        predictions.jsonl  metrics.json
      checkpoint_12_step_3400/             within the 13th epoch: for a restart only, without the last two files

A checkpoint is written aside and renamed when it is whole: there is no moment at which a kill leaves something that a
restart would take for one. A digest of every file tells whether a disk has damaged it since.

This module also reads what the reference implementation (facebookresearch/coconut) saved.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from coconut import Coconut
from dataset import END, LATENT, START, Markers, load_tokenizer, mark, not_loadable
from families import vouch
from thoughts import Thought
from utils import Config, UserError, World, on_every_rank, on_main_rank, sync_to_disk

FORMAT = 2  # of coconut.json and trainer/state.json
MANIFEST = "trainer/manifest.json"  # file -> SHA-256
PREFIX, THOUGHT_PREFIX = "base_causallm.", "thought."
THOUGHT_FILE = "thought.safetensors"
# keys that may change between a run and its continuation: none of them decides what the weights become
FREE_KEYS = (
    *("project", "name", "save_path", "only_eval", "debug", "wandb", "log_every_steps", "load_model_path"),
    *(
        "train_path",
        "val_path",
        "max_eval_examples",
        "eval_batch_size",
        "max_new_tokens",
        "eval_latents_from_steps",
        "num_workers",
    ),
    *("strategy", "compile", "gradient_checkpointing", "save_every_steps", "save_only_improve", "keep_checkpoints"),
    *("skip_nonfinite", "continue_changed"),
)


@dataclass
class Progress:
    """How far a run is. Part of every checkpoint."""

    epoch: int = 0  # finished epochs, and so the next one to run
    step: int = 0  # finished optimizer steps
    seen: int = 0  # examples of the unfinished epoch, in its order, that have been trained on
    losses: float = 0.0  # sum of the losses of its steps
    seconds: float = 0.0  # that it has taken
    skipped: int = 0  # steps of the run that skip_nonfinite has skipped
    best: dict[int, float] = field(default_factory=dict)  # stage -> best validation accuracy
    wandb_id: str | None = None
    data: str | None = None  # digest of the training data, as dataset.cache_tokens names it


# ---------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, but for obviously damaged ones (see `damage`). Anything else in the
    folder is a stranger, and left alone."""
    needed = ("coconut.json", "trainer/state.json")
    return [path for path in _ours(run_dir) if all((path / name).is_file() for name in needed)]


def _ours(run_dir: Path) -> list[Path]:
    """What this program has written under the name of a checkpoint, whole or not, oldest first."""
    found = []
    for path in run_dir.glob("checkpoint_*"):
        numbers = re.fullmatch(r"checkpoint_(\d+)(?:_step_(\d+))?", path.name)
        if numbers and ((path / "coconut.json").is_file() or (path / "trainer").is_dir()):
            found.append((int(numbers[1]), int(numbers[2] or 0), path))
    return [path for *_, path in sorted(found)]


def _is_of_finished_epoch(path: Path) -> bool:
    return "_step_" not in path.name


def resolve(load_model_path: str) -> Path:
    """What load_model_path points to: a file of the reference, a Hugging Face folder, or a run's newest checkpoint.

    Raises UserError where it is none of these.
    """
    path = Path(load_model_path)
    if path.is_file() or (path / "config.json").is_file():
        return path
    if found := checkpoints(path):
        return next((folder for folder in reversed(found) if _is_of_finished_epoch(folder)), found[-1])
    raise UserError(
        f"load_model_path {load_model_path!r} is no checkpoint: neither a file, nor a folder with a config.json, nor "
        f"a run's folder with a whole checkpoint in it"
    )


def read_description(folder: Path) -> dict | None:
    """coconut.json of a checkpoint folder; None where there is none (other Hugging Face folders, reference files)."""
    path = folder / "coconut.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def differences(config: Config, folder: Path) -> dict[str, str]:
    """Where a configuration departs from the one that a checkpoint was trained with: key -> "key 1, not 2"."""
    description = read_description(folder) or {}
    return {
        name: f"{name} {description[name]}, not {getattr(config, name)}"
        for name in ("method", "thought", "c_thought", "max_latent_stage", "pad_latent_to_max")
        if name in description and description[name] != getattr(config, name)
    }


# ---------------------------------------------------------------------------------------------------------------
# Loading a model
# ---------------------------------------------------------------------------------------------------------------


def load_model(config: Config, source: Path | None) -> tuple[Coconut, object, Markers]:
    """(model, tokenizer, markers): from `source` where it is given (see `resolve`), else from config.model_id.

    For the method coconut the tokenizer gets the three markers and the model an embedding row for each, where they
    have none yet. Raises UserError where names or shapes do not fit the model that model_id names.
    """
    folder = source if source is not None and source.is_dir() else None
    tokenizer = load_tokenizer(config, folder)
    dtype = torch.bfloat16 if config.bf16_weights else torch.float32
    try:
        if config.from_scratch and source is None:
            base = AutoModelForCausalLM.from_config(shape_of(config, source), dtype=dtype)
        else:
            if folder is not None:
                _check_same_shape(config.model_id, folder)
            base, report = AutoModelForCausalLM.from_pretrained(
                folder or config.model_id, dtype=dtype, output_loading_info=True
            )
            _check_names(folder or config.model_id, report["missing_keys"], report["unexpected_keys"] if folder else ())
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise not_loadable("load_model_path" if folder else "model_id", folder or config.model_id, error) from None
    has_marker_rows = False
    if source is not None and folder is None:
        n_markers = len({START, END, LATENT} - set(tokenizer.get_vocab()))
        has_marker_rows = _load_reference_file(base, source, rows_with_markers=len(tokenizer) + n_markers)
    if config.method == "coconut":
        markers = add_markers(tokenizer, base, initialise=not has_marker_rows)
    else:
        markers = mark(tokenizer, config.method)
    base.config.use_cache = True
    model = Coconut(base, markers.latent, markers.start, markers.end, markers.eos, thought=config.thought)
    if folder is not None:
        _load_thought(model.thought, config.thought, folder)
    vouch(model)
    return model, tokenizer, markers


def _load_thought(thought: Thought, spelling: str, folder: Path) -> None:
    """What the thought had learnt in a checkpoint. Other folders have none of it: it starts anew."""
    path, own = folder / THOUGHT_FILE, thought.state_dict()
    if not path.is_file():
        if own and (read_description(folder) or {}).get("thought") == spelling:
            raise UserError(f"{folder} was trained with the thought {spelling}, but lacks {THOUGHT_FILE}")
        return
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}") from None
    mismatched = [
        f"{name} {list(saved[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    _check_names(path, own.keys() - saved.keys(), saved.keys() - own.keys(), mismatched, f"thought {spelling}")
    thought.load_state_dict(saved)


def shape_of(config: Config, source: Path | None) -> PreTrainedConfig:
    """The model's own configuration. Raises UserError where it is not to be had."""
    where = source if source is not None and source.is_dir() else config.model_id
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise not_loadable("model_id", where, error) from None


def _check_same_shape(model_id: str, folder: Path) -> None:
    """A checkpoint of another model than model_id is a mistake. Without model_id at hand the checkpoint is believed."""
    try:
        wanted = AutoConfig.from_pretrained(model_id, local_files_only=True)
    except (OSError, ValueError):
        return
    found = AutoConfig.from_pretrained(folder)
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")
    differ = [name for name in names if getattr(wanted, name, None) != getattr(found, name, None)]
    if differ:
        have = ", ".join(f"{name} {getattr(found, name, None)}" for name in differ)
        want = ", ".join(f"{name} {getattr(wanted, name, None)}" for name in differ)
        raise UserError(
            f"{folder} is a checkpoint of another model: it has {have}, but model_id {model_id!r} has {want}"
        )


def _check_names(source, missing, unexpected, mismatched=(), what: str = "model") -> None:
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names:
            names = sorted(names)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{title}: {', '.join(names[:4])}{more}")
    if problems:
        raise UserError(f"{source} does not fit the {what}: weights {'; '.join(problems)}")


def _load_reference_file(base: PreTrainedModel, path: Path, rows_with_markers: int) -> bool:
    """Loads what the reference saved with torch.save: a state dict of the bare model or of its Coconut wrapper.

    Its embeddings have the vocabulary's rows or, trained with latents, `rows_with_markers`, to which the model is then
    resized. Returns whether the file held the markers' rows.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the unpickler meets
        raise UserError(
            f"{path} is no file of weights: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from None
    if not isinstance(saved, dict) or not saved or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise UserError(f"{path} is no state dict: it must map names to tensors")
    saved = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in saved.items()}
    wrapped = any(name.startswith("base_causallm.") for name in saved)
    if wrapped:
        # the reference's wrapper also registers the input embedding, as `embedding.weight`: the same tensor again
        saved.pop("embedding.weight", None)
        saved = {name.removeprefix("base_causallm."): value for name, value in saved.items()}
    ignored = base._keys_to_ignore_on_load_unexpected or ()  # buffers of older releases, such as GPT-2's causal mask
    names = list(base.state_dict())
    saved = {
        name: value
        for name, value in saved.items()
        if name in names or not any(re.search(pattern, name) for pattern in [*ignored, r"\.masked_bias$", r"inv_freq$"])
    }
    embedding = base.get_input_embeddings()
    row_name = next(name for name, module in base.named_modules() if module is embedding) + ".weight"
    resized = row_name in saved and len(saved[row_name]) == rows_with_markers != embedding.weight.shape[0]
    if resized:
        base.resize_token_embeddings(rows_with_markers, mean_resizing=False)
    own = base.state_dict()
    given = {own[name].data_ptr() for name in saved if name in own}
    missing = [
        name for name, value in own.items() if name not in saved and value.data_ptr() not in given
    ]  # less the tied
    mismatched = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in saved.items()
        if name in own and value.shape != own[name].shape
    ]
    _check_names(path, missing, [name for name in saved if name not in own], mismatched)
    base.load_state_dict(saved, strict=False)
    return resized or wrapped


@torch.no_grad()
def add_markers(tokenizer, base: PreTrainedModel, initialise: bool = True) -> Markers:
    """Adds the markers that tokenizer and model lack; the order of the rows is the reference's.

    A new row, of the input and of the output embedding, tied or not, starts as that of "<<" where the tokenizer has
    it as one token, else as the mean row; unless `initialise` is off, because the rows have been loaded.
    """
    known = min(len(tokenizer), base.get_input_embeddings().weight.shape[0])
    missing = [marker for marker in (START, END, LATENT) if marker not in tokenizer.get_vocab()]
    markers = mark(tokenizer, "coconut")
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if missing and initialise:
        like = tokenizer.convert_tokens_to_ids("<<")
        one_token = like is not None and like != tokenizer.unk_token_id
        new = tokenizer.convert_tokens_to_ids(missing)
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            for values in (module.weight, getattr(module, "bias", None)):
                if values is not None:
                    values[new] = values[like].clone() if one_token else values[:known].mean(dim=0)
    return markers


# ---------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------


def save(
    config: Config,
    world: World,
    progress: Progress,
    model: Coconut,
    weights: dict[str, torch.Tensor],
    tokenizer,
    markers: Markers,
    stage: int,
    optimizer: torch.optim.Optimizer,
    files: dict[str, str] | None = None,
) -> Path:
    """Writes the checkpoint of this moment. Collective: every rank must call it.

    Rank 0 writes the model's `weights` (see parallel.whole_weights) and `files` (name -> text), which are those of a
    finished epoch: without them it is a checkpoint for a restart only, which goes when two newer ones are there. Each
    rank writes its random state, all together the optimizer.

    Raises UserError, on every rank, where it cannot be written; the earlier checkpoints are then as they were.
    """
    name = restart_name(progress) if files is None else f"checkpoint_{progress.epoch}"
    target, aside = config.run_dir / name, config.run_dir / f".writing-{name}"
    description = {
        "format": FORMAT,
        "method": config.method,
        "stage": stage,
        "c_thought": config.c_thought,
        "max_latent_stage": config.max_latent_stage,
        "pad_latent_to_max": config.pad_latent_to_max,
        "thought": config.thought,
        "markers": markers._asdict(),
    }

    def make_room() -> None:
        for path in [*config.run_dir.glob(".writing-*"), *config.run_dir.glob(".removing-*")]:
            shutil.rmtree(path)  # of a job that was killed
        (aside / "trainer").mkdir(parents=True)

    def write_mine() -> None:
        torch.save(_random_state(world), aside / "trainer" / f"random_{world.rank}.pt")
        if world.is_main:
            model.base_causallm.save_pretrained(aside, state_dict=_under(PREFIX, weights))
            if learnt := _under(THOUGHT_PREFIX, weights):
                save_file({name: value.contiguous() for name, value in learnt.items()}, aside / THOUGHT_FILE)
            tokenizer.save_pretrained(aside)
            for file, text in (files or {}).items():
                (aside / file).write_text(text, encoding="utf-8")
            _write_json(aside / "coconut.json", description)
            state = {"format": FORMAT, "world_size": world.size, **asdict(progress)}
            _write_json(aside / "trainer" / "state.json", state)

    def write_optimizer() -> None:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=aside / "trainer" / "optimizer")

    try:
        on_main_rank(world, lambda: _writing(target, make_room))
        on_every_rank(world, lambda: _writing(target, write_mine))
        _writing(target, write_optimizer)  # all ranks; torch tells all of them when one fails
        on_main_rank(world, lambda: _writing(target, lambda: _publish(aside, target)))
    except UserError:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    on_main_rank(world, lambda: _prune(config, progress))
    return target


def _under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def restart_name(progress: Progress) -> str:
    """Of the checkpoint that only a restart needs."""
    return f"checkpoint_{progress.epoch}_step_{progress.step}"


def _writing(target: Path, action: Callable[[], None]) -> None:
    """Turns what a full or broken disk makes libraries raise into a UserError."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{target} cannot be written: {lines[-1].strip()}; earlier checkpoints are untouched"
        ) from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _publish(aside: Path, target: Path) -> None:
    """Gives a complete folder its name, after all of it has reached the disk, with a digest of every file."""
    paths = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    digests = dict(zip((str(path.relative_to(aside)) for path in paths), _digests(paths), strict=True))
    _write_json(aside / MANIFEST, digests)
    sync_to_disk(aside)
    if target.exists():  # a stranger, such as a file of the reference: nothing of it is lost
        number = next(n for n in range(1, 1 << 20) if not target.with_name(f"{target.name}.replaced-{n}").exists())
        target.rename(target.with_name(f"{target.name}.replaced-{number}"))
    aside.rename(target)
    sync_to_disk(target.parent, deep=False)


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:  # hashing leaves Python's lock
        return list(pool.map(digest, paths))


def _prune(config: Config, progress: Progress) -> None:
    """Removes what is no longer needed: checkpoints for restarts, but for those among the newest two; and finished
    epochs beyond keep_checkpoints, but never the first with the best accuracy of the latest stage."""
    everything = checkpoints(config.run_dir)
    for path in everything[:-2]:
        if not _is_of_finished_epoch(path):
            _remove(path)
    if config.keep_checkpoints is None:
        return
    best = max(progress.best.items(), default=None)  # of the latest stage
    for path in [path for path in everything if _is_of_finished_epoch(path)][: -config.keep_checkpoints]:
        accuracy = json.loads((path / "metrics.json").read_text(encoding="utf-8"))["accuracy"]
        if (read_description(path)["stage"], accuracy) == best:
            best = None
        else:
            _remove(path)


def remove_restarts(run_dir: Path) -> None:
    """Removes the checkpoints that only a restart needs: the run is done."""
    for path in checkpoints(run_dir):
        if not _is_of_finished_epoch(path):
            _remove(path)


def _remove(path: Path) -> None:
    """A kill in the middle leaves nothing that is called a checkpoint."""
    aside = path.with_name(f".removing-{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


# ---------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------


def newest_whole(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; None where there has never been one.

    Damaged ones are passed over with a warning. Raises UserError where all are damaged: starting from scratch would
    lose what may still be saved.
    """
    damaged = []
    for path in reversed(_ours(run_dir)):
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
        if json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))["format"] == 1:
            return None  # had no digests
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
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


def changes(config: Config, run_dir: Path) -> dict[str, str]:
    """Where a configuration departs from that of the run that the folder holds, in what decides the weights: key ->
    "key 1, not 2"."""
    try:
        before = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(before, dict):
        return {}
    free = set(FREE_KEYS)
    if config.global_batch_size is not None:
        free |= {"batch_size_training", "gradient_accumulation_steps"}
    if config.lr_scheduler == "constant":
        free.add("num_epochs")
    return {
        name: f"{name} {before[name]}, not {value}"
        for name, value in asdict(config).items()
        if name not in free and name in before and before[name] != value
    }


def read_progress(folder: Path) -> Progress:
    """How far the run was when it wrote this checkpoint."""
    state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(Progress)}
    progress = Progress(**{name: value for name, value in state.items() if name in known})
    progress.best = {int(stage): accuracy for stage, accuracy in progress.best.items()}
    return progress


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer of a checkpoint, on any number of ranks. Collective: every rank must call it."""
    optimizer.zero_grad()  # where gradients wait for a step, torch makes no state to load into, and says nothing
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "trainer" / "optimizer")
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])


def load_random_state(folder: Path, world: World) -> bool:
    """Restores this rank's random numbers; False where the checkpoint is of another world size and has none for it."""
    state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    if state["world_size"] != world.size:
        return False
    saved = torch.load(folder / "trainer" / f"random_{world.rank}.pt", weights_only=True)
    random.setstate(saved["python"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], world.device)
    return True


def _random_state(world: World) -> dict:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
    }
