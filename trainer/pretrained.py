"""Loads a model and its tokenizer from the hub, a folder or a file of the reference, and adds the latent markers.

The reference implementation (facebookresearch/coconut) saves a state dict with torch.save. All other sources are
Hugging Face folders; a checkpoint of this program adds coconut.json and, if the thought learns, thought.safetensors.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import methods
from coconut import Coconut
from config import Config
from curriculum import END, LATENT, START, Markers
from dataset import StageDataset
from methods import modern, rules_of
from model import lora
from model.thought import Thought
from preprocessing.examples import LFS_POINTER
from trainer.check_family import check_family
from trainer.files import check_names, check_weights, read_weights, reading, reason_of
from utils import UserError, read_object

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # every kind of tokenizer has one of these
THOUGHT_FILE = "thought.safetensors"
BASE = "base_causallm."  # prefix of the base model's names in a Coconut's state dict
HUB_TIMEOUT = 5  # seconds


class Pretrained(NamedTuple):
    """A model with its tokenizer and the ids of its markers."""

    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    markers: Markers


class Parts(NamedTuple):
    """The classes and functions that implement config.method."""

    model: type[Coconut]
    options: dict  # arguments of its constructor, beside Coconut's
    dataset: type[StageDataset]
    validate: Callable | None  # replaces trainer.evaluate.evaluate, with the same arguments
    on_device: Callable  # (trainer.setup.Run, batch on the device) -> the batch for the model's forward


def parts_of(config: Config) -> Parts:
    """Returns the parts of config.method, mixed with those of methods whose `mixes_in` is true. An eval-only run uses
    Coconut if the method says `evaluates_as_coconut`."""
    is_plain = config.method in methods.CORE or (config.only_eval and config.rules.evaluates_as_coconut)
    own = None if is_plain else methods.implementation(config.method)
    model, dataset = getattr(own, "MODEL", Coconut), getattr(own, "DATASET", StageDataset)
    validate = getattr(own, "validate", None)
    options = config.rules.options(config) if own is not None else {}
    for name, rules in methods.all_rules().items():
        if rules.mixes_in(config):
            other = methods.implementation(name)
            model = _mixed(model, other.MODEL)
            dataset = _mixed(dataset, getattr(other, "DATASET", StageDataset))
            validate = getattr(other, "validate", validate)
            options |= rules.options(config)
    on_device = getattr(own, "on_device", lambda _, batch: batch)
    return Parts(model, options, dataset, validate, on_device)


def _mixed(own: type, other: type) -> type:
    """Returns a class that derives from both."""
    if issubclass(other, own) or issubclass(own, other):
        return other if issubclass(other, own) else own
    return type(own.__name__, (own, other), {})


def make_model(config: Config, base: PreTrainedModel, markers: Markers) -> Coconut:
    """Wraps a causal LM in the model class of config.method."""
    tokens, parts = (markers.latent, markers.start, markers.end, markers.eos), parts_of(config)
    return parts.model(base, *tokens, thought=config.thought, **parts.options)


# --- Loading ---


def load_model(config: Config, source: Path | None, cached: bool = False) -> Pretrained:
    """Loads `source` (see `run_folder.resolve`), or config.model_id if it is None.

    A method with latents adds missing markers to the tokenizer and an embedding row for each to the model.
    cached: the files are in the hub's cache, and no request goes to the hub.
    Raises UserError if names or shapes of weights do not fit model_id.
    """
    folder = source if source is not None and source.is_dir() else None
    tokenizer = load_tokenizer(config, folder, cached)
    dtype = torch.bfloat16 if config.bf16_weights else torch.float32
    where, key = (config.model_id, "model_id") if folder is None else (folder, "load_model_path")
    with loading(key, where):
        if config.from_scratch and source is None:
            shape, trust = shape_of(config, source, cached), config.trust_remote_code
            base = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=trust)
        else:
            if folder is not None:
                _check_same_shape(config, folder)
            options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
            base, report = AutoModelForCausalLM.from_pretrained(where, **options, **hub_options(config, where, cached))
            shapes = [f"{name} {[*saved]} instead of {[*own]}" for name, saved, own in report["mismatched_keys"]]
            check_names(where, report["missing_keys"], report["unexpected_keys"] if folder else (), shapes)
    has_marker_rows = False
    if source is not None and folder is None:
        n_markers = len({START, END, LATENT} - set(tokenizer.get_vocab()))
        rows = len(tokenizer) + n_markers
        has_marker_rows = _load_reference_file(base, source, rows_with_markers=rows, method=config.method)
    if config.has_latents:
        # LoRA does not train the rows: equal ones could never tell a marker from the others or from "<<"
        markers = add_markers(tokenizer, base, initialise=not has_marker_rows, distinct=config.lora_rank is not None)
    else:
        markers = add_marker_tokens(tokenizer, config.method)
    base.config.use_cache = True
    _stop_at(base, markers.eos)
    model = make_model(config, base, markers)
    if folder is not None:
        _load_thought(model.thought, config.thought, folder)
        if read_description(folder).get("lora_rank") and not (folder / lora.FOLDER).is_dir():
            raise UserError(f"{folder} was trained with lora_rank, but lacks {lora.FOLDER}/")
    check_family(model, config.gradient_checkpointing and not config.only_eval)
    if hasattr(model, "load_companion"):
        model.load_companion(config, folder, partial(_load_another, config, base.dtype, cached))
    lora.apply_lora(base, config.lora_rank, config.lora_alpha, folder, config.lora_dropout)
    return Pretrained(model, tokenizer, markers)


def _load_another(config: Config, dtype: torch.dtype, cached: bool, model_id: str) -> PreTrainedModel:
    with loading("model_id", model_id):
        return AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype, **hub_options(config, model_id, cached))


def _stop_at(base: PreTrainedModel, eos: int) -> None:
    """Adds the tokenizer's EOS, which ends every answer, to the stop tokens of Hugging Face's `generate`."""
    if base.generation_config is not None:
        known = base.generation_config.eos_token_id
        known = [] if known is None else known if isinstance(known, list) else [known]
        if eos not in known:
            base.generation_config.eos_token_id = [eos, *known] if known else eos


def _load_thought(thought: Thought, spelling: str, folder: Path) -> None:
    """Loads the thought's weights if the folder is a checkpoint with this thought; else keeps the initial ones."""
    path, own = folder / THOUGHT_FILE, thought.state_dict()
    if path.is_file():
        thought.load_state_dict(read_weights(path, own, f"thought {spelling}"))
    elif own and read_description(folder).get("thought") == spelling:
        raise UserError(f"{folder} was trained with the thought {spelling}, but lacks {THOUGHT_FILE}")


def shape_of(config: Config, source: Path | None, cached: bool = False) -> PreTrainedConfig:
    """Returns the model's transformers configuration. Raises UserError if it cannot be loaded."""
    where = source if source is not None and source.is_dir() else config.model_id
    with loading("model_id", where):
        return AutoConfig.from_pretrained(where, **hub_options(config, where, cached))


def _check_same_shape(config: Config, folder: Path) -> None:
    """Raises UserError if the checkpoint's shape differs from model_id's; does nothing if model_id is not cached."""
    model_id, options = config.model_id, hub_options(config, folder)
    try:
        wanted = AutoConfig.from_pretrained(model_id, **options | {"local_files_only": True})
    except (OSError, ValueError):
        return
    found = AutoConfig.from_pretrained(folder, **options)
    differ = []
    for name in ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"):
        in_folder, in_model = getattr(found, name, None), getattr(wanted, name, None)
        if in_folder != in_model:
            differ.append(f"{name} {in_folder} instead of {in_model}")
    if differ:
        raise UserError(f"{folder} is a checkpoint of another model: {'; '.join(differ)} as in model_id {model_id!r}")


def read_description(folder: Path) -> dict:
    """Reads a checkpoint's coconut.json; {} for other Hugging Face folders. Raises UserError if it is damaged."""
    path = folder / "coconut.json"
    if not path.is_file():
        return {}
    description = read_object(path)
    problems = Config.problems_of(description)
    stage = description.get("stage", 0)
    if type(stage) is not int or stage < 0:
        problems.append(f"stage must be a whole number from 0 on, not {stage!r}")
    if not isinstance(description.get("validated_on") or {}, dict):
        problems.append(f"validated_on must be an object, not {description['validated_on']!r}")
    if problems:
        raise UserError(f"{path} is damaged: {'; '.join(problems)}")
    return modern(description)


# --- The tokenizer and the markers ---


def load_tokenizer(config: Config, folder: Path | None = None, cached: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint's folder or, if it holds none, of config.model_id. Raises UserError."""
    names = ("tokenizer.json", "tokenizer_config.json")
    has_one = folder is not None and any((folder / name).exists() for name in names)
    source, key = (folder, "load_model_path") if has_one else (config.model_id, "model_id")
    with loading(key, source):
        try:
            tokenizer = read_tokenizer(source, **hub_options(config, source, cached))
        except UserError as error:
            raise UserError(f"{key} {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no EOS token, and an answer ends with one")
    return tokenizer


def read_tokenizer(source: str | Path, **options) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or hub id, in the class that its files declare. For some families, such as Qwen2,
    transformers ignores the declaration, and its own class drops the tokens of another vocabulary. Raises UserError if
    a folder has no tokenizer; transformers would return an empty one."""
    options = {"trust_remote_code": False} | options
    if Path(source).is_dir():
        with reading():
            names = os.listdir(source)
        if not any(fnmatch(name, files) for name in names for files in TOKENIZER_FILES):
            raise UserError(f"{source} has no tokenizer")
    declared = get_tokenizer_config(str(source), **options).get("tokenizer_class")
    is_generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if is_generic else AutoTokenizer).from_pretrained(source, **options)


def hub_options(config: Config, source: str | Path, cached: bool = False) -> dict:
    """Returns options of transformers' from_pretrained: no requests to a hub that does not answer, and a model's own
    code runs only with config.trust_remote_code (by default, transformers would ask on standard input)."""
    is_local = cached or Path(source).is_dir() or hub_problem() is not None
    return {"local_files_only": is_local, "trust_remote_code": config.trust_remote_code}


@cache
def hub_problem() -> str | None:
    """Returns why the hub gives no files, or None. It is asked only once: transformers would retry for minutes, file by
    file."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # from the HTTP library, a proxy or a certificate
        return f"the hub does not answer ({constants.ENDPOINT}: {error or type(error).__name__})"
    return None


@contextmanager
def loading(key: str, source) -> Iterator[None]:
    """Turns every exception of transformers into a UserError: the hub, a damaged file or a missing package may raise
    any of them. key: the configuration key that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} {str(source)!r} cannot be loaded: {_why_not_loadable(source, error)}") from None


def _why_not_loadable(source, error: Exception) -> str:
    reason = reason_of(error)
    if Path(source).is_dir() and (problem := _unreadable_file(Path(source))):
        return problem
    if "trust_remote_code" in str(error):
        how = "set trust_remote_code: true, or --trust-remote-code, to run it"
        return f"it has Python code of its own: read that code, and {how}"
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed: {reason}"
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    if status := _http_status(error):
        return f"{reason}; the hub's last answer was HTTP {status}"
    if Path(source).is_dir():
        return f"{reason} (the folder must be a whole Hugging Face model)"
    if problem := hub_problem():
        how = "download it where there is a network (HF_HUB_OFFLINE=1 then asks no hub), or name a local folder"
        return f"it has not been downloaded, and {problem}: {how}"
    return f"{reason} (it is no local folder; on the hub it must be a whole Hugging Face model)"


def _unreadable_file(folder: Path) -> str | None:
    """Returns what is wrong with a file of a folder, in clearer words than those of the library that failed to read it;
    None if nothing is found."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return f"{path.name} is a Git LFS pointer, which `git lfs pull` replaces by the file"
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror}"
    return None


def _http_status(error: BaseException | None) -> int | None:
    """Returns the HTTP status that caused an exception, or None: transformers reports all of them as no connection."""
    while error is not None:
        if status := getattr(getattr(error, "response", None), "status_code", None):
            return status
        error = error.__cause__ or error.__context__
    return None


def add_marker_tokens(tokenizer, method: str) -> Markers:
    """Adds missing markers to a tokenizer, in the reference's order, and returns all ids; for a method without latents
    only EOS. Raises UserError if the tokenizer would give a marker the id of another token."""
    if not rules_of(method).has_latents:
        return Markers(None, None, None, tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([START, END, LATENT])  # new ids begin at the number of tokens, not after the highest id
    start, end, latent = tokenizer.convert_tokens_to_ids([START, END, LATENT])
    for token in vocabulary.keys() - {START, END, LATENT}:
        if vocabulary[token] in (start, end, latent):
            raise UserError(
                f"the tokenizer cannot take the markers of the latent positions: its ids have gaps, and a marker would "
                f"get the id {vocabulary[token]} of the token {token!r}; number the tokens without gaps"
            )
    return Markers(start, latent, end, tokenizer.eos_token_id)


@torch.no_grad()
def add_markers(tokenizer, base: PreTrainedModel, initialise: bool = True, distinct: bool = False) -> Markers:
    """Adds missing markers to tokenizer and model, with rows in the reference's order, and returns their ids.

    A new row of the input and of the output embedding, tied or not, starts as a copy of the row of "<<" if the
    tokenizer has that token, else as the mean row.
    initialise: False if the markers' rows have been loaded.
    distinct: draw new rows from a normal distribution with mean and standard deviation of all rows instead.
    """
    rows, vocabulary = base.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    known = min(len(tokenizer), rows)
    missing = [marker for marker in (START, END, LATENT) if vocabulary.get(marker, rows) >= rows]
    markers = add_marker_tokens(tokenizer, "coconut")
    if len(tokenizer) > rows:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = base.get_input_embeddings().weight.shape[0]
    if max(markers[:3]) >= rows:
        raise UserError(
            f"the tokenizer's ids have gaps: a marker has the id {max(markers[:3])}, and the model {rows} rows"
        )
    if missing and initialise:
        like = tokenizer.convert_tokens_to_ids("<<")
        is_token = like is not None and like != tokenizer.unk_token_id
        new = tokenizer.convert_tokens_to_ids(missing)
        drawn = torch.randn(len(new), base.get_input_embeddings().weight.shape[1])
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            for values in (module.weight, getattr(module, "bias", None)):
                if values is not None and distinct:
                    mean, deviation = values[:known].float().mean(dim=0), values[:known].float().std(dim=0)
                    values[new] = (mean + deviation * (drawn if values.ndim > 1 else 0)).to(values.dtype)
                elif values is not None:
                    values[new] = values[like].clone() if is_token else values[:known].mean(dim=0)
    return markers


# --- Files of the reference ---


def _load_reference_file(base: PreTrainedModel, path: Path, rows_with_markers: int, method: str) -> bool:
    """Loads a state dict of the reference, of the bare model or of its Coconut wrapper; returns whether it holds the
    markers' rows. If its embeddings have `rows_with_markers` rows, the model's are resized first. Raises UserError, as
    the reference does for a Coconut's weights under a method without latents."""
    try:
        # only a zip archive, the format since torch 1.6, can be memory-mapped
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is no file of weights, or it holds other objects than tensors, which could run code"
        ) from None
    except Exception as error:  # torch passes on every exception of the unpickler
        raise UserError(f"{path} is no file of weights: {reason_of(error)}") from None
    pairs = saved.items() if isinstance(saved, dict) else ()
    if not pairs or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in pairs
    ):
        raise UserError(f"{path} is no state dict: it must map names to dense tensors")
    wrappers = r"^(module\.|_orig_mod\.)+|(_fsdp_wrapped_module|_orig_mod)\."  # of DDP, FSDP and torch.compile
    saved = {re.sub(wrappers, "", name): saved[name] for name in saved}
    wrapped = any(name.startswith(BASE) for name in saved)
    if wrapped and not rules_of(method).has_latents:
        raise UserError(f"{path} holds the weights of a Coconut, which method {method} would run without its thoughts")
    if wrapped:
        # the reference's wrapper registers the input embedding twice, the second time as `embedding.weight`
        saved.pop("embedding.weight", None)
        saved = {name.removeprefix(BASE): value for name, value in saved.items()}
    # buffers that older transformers releases saved, such as GPT-2's causal mask
    ignored = "|".join([*(base._keys_to_ignore_on_load_unexpected or ()), r"\.masked_bias$", "inv_freq$"])
    names = base.state_dict().keys()
    saved = {name: value for name, value in saved.items() if name in names or not re.search(ignored, name)}
    embedding = base.get_input_embeddings()
    row_name = next(name for name, module in base.named_modules() if module is embedding) + ".weight"
    resized = row_name in saved and len(saved[row_name]) == rows_with_markers != embedding.weight.shape[0]
    if resized:
        base.resize_token_embeddings(rows_with_markers, mean_resizing=False)
    own, tied = base.state_dict(), {}  # tied: address -> names of the file
    for name in own.keys() & saved.keys():
        tied.setdefault(own[name].data_ptr(), []).append(name)
    untied = {name: value for name, value in own.items() if name in saved or value.data_ptr() not in tied}
    check_weights(path, untied, saved)
    for first, *others in tied.values():
        if not all(_equal(saved[first], saved[other]) for other in others):
            names = " and ".join(sorted([first, *others]))
            raise UserError(f"{path} does not fit the model, which ties {names}: they differ")
    n_rows = len(saved.get(row_name, ()))
    if wrapped and n_rows < rows_with_markers:
        raise UserError(
            f"{path} holds a Coconut without rows for the markers: its embedding has {n_rows} rows, and the "
            f"tokenizer with the markers has {rows_with_markers} tokens"
        )
    base.load_state_dict(saved, strict=False)
    return wrapped or resized


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether weights of any dtype are equal; NaN equals NaN."""
    return torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)
