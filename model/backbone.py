"""A Hugging Face causal LM as Coconut calls it.

Legend: B rows, D hidden size, L decoder blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from utils import UserError


def decoder_of(base: PreTrainedModel) -> PreTrainedModel:
    """What makes the hidden states from input embeddings.

    transformers' get_decoder guesses by names, and gives the ModernBERT decoder's LM head, and the whole of a Llama 4.
    """
    decoder = base.get_decoder()
    if decoder is base or not isinstance(decoder, PreTrainedModel):
        inner = [module for module in base.children() if isinstance(module, PreTrainedModel)]
        return inner[0] if len(inner) == 1 else decoder
    return decoder


def decoder_blocks(base: PreTrainedModel) -> list[nn.Module]:
    """The L decoder blocks, which the model itself names, or those that transformers could checkpoint; none where it
    has no such thing."""
    modules = list(decoder_of(base).modules())
    named = [module for module in modules if type(module).__name__ in (base._no_split_modules or ())]
    blocks = named or [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inner]


class StreamRecorder:
    """The residual stream of the last column of a pass: what the first block is given and what each block returns.

    transformers' output_hidden_states would keep all columns of all layers until the pass is over, and the last of its
    states is after the final norm.
    """

    def __init__(self, blocks: list[nn.Module]):
        if not blocks:
            raise UserError("a thought from the layers needs a model that names its decoder blocks")
        self.states: list[torch.Tensor] | None = None  # while a pass is recorded
        self.columns: torch.Tensor | None = None
        for block in blocks:
            block.register_forward_hook(self._record, with_kwargs=True)

    @contextmanager
    def recording(self, columns: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
        """The list to which the pass inside appends L + 1 states, (B, 1, D) each: of its last column, or of another
        one in each row, (B,) int64."""
        self.states, self.columns = [], columns
        try:
            yield self.states
        finally:
            self.states = None

    @torch.compiler.disable  # a list that grows would be another graph at each length
    def _record(self, _, args: tuple, kwargs: dict, output) -> None:
        if self.states is None:
            return
        if not self.states:
            given = args[0] if args else kwargs["hidden_states"]
            self.states.append(self._last(given))
        self.states.append(self._last(output[0] if isinstance(output, tuple) else output))

    def _last(self, state: torch.Tensor) -> torch.Tensor:
        if self.columns is None:
            return state[:, -1:]
        return state.gather(1, self.columns[:, None, None].expand(-1, 1, state.shape[-1]))
