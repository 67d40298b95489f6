"""Thoughts: the base class, the paper's own thought, and the registry of all others.

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
    """The inputs of a thought. The hidden states and the embedding carry gradients.

    If a method computes K thoughts at once, there are K positions instead of 1, and no stream.
    """

    hidden: torch.Tensor  # (B, 1, D) last hidden state of the previous position, after the final norm
    embedding: torch.Tensor  # (B, 1, D) input embedding of this position's token: in latent rows the latent token
    stream: torch.Tensor | None  # (L + 1, B, 1, D) residual stream of the previous position, if needs_layers
    prepared: Any  # the result of the thought's `precompute` for this batch
    backbone: Any = None  # gives the LM head, `head`, and the embeddings, `embed` and `input_embeddings`


class Thought(nn.Module):
    """Base class of all thoughts.

    Args:
        base: the model of the thought. It may be on the meta device, where only shapes and dtypes exist.
        number: what follows the colon in the spelling, or None.
    """

    sequential = True  # whether a latent position waits for the hidden states of the previous position
    needs_layers = False  # whether the thought needs the residual stream between the blocks
    in_place = False  # whether `hidden` is that of the same position in the previous pass over a block of latents

    def __init__(self, base: PreTrainedModel, number: int | float | str | None = None):
        super().__init__()

    def precompute(self, inputs: torch.Tensor, outputs: torch.Tensor) -> Any:
        """Called once per batch with latents, without gradients, with the input and output embeddings, (V, D) each. The
        input embeddings are those that the model receives, after any scaling by its embedding module.

        The constructor cannot do this: training changes the embeddings, and FSDP gathers them only in a forward pass.
        """
        return None

    @torch.no_grad()
    def precomputed(self, vocabulary) -> Any:
        """Returns the result of `precompute` for the current weights of a model.backbone.Vocabulary."""
        if type(self).precompute is Thought.precompute:  # some models compute all input embeddings anew
            return None
        return self.precompute(vocabulary.input_embeddings(), vocabulary.base.get_output_embeddings().weight)


REGISTRY: dict[str, type[Thought]] = {}


def register(name: str, takes: str = "") -> Callable[[type[Thought]], type[Thought]]:
    """Registers a thought under the name that configurations use. `takes` is what may follow the name: nothing, a layer
    ":N", a threshold "[:T]", a width "[:P]" or "[:st]". Both must be literals, because config.THOUGHTS reads them from
    the source."""

    def add(thought: type[Thought]) -> type[Thought]:
        REGISTRY[name] = thought
        return thought

    return add


def make_thought(spelling: str, base: PreTrainedModel) -> Thought:
    """Returns the thought of a spelling, for a model. Raises UserError that lists all spellings."""
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
