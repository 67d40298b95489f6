"""LOTUS (arXiv 2606.31779): latents computed in parallel, with the tokens of their steps as labels.

Index 0 is the position before the first latent (the start marker). Position k c + j predicts token j of step k through
the base's LM head. A step of more than c tokens continues at the positions of the following groups, which then have
several targets. The labels' cross-entropy is a mean over all labels of an optimizer step on all ranks; the
cross-entropy of the written part is a mean over all of its tokens. methods/parallel_latents.py computes the latents,
in one pass more than there are groups.

Legend: B rows, T columns of a batch, c latents of a group, S labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import curriculum
import methods
from methods import LARGEST_FACTOR, key


class Method(methods.Method):
    has_latents = True
    evaluates_as_coconut = True
    variant_of = "coconut"
    needs = ("parallel_latents",)
    defaults = {
        "thought": "looped",
        "latent_passes": "stage",
        "latent_labels": 0.05,
        "c_thought": 13,
        "max_latent_stage": 6,
        "epochs_per_stage": 1,
        "max_grad_norm": 1.0,
        "reset_optimizer": "never",
    }
    latent_labels: float = key(
        0.0,
        "lotus: weight of the loss in which the latents predict the tokens of their steps",
        low=0,
        high=LARGEST_FACTOR,
        later=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.latent_labels and config.method != "lotus":
            yield f"latent_labels is for method lotus, not {config.method}"

    @staticmethod
    def stage_of(config, epoch: int) -> int:
        """Caps the stage at max_latent_stage: steps beyond it stay written in every epoch."""
        return min(curriculum.stage_of.paper(config, epoch), config.max_latent_stage)

    @staticmethod
    def thoughts_and_dropped(n_steps: int, stage: int, config) -> tuple[int, int]:
        """Caps the stages that uniform_prob draws too."""
        return curriculum.thoughts_and_dropped.paper(n_steps, min(stage, config.max_latent_stage), config)

    @staticmethod
    def options(config) -> dict:
        return {"latent_labels": config.latent_labels}

    @staticmethod
    def older(values: dict) -> None:
        """Method coconut with latent_labels."""
        has_decoder = values.get("step_decoder", "none") != "none"
        if values.get("method", "coconut") == "coconut" and values.get("latent_labels") and not has_decoder:
            values["method"] = "lotus"


# --- With torch ---

import torch

from coconut import Coconut, CoconutOutput
from dataset import StageDataset


def latent_labels(steps: Sequence[Sequence[int]], n_latents: int, c_thought: int) -> list[tuple[int, int]]:
    """Returns (index, token) of each label of a row with this number of latents; index 0 is the position before the
    first latent. A step is cut only where the latents end: position n_latents, the last latent, is its last one."""
    labels = []
    for group, step in zip(range(n_latents // c_thought if c_thought else 0), steps, strict=False):
        labels += zip(range(group * c_thought, n_latents + 1), step, strict=False)
    return labels


class LabelledDataset(StageDataset):
    """Items (input_ids, labels, latent labels as `latent_labels` returns them)."""

    counts_loss_terms = True

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        input_ids, labels = super().__getitem__(key)
        n_latents = input_ids.count(self.markers.latent)
        return input_ids, labels, latent_labels(self.tokens[key[0]][1], n_latents, self.config.c_thought)

    def others(self, item: tuple, words) -> list:
        targets: dict[int, list[str]] = {}
        for index, token in item[2]:
            targets.setdefault(index, []).append(words([token]))
        names = {index: f"latent {index}" if index else "before latent 1" for index in targets}
        return [f"  {names[index]} predicts: {' and '.join(texts)}" for index, texts in sorted(targets.items())]

    def collate(self, rows: list[tuple]) -> dict:
        """Returns `StageDataset.collate` with the further arguments of `Lotus.forward`, and the token count of each
        loss."""
        batch = super().collate([row[:2] for row in rows])
        width, first = batch["input_ids"].shape[1], next(iter(batch["latent_columns"]), 0)
        positions, targets = [], []
        for number, (input_ids, _, row_labels) in enumerate(rows):
            for index, token in row_labels:  # padding may separate the start marker and the first latent
                column = first - 1 + index if index else input_ids.index(self.markers.latent) - 1
                positions.append(number * width + column)
                targets.append(token)
        batch["label_positions"] = torch.tensor(positions, dtype=torch.int64)
        batch["label_targets"] = torch.tensor(targets, dtype=torch.int64)
        batch["loss_counts"] = {"loss": len(batch["supervised"]), "auxiliary": len(targets)}
        return batch


class Lotus(Coconut):
    """Coconut with labels for its latents in training; latent_labels is the weight of their loss."""

    def __init__(self, *args, latent_labels: float = 0.05, **kwargs):
        super().__init__(*args, **kwargs)
        self.latent_labels = latent_labels

    def forward(
        self, *args, label_positions: torch.Tensor | None = None, label_targets: torch.Tensor | None = None, **kwargs
    ) -> CoconutOutput:
        """Runs `Coconut.forward`. With label_targets, (S,) int64, at label_positions in the flattened (B, T), the
        output's `auxiliary` is their weighted cross-entropy, summed over the batch."""
        if label_targets is None:
            return super().forward(*args, **kwargs)
        output = super().forward(*args, return_hidden=True, **kwargs)
        hidden = output.hidden.flatten(0, 1)[label_positions]  # (S, D)
        auxiliary = self.latent_labels * self.backbone.cross_entropy(hidden, label_targets, reduction="sum")
        return output._replace(hidden=None, auxiliary=auxiliary)


MODEL, DATASET = Lotus, LabelledDataset
