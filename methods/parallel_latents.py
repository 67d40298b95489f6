"""Latents in parallel: those of a row are one block, which is run several times over the cache of what is before it.

A latent's input is made from hidden states of the pass before, those of all latents at once; so a pass over the block
takes the place of a pass for each latent. What follows the block attends to the keys and values of its last pass.
Gradients run through all passes. What is fed is up to the thought:

- PCCoT (arXiv 2506.18582): the hidden state of the column before, as in Coconut. In the first pass the latents hold the
  embedding of the latent token; after t more the first t thoughts are those of Coconut. With as many as there are
  latents the result is Coconut's.
- LOTUS (arXiv 2606.31779), thought `looped`: the latent token's embedding plus the hidden state of the same column.

Legend: B rows, T columns of a batch, K columns of the block, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache

from model.kv_cache import forked_cache, grown
from model.thought import Seen


def run_block(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    masked: bool,
    columns: Sequence[int],
    new_columns: int,
) -> tuple[torch.Tensor, torch.Tensor, Cache, torch.Tensor]:
    """`Coconut._run` for a model with `latent_passes`; `masked` as in `Coconut.span`.

    Raises ValueError where the latents of a batch are not one block that begins in the same column of each row.
    """
    begin, end, width = columns[0], columns[-1] + 1, input_ids.shape[1]
    is_latent = input_ids[:, begin:end] == model.latent_token_id  # (B, K)
    if list(columns) != list(range(begin, end)):
        raise ValueError("latents that are made in parallel must stand in one block")
    embeds, prepared = model._embed(input_ids), model._precompute()
    before, block, after = embeds.split([begin, end - begin, width - end], dim=1)
    cache = forked_cache(model.base_causallm.config, kept=begin)
    n_updates = model.latent_updates(end - begin)

    def run(span: torch.Tensor, first: int, pass_number: int) -> torch.Tensor:
        last = first + span.shape[1]
        if pass_number == n_updates:  # the last pass, which what is generated attends to
            for layer in cache.layers:
                layer.kept = None
        return model.span(span, attention_mask[:, :last], position_ids[:, first:last], masked, cache)

    hidden = run(torch.cat([before, block], dim=1) if n_updates else embeds, 0, 0)
    if hidden.requires_grad and model.before_first_span is not None:
        hidden.register_hook(lambda _, tell=model.before_first_span: tell())
    prefix, states = hidden[:, :begin], hidden[:, begin:end]  # (B, ., D)
    fed = block
    for number in range(1, n_updates + 1):
        shifted = torch.cat([prefix[:, -1:], states], dim=1)[:, :-1]
        made_from = states if model.thought.in_place else shifted
        thought = model.thought(Seen(made_from, block, None, prepared, model))
        changes = is_latent & model.still_updated(is_latent, number)  # rows may be done before others
        fed = torch.where(changes[..., None], thought.to(block.dtype), fed)
        if number < n_updates:
            states = run(fed, begin, number)
        else:
            hidden = torch.cat([prefix, run(torch.cat([fed, after], dim=1), begin, number)], dim=1)
    if new_columns:
        cache = grown(cache, width + new_columns)
    return hidden, torch.cat([before, fed, after], dim=1), cache, attention_mask
