"""The definition of Coconut (Hao et al. 2024, Section 3): no cache, one row at a time, everything recomputed for each
thought. Slow: coconut.py, the check of model families, benchmarks and exports are compared with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from model.backbone import decoder_of


def filled_embeddings(
    base: PreTrainedModel, input_ids: list[int], latent_token_id: int | None, embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns a row's input embeddings (1, T, D); a latent's is the last hidden state of the position before it.

    embeds: the token embeddings (1, T, D) to start from; default the model's own.
    """
    embeds = base.get_input_embeddings()(torch.tensor([input_ids], device=base.device)) if embeds is None else embeds
    for position, token in enumerate(input_ids):
        if token == latent_token_id:
            before = decoder_of(base)(inputs_embeds=embeds[:, :position], use_cache=False).last_hidden_state[:, -1:]
            embeds = torch.cat([embeds[:, :position], before.to(embeds.dtype), embeds[:, position + 1 :]], dim=1)
    return embeds


def loss(base: PreTrainedModel, rows: list[tuple[list[int], list[int]]], latent_token_id: int | None) -> torch.Tensor:
    """Returns the mean cross-entropy, in nats, of the supervised tokens (label != -100) of (input_ids, labels) rows."""
    logits, targets = [], []
    for input_ids, labels in rows:
        embeds = filled_embeddings(base, input_ids, latent_token_id)
        logits.append(base(inputs_embeds=embeds, use_cache=False).logits[0, :-1])  # (T - 1, V)
        targets += labels[1:]
    return F.cross_entropy(torch.cat(logits), torch.tensor(targets, device=base.device))
