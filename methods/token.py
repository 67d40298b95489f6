"""`token`: a thought that is a word, the control that separates what is continuous in a thought from what is serial.

Legend: B rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from model.thought import Seen, Thought, register


@register("token", takes="[:st]")
class Token(Thought):
    """The input embedding of the token that the LM head finds likeliest after h_{t-1}: e_y, y = argmax head(h_{t-1}).

    So a latent holds log2 V bits, as a written token does. `token` passes no gradient. `token:st` is the same in the
    forward pass, and its gradient is that of softmax(head(h_{t-1})) E, the mean input embedding (straight-through,
    Bengio et al., arXiv 1308.3432): it reaches the hidden state, the LM head and the input embeddings E.
    """

    def __init__(self, base: PreTrainedModel, number: str | None = None):
        super().__init__(base)
        self.straight_through = number == "st"

    def forward(self, seen: Seen) -> torch.Tensor:
        logits = seen.backbone.head(seen.hidden)  # (B, 1, V)
        likeliest = seen.backbone.embed(logits.argmax(-1)).detach()  # (B, 1, D)
        if not self.straight_through:
            return likeliest
        every = seen.backbone.input_embeddings()  # (V, D)
        mean = logits.softmax(-1).to(every.dtype) @ every
        return likeliest + (mean - mean.detach())
