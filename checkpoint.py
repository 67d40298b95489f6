"""Save, find, load, resume. The layout of a run's folder:

    save_path/name/
      config.yaml  metrics.jsonl  wandb/
      checkpoint_12/                       after 12 epochs
        model.safetensors config.json ...  a Hugging Face folder with its tokenizer
        coconut.json                       method, stage, c_thought, thought, markers
        trainer/                           what only a restart needs
        predictions.jsonl  metrics.json

A checkpoint is written aside and renamed when it is whole: whatever is called checkpoint_N and is a folder of ours is
whole. This module also reads what the reference implementation (facebookresearch/coconut) saved.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from coconut import Coconut
from dataset import END, LATENT, START, Markers
from utils import Config, UserError, World

FORMAT = 1  # of coconut.json and trainer/state.json


@dataclass
class Progress:
    """How far a run is. Part of every checkpoint."""

    epoch: int = 0  # finished epochs, and so the next one to run
    step: int = 0  # finished optimizer steps
    best: dict[int, float] = field(default_factory=dict)  # stage -> best validation accuracy
    wandb_id: str | None = None


# ---------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Anything else in the folder is a stranger, and left alone."""
    found = []
    for path in run_dir.glob("checkpoint_*"):
        number = re.fullmatch(r"checkpoint_(\d+)", path.name)
        if number and (path / "coconut.json").is_file() and (path / "trainer" / "state.json").is_file():
            found.append((int(number[1]), path))
    return [path for _, path in sorted(found)]


def resolve(load_model_path: str) -> Path:
    """What load_model_path points to: a file of the reference, a Hugging Face folder, or a run's newest checkpoint.

    Raises UserError where it is none of these.
    """
    path = Path(load_model_path)
    if path.is_file() or (path / "config.json").is_file():
        return path
    if checkpoints(path):
        return checkpoints(path)[-1]
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
    tokenizer = _load_tokenizer(config, folder)
    dtype = torch.bfloat16 if config.bf16_weights else torch.float32
    try:
        if config.from_scratch and source is None:
            shape = AutoConfig.from_pretrained(config.model_id)
            base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
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
        raise _not_loadable("load_model_path" if folder else "model_id", folder or config.model_id, error) from None
    has_marker_rows = False
    if source is not None and folder is None:
        n_markers = len({START, END, LATENT} - set(tokenizer.get_vocab()))
        has_marker_rows = _load_reference_file(base, source, rows_with_markers=len(tokenizer) + n_markers)
    markers = Markers(None, None, None, tokenizer.eos_token_id)
    if config.method == "coconut":
        markers = add_markers(tokenizer, base, initialise=not has_marker_rows)
    base.config.use_cache = True
    model = Coconut(base, markers.latent, markers.start, markers.end, markers.eos, thought=config.thought)
    return model, tokenizer, markers


def _load_tokenizer(config: Config, folder: Path | None):
    has_one = folder is not None and any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    source = folder if has_one else config.model_id
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_loadable("load_model_path" if has_one else "model_id", source, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no EOS token, without which no answer ends")
    return tokenizer


def _not_loadable(key: str, source, error: Exception) -> UserError:
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f"{key} {str(source)!r} cannot be loaded: it is neither a whole local Hugging Face folder nor to be had from "
        f"the hub ({first_line})"
    )


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


def _check_names(source, missing, unexpected, mismatched=()) -> None:
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names:
            names = sorted(names)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{title}: {', '.join(names[:4])}{more}")
    if problems:
        raise UserError(f"{source} does not fit the model: weights {'; '.join(problems)}")


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
    known = len(tokenizer)
    missing = [marker for marker in (START, END, LATENT) if marker not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing)
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
    start, end, latent = tokenizer.convert_tokens_to_ids([START, END, LATENT])
    return Markers(start, latent, end, tokenizer.eos_token_id)


# ---------------------------------------------------------------------------------------------------------------
# Saving and resuming
# ---------------------------------------------------------------------------------------------------------------


def save(
    config: Config,
    world: World,
    progress: Progress,
    model: Coconut,
    tokenizer,
    markers: Markers,
    stage: int,
    optimizer: torch.optim.Optimizer,
    files: dict[str, str],
) -> Path:
    """Writes run_dir/checkpoint_<finished epochs>. Collective: every rank must call it.

    Rank 0 writes the model and `files` (name -> text), each rank its random state, all together the optimizer.
    """
    target = config.run_dir / f"checkpoint_{progress.epoch}"
    aside = config.run_dir / f".writing-{target.name}"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)  # of a job that was killed
        (aside / "trainer").mkdir(parents=True)
    dist.barrier()  # all ranks: the folder is there
    torch.save(_random_state(world), aside / "trainer" / f"random_{world.rank}.pt")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=aside / "trainer" / "optimizer")
    if world.is_main:
        model.base_causallm.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
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
        _write_json(aside / "coconut.json", description)
        _write_json(aside / "trainer" / "state.json", {"format": FORMAT, "world_size": world.size, **asdict(progress)})
    dist.barrier()  # all ranks: everything is written
    if world.is_main:
        _publish(aside, target)
        _prune(config, progress)
    dist.barrier()  # all ranks: the checkpoint has its name
    return target


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _publish(aside: Path, target: Path) -> None:
    """Gives a complete folder its name, after all of it has reached the disk."""
    for path in [*aside.rglob("*"), aside]:
        _sync(path)
    if target.exists():  # a stranger, such as a file of the reference: nothing of it is lost
        number = next(n for n in range(1, 1 << 20) if not target.with_name(f"{target.name}.replaced-{n}").exists())
        target.rename(target.with_name(f"{target.name}.replaced-{number}"))
    aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(config: Config, progress: Progress) -> None:
    """Removes the oldest checkpoints beyond keep_checkpoints, but never the first with the best of the latest stage."""
    if config.keep_checkpoints is None:
        return
    everything = checkpoints(config.run_dir)
    best = max(progress.best.items(), default=None)  # of the latest stage
    for path in everything[: -config.keep_checkpoints]:
        accuracy = json.loads((path / "metrics.json").read_text(encoding="utf-8"))["accuracy"]
        if (read_description(path)["stage"], accuracy) == best:
            best = None
        else:
            shutil.rmtree(path)


def read_progress(folder: Path) -> Progress:
    """How far the run was when it wrote this checkpoint."""
    state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    best = {int(stage): accuracy for stage, accuracy in state["best"].items()}
    return Progress(state["epoch"], state["step"], best, state["wandb_id"])


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
