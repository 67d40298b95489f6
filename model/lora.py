"""LoRA (arXiv 2106.09685) through peft: freezes the base and trains low-rank updates of its linear layers.

All linear layers of the decoder blocks get an update. Embeddings, including the markers', and norms stay unchanged. A
thought's parameters and a step decoder are trained as without LoRA. A checkpoint holds the base's own weights, and the
updates in the folder adapter/ in peft's format: AutoModelForCausalLM.from_pretrained reads the former, and
PeftModel.from_pretrained adds the latter. Without lora_rank, loading merges the updates into the weights.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from model.backbone import decoder_blocks
from trainer.files import read_weights, reason_of
from utils import UserError, read_object

FOLDER = "adapter"
NAME = "default"  # peft's name of a model's only adapter
UPDATE = re.compile(rf"\.(lora_[AB])\.{NAME}\.")


def _peft():
    try:
        import peft
    except ImportError:
        raise UserError("lora_rank needs the package peft: pip install peft") from None
    return peft


def _settings(rank: int, alpha: int, layers: list[str], dropout: float = 0.0):
    return _peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(layers), task_type="CAUSAL_LM"
    )


def targets_of(base: PreTrainedModel) -> list[str]:
    """Returns the names of the linear layers in the decoder blocks, except subclasses with another forward, such as
    some routers."""
    blocks = {module for block in decoder_blocks(base) for module in block.modules()}
    return [
        name
        for name, module in base.named_modules()
        if module in blocks and getattr(type(module), "forward", None) in (nn.Linear.forward, Conv1D.forward)
    ]


def add(base: PreTrainedModel, rank: int, alpha: int, dropout: float = 0.0) -> None:
    """Freezes the base and adds updates, alpha / rank B A with B = 0, whose input has dropout in training. Raises
    UserError if peft is missing or does not support the family."""
    peft, targets = _peft(), targets_of(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that GPT-2's matrices are transposed, and handles it
            peft.inject_adapter_in_model(_settings(rank, alpha, targets, dropout), base, adapter_name=NAME)
    except (ValueError, TypeError) as error:
        family = base.config.model_type
        raise UserError(f"lora_rank: peft does not support the family {family}: {reason_of(error)}") from None
    base.get_input_embeddings().register_forward_hook(_want_gradient)


def _want_gradient(_, __, embeds: torch.Tensor) -> torch.Tensor:
    """Makes the embeddings require gradients. FSDP reduces a block's gradients once the gradient of the block's input
    is there. With frozen embeddings only ranks with thoughts would have such gradients, and the ranks would wait for
    each other at different blocks."""
    return embeds.requires_grad_() if torch.is_grad_enabled() else embeds


def layers_of(base: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Returns the layers with updates, by their names in the base."""
    layer_class = _peft().tuners.tuners_utils.BaseTunerLayer
    return {name: module for name, module in base.named_modules() if isinstance(module, layer_class)}


def merge(base: PreTrainedModel) -> None:
    """Adds the updates to the weights and removes their layers. Frozen parameters stay frozen."""
    for name, layer in layers_of(base).items():
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(parent), attribute, layer.get_base_layer())


def split(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns (the base's own weights under their names without LoRA, the updates under peft's names)."""
    own = {name.replace(".base_layer.", "."): value for name, value in weights.items() if not UPDATE.search(name)}
    updates = {
        "base_model.model." + UPDATE.sub(r".\1.", name): value for name, value in weights.items() if UPDATE.search(name)
    }
    return own, updates


def save(folder: Path, updates: dict[str, torch.Tensor], rank: int, alpha: int) -> None:
    """Writes the folder adapter/ of a checkpoint."""
    (folder / FOLDER).mkdir()
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in updates}
    _settings(rank, alpha, sorted(layers)).save_pretrained(folder / FOLDER)
    updates = {name: value.contiguous() for name, value in updates.items()}
    save_file(updates, folder / FOLDER / "adapter_model.safetensors")


def load(base: PreTrainedModel, folder: Path) -> None:
    """Loads the updates of a checkpoint's folder into a base with updates. Raises UserError if they do not fit."""
    _, own = split(base.state_dict())
    saved = read_weights(folder / FOLDER / "adapter_model.safetensors", own, "model and lora_rank")
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)


def apply_lora(base: PreTrainedModel, rank: int | None, alpha: int, folder: Path | None, dropout: float = 0.0) -> None:
    """Adds the updates that a configuration asks for; loads those of a checkpoint's folder, if it has any."""
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    if folder is not None and (folder / FOLDER).is_dir():
        path = folder / FOLDER / "adapter_config.json"
        theirs = read_object(path)
        if not all(type(theirs.get(name)) is int for name in ("r", "lora_alpha")):
            raise UserError(f"{path} lacks r and lora_alpha: run.py did not write it")
        add(base, theirs["r"], theirs["lora_alpha"], dropout)
        load(base, folder)
        if (rank, alpha) == (theirs["r"], theirs["lora_alpha"]):
            return
        merge(base)
        for parameter in trained:
            parameter.requires_grad_(True)
    if rank is not None:
        add(base, rank, alpha, dropout)
