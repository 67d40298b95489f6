"""iCoT, stepwise internalization (arXiv 2405.14838): the reasoning loses its first tokens, one by one.

Model and dataset are those of Coconut; the sequences are curriculum.py's.
"""

from __future__ import annotations

import methods
from methods import key


def _check_smoothing(smoothing: float | None) -> None:
    """Raises ValueError where nearly all tokens would be drawn, and numpy can draw no more."""
    if smoothing and smoothing < 1e-6:
        raise ValueError("must be 0, for none, or at least 1e-6")


class Method(methods.Method):
    icot_tokens_per_epoch: int = key(8, "icot: reasoning tokens removed more with each epoch", low=1)
    icot_remove_all_after: int | None = key(None, "icot: remove everything once this many tokens are removed", low=1)
    icot_smoothing: float | None = key(
        4.0, "icot: o more tokens are removed with probability ~ exp(-this * o)", low=0, check=_check_smoothing
    )

    @staticmethod
    def problems(config) -> list[str]:
        found = []
        if config.method == "icot" and config.uniform_prob > 0:
            found.append("uniform_prob mixes stages of whole steps, but method icot removes single tokens")
        if config.method == "icot" and config.advance_at is not None:
            found.append("advance_at ends stages of whole epochs, but method icot's stages are within an epoch")
        return found
