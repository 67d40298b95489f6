"""iCoT, stepwise internalization (arXiv 2405.14838): the reasoning loses its first tokens, one by one.

The sequence is Q, the steps without their first r tokens, A. The stage is r; it grows by one every
1/icot_tokens_per_epoch of an epoch. Each training example loses o further tokens (removal smoothing). AdamW is
re-initialised whenever r grows, until a batch has no reasoning left. Model and dataset are Coconut's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

import curriculum
import methods
from curriculum import NO_REASONING
from methods import key


def _check_smoothing(smoothing: float | None) -> None:
    """Raises ValueError for a rate so small that numpy cannot draw from the distribution."""
    if smoothing and smoothing < 1e-6:
        raise ValueError("must be 0, for none, or at least 1e-6")


class Method(methods.Method):
    icot_tokens_per_epoch: int = key(
        8, "icot: how many more reasoning tokens each epoch removes; at most one per step", low=1
    )
    icot_remove_all_after: int | None = key(
        None,
        "icot: remove everything once this many tokens are removed; until then each number is a stage of its own, and "
        "save_only_improve and RUN@best compare epochs within a stage",
        low=1,
    )
    icot_smoothing: float | None = key(
        4.0, "icot: o more tokens are removed with probability ~ exp(-this * o)", low=0, check=_check_smoothing
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method == "icot" and config.uniform_prob > 0:
            yield "uniform_prob mixes stages of whole steps, but method icot removes single tokens"
        if config.method == "icot" and config.advance_at is not None:
            yield "advance_at ends stages of whole epochs, but method icot's stages are within an epoch"

    @staticmethod
    def stage_of(config, epoch: int) -> int:
        """Returns the number of tokens removed by an epoch's end, but for the rounding in `stage_of_step`."""
        return Method.stage_of_step(config, epoch, config.icot_tokens_per_epoch - 1, config.icot_tokens_per_epoch)

    @staticmethod
    def stage_of_step(config, epoch: int, step: int, steps_per_epoch: int) -> int:
        steps_per_token = max(1, round(steps_per_epoch / config.icot_tokens_per_epoch))
        removed = (epoch * steps_per_epoch + step) // steps_per_token
        everything = config.icot_remove_all_after is not None and removed >= config.icot_remove_all_after
        return NO_REASONING if everything else removed

    @staticmethod
    def stage_of_example(config, stage: int, epoch: int, index: int, n_steps: int) -> int:
        """Adds o removed tokens, P(o) = (1 - e^-l) e^(-l o) with l = icot_smoothing."""
        if not config.icot_smoothing:
            return stage
        random = np.random.default_rng((config.seed, epoch, index))
        return stage + int(random.geometric(1 - np.exp(-config.icot_smoothing))) - 1

    @staticmethod
    def thoughts_and_dropped(n_steps: int, stage: int, config) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def kept_reasoning(steps: Sequence[Sequence[int]], stage: int, config) -> list[int]:
        return [token for step in steps for token in step][stage:]

    @staticmethod
    def kept_lengths(lengths: np.ndarray, stage: int, config) -> np.ndarray:
        return np.maximum(lengths - stage, 0)

    @staticmethod
    def reasoning_left(stage: int, config) -> str:
        return "none" if stage == NO_REASONING else f"from token {stage + 1} on"

    @staticmethod
    def should_reset_optimizer(config, epoch: int, step: int, steps_per_epoch: int, trained_on: Callable) -> bool:
        """True when r grows, as long as the previous step had reasoning tokens left."""
        if config.reset_optimizer != "stage":
            return curriculum.should_reset_optimizer.paper(config, epoch, step, steps_per_epoch, trained_on)
        before = (epoch, step - 1) if step else (epoch - 1, steps_per_epoch - 1)
        if before[0] < 0:
            return False
        stage = Method.stage_of_step(config, *before, steps_per_epoch)
        if Method.stage_of_step(config, epoch, step, steps_per_epoch) == stage:
            return False
        return any(
            Method.kept_reasoning(steps, Method.stage_of_example(config, stage, before[0], index, len(steps)), config)
            for index, steps in trained_on(*before)
        )
