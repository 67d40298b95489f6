"""Coconut by definition (Hao et al. 2024, Section 3): without a cache, a row at a time, everything recomputed for each
thought. Slow, and what coconut.py, the check of a model family, benchmarks and exports are compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from model.backbone import decoder_of


def filled_embeddings(
    base: PreTrainedModel, input_ids: list[int], latent_token_id: int | None, embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """(1, T, D): the input embeddings of a row; where a latent stands, the last hidden state of the position before.

    embeds: the embeddings (1, T, D) of the tokens; default those that the model gives them.
    """
    embeds = base.get_input_embeddings()(torch.tensor([input_ids], device=base.device)) if embeds is None else embeds
    for position, token in enumerate(input_ids):
        if token == latent_token_id:
            before = decoder_of(base)(inputs_embeds=embeds[:, :position], use_cache=False).last_hidden_state[:, -1:]
            embeds = torch.cat([embeds[:, :position], before.to(embeds.dtype), embeds[:, position + 1 :]], dim=1)
    return embeds


def loss(base: PreTrainedModel, rows: list[tuple[list[int], list[int]]], latent_token_id: int | None) -> torch.Tensor:
    """Mean cross-entropy in nats over the supervised tokens of (input_ids, labels) rows; labels of -100 are not."""
    losses = []
    for input_ids, labels in rows:
        embeds = filled_embeddings(base, input_ids, latent_token_id)
        logits = base(inputs_embeds=embeds, use_cache=False).logits[0, :-1]  # (T - 1, V)
        losses.append(F.cross_entropy(logits, torch.tensor(labels[1:], device=logits.device), reduction="none"))
    return torch.cat(losses).sum() / sum(label != -100 for _, labels in rows for label in labels[1:])
