"""Parallel latents: all latents of a row form one block, which runs several times over the cache of the prefix.

A latent's input is computed from hidden states of the previous pass, for all latents at once, so one pass over the
block replaces one pass per latent. The tokens after the block attend to the keys and values of its last pass. Gradients
run through all passes. The thought decides the input:

- PCCoT (arXiv 2506.18582): the hidden state of the previous position, as in Coconut. In the first pass the latents hold
  the latent token's embedding; after t further passes the first t thoughts equal Coconut's. With at least as many
  passes as latents, the result is Coconut's.
- LOTUS (arXiv 2606.31779), thought `looped`: the latent token's embedding plus the hidden state of the same position.

Legend: B rows, T columns of a batch, K columns of the block, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import methods
from methods import key


def split_passes(spelling: str) -> int | str | None:
    """Returns Coconut's latent_passes: None for sequential, a number, or "stage". Raises ValueError."""
    if spelling == "sequential":
        return None
    if spelling != "stage" and not re.fullmatch(r"\d{1,6}", spelling):
        raise ValueError("must be sequential, a number from 0 on, or stage")
    return spelling if spelling == "stage" else int(spelling)


class Method(methods.Method):
    has_latents = True
    variant_of = "coconut"
    defaults = {"latent_passes": "3"}
    latent_passes: str = key(
        "sequential",
        "sequential | T | stage: compute thoughts one by one, or all at once: in T passes after a first one over the "
        "latent token's embedding (PCCoT), or in one such pass per group of latents (LOTUS)",
        check=split_passes,
        later=True,
        shapes=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        in_parallel = config.latent_passes != "sequential"
        if config.method == "parallel_latents" and not in_parallel:
            yield "method parallel_latents needs latent_passes, a number or stage: sequential ones are method coconut"
        if in_parallel and not config.has_latents:
            yield f"latent_passes {config.latent_passes} needs latents, and method {config.method} has none"
        if in_parallel and config.thought == "pause":
            yield "latent_passes computes thoughts, and thought pause has none"
        if in_parallel and (config.thought_noise or config.thought_dropout):
            yield "thought_noise and thought_dropout need sequential thoughts: unset latent_passes"
        if config.latent_passes == "stage" and config.c_thought == 0:
            yield "latent_passes stage counts groups of c_thought latents, and c_thought is 0"
        if config.thought == "looped" and not in_parallel:
            yield "thought looped needs parallel latents: set latent_passes to stage or a number"

    @staticmethod
    def options(config) -> dict:
        return {"latent_passes": split_passes(config.latent_passes), "c_thought": config.c_thought}

    @staticmethod
    def mixes_in(config) -> bool:
        return config.latent_passes != "sequential"

    @staticmethod
    def older(values: dict) -> None:
        """Method coconut with latent_passes."""
        more = values.get("step_decoder", "none") != "none" or values.get("latent_labels")
        in_parallel = str(values.get("latent_passes", "sequential")) != "sequential"
        if values.get("method", "coconut") == "coconut" and in_parallel and not more:
            values["method"] = "parallel_latents"


# --- With torch ---

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from coconut import Coconut, Edit
from model.kv_cache import PLAIN_LAYERS
from model.layout import Rows, column_of
from model.thought import Seen
from utils import UserError


class ParallelLatents(Coconut):
    """Coconut that computes all latents at once.

    Args, besides those of Coconut:
        latent_passes: passes over the block after the first; "stage": as many as there are groups of latents.
        c_thought: latents of a group.

    Raises UserError for a family whose layers hold states that cannot be cut back, and for thoughts made from the
    layers.
    """

    one_by_one = False

    def __init__(self, *args, latent_passes: int | str = "stage", c_thought: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.latent_passes, self.c_thought = latent_passes, c_thought
        if self.thought.needs_layers:
            raise UserError("parallel latents do not record the layers that this thought needs")
        config = self.base_causallm.config
        if not all(type(layer) in PLAIN_LAYERS for layer in DynamicCache(config=config).layers):
            raise UserError(
                f"parallel latents need attention in every layer, which the model family {config.model_type} lacks"
            )

    @property
    def thinks(self) -> bool:
        return super().thinks and self.latent_passes != 0

    def _run(
        self, rows: Rows, new_columns: int = 0, edit: Edit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Same as `Coconut._run`. Raises ValueError unless the latents of a batch form one block that starts in the
        same column of each row."""
        if not rows.columns or not self.thought.sequential:
            return super()._run(rows, new_columns, edit)
        begin, end, width = rows.columns[0], rows.columns[-1] + 1, rows.input_ids.shape[1]
        if rows.columns != list(range(begin, end)):
            raise ValueError("parallel latents must form one block")
        if edit is not None:
            raise ValueError("parallel latents cannot be edited one by one")
        is_latent = rows.input_ids[:, begin:end] == self.latent_token_id  # (B, K)
        precomputed, n_updates = self.thought.precomputed(self.backbone), self.latent_updates(end - begin)
        row_updates: int | torch.Tensor = n_updates
        if self.latent_passes == "stage":  # each row has one update per group of its own latents
            row_updates = is_latent.sum(dim=1, keepdim=True) // self.c_thought  # (B, 1)
        before, block, after = self.backbone.embed(rows.input_ids).split([begin, end - begin, width - end], dim=1)
        # sliding windows are left to the mask
        cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=self.base_causallm.config).layers])

        def run(span: torch.Tensor, first: int) -> torch.Tensor:
            return self.backbone.span(span, *rows.part(first, first + span.shape[1]), cache)

        hidden = run(torch.cat([before, block, after][: 2 if n_updates else 3], dim=1), 0)
        prefix, states, fed = hidden[:, :begin], hidden[:, begin:end], block  # (B, ., D)
        for number in range(1, n_updates + 1):
            cache.crop(begin - end)  # back to the prefix
            shifted = torch.cat([column_of(prefix, rows.before), states[:, :-1]], dim=1)
            made_of = states if self.thought.in_place else shifted
            thought = self.thought(Seen(made_of, block, None, precomputed, self.backbone))
            changes = is_latent & (number <= row_updates)
            fed = torch.where(changes[..., None], thought.to(block.dtype), fed)
            if number < n_updates:
                states = run(fed, begin)
            else:
                hidden = torch.cat([prefix, run(torch.cat([fed, after], dim=1), begin)], dim=1)
        return hidden, torch.cat([before, fed, after], dim=1), cache

    def latent_updates(self, n_columns: int) -> int:
        """Returns how often a block of n_columns latents gets new inputs: its number of passes minus one. If each input
        comes from the previous position, K columns are exact after K updates and no longer change."""
        if self.latent_passes == "stage":
            return n_columns // self.c_thought
        return self.latent_passes if self.thought.in_place else min(self.latent_passes, n_columns)


MODEL = ParallelLatents
