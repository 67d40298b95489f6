"""Coconut whose thoughts form a Markov chain, given the question: a control for what a thought alone carries.

In Coconut a latent receives the previous thought as its input, and also attends to the keys and values of all earlier
latents, in every layer. With `thought: token`, these hidden states carry more than the token does. Here, of all
latents, a position attends only to the last one up to itself: from one latent to the next, nothing passes but the
thought, and what follows the latents reads the question and the last latent. A row thus equals the row without its
earlier latents, with the positions kept.

Legend: B rows, T columns of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import methods


class Method(methods.Method):
    has_latents = True

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method == "markov" and config.thought == "pause":
            yield "method markov computes thoughts one after the other, and thought pause has none"


# --- With torch ---

import torch

from coconut import Coconut
from model.layout import Rows
from utils import UserError


class Markov(Coconut):
    """Raises UserError for a family that does not attend by positions and masks only, and ValueError for a batch whose
    latents do not form one block."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if not self.backbone.makes_masks:
            family = self.base_causallm.config.model_type
            raise UserError(f"method markov needs plain causal attention in every layer, which family {family} lacks")

    def lay_out(self, *batch: torch.Tensor | None, **options) -> Rows:
        """Masks all latents of a row but its last. While a latent is computed it attends to itself nevertheless."""
        rows = super().lay_out(*batch, **options)
        if rows.columns and rows.columns != list(range(rows.columns[0], rows.columns[-1] + 1)):
            raise ValueError("the latents of method markov must form one block")
        is_latent = (rows.input_ids == self.latent_token_id).long()
        has_later = is_latent.sum(dim=1, keepdim=True) > is_latent.cumsum(dim=1)  # (B, T)
        visible = rows.attention_mask.masked_fill(is_latent.bool() & has_later, 0)
        return rows._replace(attention_mask=visible, masks=(rows.masks[0], True))

    def generate(self, *batch, edit=None, return_thoughts=False, **options):
        if options.keys() - {"input_ids", "attention_mask", "max_new_tokens", "position_ids"}:
            raise UserError("method markov decodes greedily: transformers' generate attends to all latents")
        return super().generate(*batch, edit=edit, return_thoughts=return_thoughts, **options)


MODEL = Markov
