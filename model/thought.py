"""What a latent position is fed: the base class, which is the paper's own thought, and the names of all others.

Legend: B rows, D hidden size, V vocabulary, L decoder blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from config import THOUGHTS, split_thought
from utils import UserError


class Seen(NamedTuple):
    """What a thought may be made of. The hidden states and the embedding carry gradients.

    Where a method makes K thoughts at once there are K positions in place of the 1, and no stream.
    """

    hidden: torch.Tensor  # (B, 1, D) last hidden state of the position before, after the final norm
    embedding: torch.Tensor  # (B, 1, D) input embedding of the token at this position: in latent rows the latent token
    stream: torch.Tensor | None  # (L + 1, B, 1, D) residual stream of the position before, where needs_layers
    prepared: Any  # what the thought's `precompute` has returned for this batch
    backbone: Any = None  # the model: its LM head, `head`, and its embeddings, `embed` and `input_embeddings`


class Thought(nn.Module):
    """What all thoughts have in common: the class to derive one from.

    Args:
        base: the model that the thought is for. It may be on the meta device: only shapes and dtypes are there.
        number: what the spelling has after the colon, if anything.
    """

    sequential = True  # whether a latent position waits for the hidden states of the position before it
    needs_layers = False  # whether the thought needs the residual stream between the blocks
    in_place = False  # whether `hidden` is that of the same position, in the pass before over a block of latents

    def __init__(self, base: PreTrainedModel, number: int | float | str | None = None):
        super().__init__()

    def precompute(self, inputs: torch.Tensor, outputs: torch.Tensor) -> Any:
        """Called once a batch that has latents, without gradients, with the input and output embeddings, (V, D) each:
        the input embeddings as the model gets them, where its embedding module scales its weights.

        They are had here, and not when the thought is made, because training changes them and FSDP has them whole
        only inside a forward pass.
        """
        return None


REGISTRY: dict[str, type[Thought]] = {}


def register(name: str, takes: str = "") -> Callable[[type[Thought]], type[Thought]]:
    """Gives a thought the name by which configurations call it, and says what may follow the name: nothing, a layer
    ":N", a threshold "[:T]" or a width "[:P]". config.THOUGHTS reads both from the source, so they must be literals."""

    def add(thought: type[Thought]) -> type[Thought]:
        REGISTRY[name] = thought
        return thought

    return add


def make_thought(spelling: str, base: PreTrainedModel) -> Thought:
    """The thought that is spelled so, for a model. Raises UserError that lists what there is."""
    try:
        name, number = split_thought(spelling)
    except ValueError as error:
        raise UserError(f"thought {error}, not {spelling!r}") from None
    importlib.import_module(THOUGHTS[name][1])
    return REGISTRY[name](base, number)


@register("last")
class Last(Thought):
    """The last hidden state, after the final norm: h_{t-1} is the embedding at t (arXiv 2412.06769, Section 3)."""

    def forward(self, seen: Seen) -> torch.Tensor:
        return seen.hidden
