"""Random positions in training, with any method but grpo and stopping: longer test sequences have no unseen positions.

A training sequence of T tokens gets, with R = position_range,

- offset: the positions o .. o + T - 1, o uniform in 0 .. R - T. This trains all absolute positions below R (GPT-2).
  Rotary positions depend on distances only, so a common offset does not change them.
- spaced: T of the positions 0 .. r - 1 in ascending order, r uniform in T .. R. This trains distances up to R - 1 too,
  also of rotary positions. Ruoss et al. (arXiv 2305.16843) use r = R, and draw in evaluation too.

Validation and generation count from 0. Training does so with probability 1 / (R - T + 1) or more, and always for rows
of more than R tokens. A draw is a function of (seed, epoch, example), like the stage.
"""

from __future__ import annotations

from collections.abc import Iterator

import methods
from methods import key


class Method(methods.Method):
    has_latents = True
    evaluates_as_coconut = True
    variant_of = "coconut"
    defaults = {"positions": "spaced"}
    positions: str = key(
        "plain",
        "plain | offset | spaced: positions of a training sequence: from 0; from a random number; random and ascending",
        choices=("plain", "offset", "spaced"),
        later=True,
    )
    position_range: int = key(1024, "offset, spaced: random positions are below this", low=1, later=True)

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method == "random_positions" and config.positions == "plain" and not config.only_eval:
            yield "method random_positions needs positions, offset or spaced: with plain ones it is method coconut"

    @staticmethod
    def options(config) -> dict:
        return {"position_range": config.position_range}

    @staticmethod
    def mixes_in(config) -> bool:
        return config.positions != "plain" and not config.only_eval


# --- With torch ---

import numpy as np
import torch

from coconut import Coconut
from dataset import MicroBatch, StageDataset, sequences_in
from utils import UserError


def draw_positions(n_tokens: int, positions: str, position_range: int, random: np.random.Generator) -> np.ndarray:
    """Draws the positions of a training sequence: (n_tokens,) int64, ascending."""
    surplus = int(random.integers(max(position_range - n_tokens, 0) + 1))
    if positions == "offset":
        return surplus + np.arange(n_tokens)
    return np.sort(random.choice(surplus + n_tokens, n_tokens, replace=False))


class RandomPositions(StageDataset):
    """Puts a stage's training sequences, and those that a method adds to an example's, at random positions."""

    def micro_batch(self, micro: MicroBatch, stage: int) -> dict:
        batch, config = super().micro_batch(micro, stage), self.config
        for number, sequences in enumerate(sequences_in(batch), start=1):  # number 0 is the stage's draw
            for row, index in enumerate(micro.indices):
                attended = sequences["attention_mask"][row].bool()  # (T,)
                random = np.random.default_rng((config.seed, self.epoch, index, number))
                drawn = draw_positions(int(attended.sum()), config.positions, config.position_range, random)
                sequences["position_ids"][row, attended] = torch.from_numpy(drawn)
        return batch


class Positioned(Coconut):
    """Coconut trained at positions below position_range. Raises UserError if the model has fewer positions, or takes no
    position_ids (ALiBi, recurrent layers)."""

    def __init__(self, *args, position_range: int, **options):
        super().__init__(*args, **options)
        if not self.backbone.takes_position_ids:
            family = self.base_causallm.config.model_type
            raise UserError(f"random positions need a model that takes position_ids, which family {family} does not")
        if self.max_positions is not None and position_range > self.max_positions:
            raise UserError(f"position_range {position_range} is more than the model's {self.max_positions} positions")


MODEL, DATASET = Positioned, RandomPositions
