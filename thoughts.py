"""What a latent position is fed: the ways to turn a hidden state into the next input embedding.

A thought has two parts that the model needs: `sequential`, whether the thought at a latent position depends on the
hidden state of the position before it, and a call that makes it. The names are listed in utils.THOUGHTS.
"""

from __future__ import annotations

import torch
from torch import nn


class Last(nn.Module):
    """The last hidden state itself: h_{t-1} is the input embedding at t (paper, Section 3)."""

    sequential = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, 1, D) last hidden state, after the final norm -> (B, 1, D) input embedding."""
        return hidden


class Pause(nn.Module):
    """No feedback: the learned embedding of the latent token stays (paper, Section 4.2: pause token, pause as thought).

    A latent position then waits for nothing, and the whole sequence is one pass.
    """

    sequential = False


REGISTRY = {"last": Last, "pause": Pause}


def make_thought(name: str) -> nn.Module:
    """The thought of that name. Raises ValueError that lists the names."""
    if name not in REGISTRY:
        raise ValueError(f"no thought is called {name!r}; there are {', '.join(REGISTRY)}")
    return REGISTRY[name]()
