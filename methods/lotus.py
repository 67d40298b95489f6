"""LOTUS (arXiv 2606.31779): latents that are made in parallel are told what they stand for.

Counted from the position before the first latent (the start marker), index 0, position k c + j has to predict token j
of step k, through the base's own LM head: a step is read from the group of latents that stands for it, as if its tokens
were written there. A step of more than c tokens is read on in the next group, whose first positions then have two
targets. The labels' cross-entropy is a mean over all labels of an optimizer step, on whatever rank, that of the written
part a mean over all of its tokens. The latents are made as methods/parallel_latents.py says, in one pass more than
there are groups.

Legend: B rows, T columns of a batch, c latents of a group, S labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import curriculum
import methods
from methods import LARGEST_FACTOR, key


class Method(methods.Method):
    has_latents = True
    variant_of = "coconut"
    needs = ("parallel_latents",)
    defaults = {
        **{"thought": "looped", "latent_passes": "stage", "latent_labels": 0.05},
        **{"c_thought": 13, "max_latent_stage": 6, "epochs_per_stage": 1},
        **{"max_grad_norm": 1.0, "reset_optimizer": "never"},
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
            yield f"latent_labels are for method lotus, not {config.method}"

    @staticmethod
    def stage_of(config, epoch: int) -> int:
        """Steps beyond max_latent_stage stay written: no stage is without any."""
        return min(curriculum.stage_of.paper(config, epoch), config.max_latent_stage)

    @staticmethod
    def options(config) -> dict:
        return {"latent_labels": config.latent_labels}

    @staticmethod
    def older(values: dict) -> None:
        """Method coconut with labels."""
        explained = values.get("step_decoder", "none") != "none"
        if values.get("method", "coconut") == "coconut" and values.get("latent_labels") and not explained:
            values["method"] = "lotus"


# ---- With torch ----

import torch

from coconut import Coconut, CoconutOutput
from dataset import StageDataset


def latent_labels(steps: Sequence[Sequence[int]], n_latents: int, c_thought: int) -> list[tuple[int, int]]:
    """(index, token) of each label of a row with so many latents; index 0 is the position before the first latent. The
    last group's step is read in that group only: there is none after it."""
    found = []
    for group, step in zip(range(n_latents // c_thought if c_thought else 0), steps, strict=False):
        begin = group * c_thought
        room = min(2 * c_thought, n_latents - begin)
        found += [(begin + place, token) for place, token in enumerate(step[:room])]
    return found


class LabelledDataset(StageDataset):
    """Items (input_ids, labels, latent labels): the last as `latent_labels` gives them."""

    counts_loss_terms = True

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        input_ids, labels = super().__getitem__(key)
        n_latents = input_ids.count(self.markers.latent)
        return input_ids, labels, latent_labels(self.tokens[key[0]][1], n_latents, self.config.c_thought)

    def others(self, item: tuple, words) -> list:
        at: dict[int, list[str]] = {}
        for index, token in item[2]:
            at.setdefault(index, []).append(words([token]))
        names = {index: f"latent {index}" if index else "before latent 1" for index in at}
        return [f"  {names[index]} predicts: {' and '.join(texts)}" for index, texts in sorted(at.items())]

    def collate(self, rows: list[tuple]) -> dict:
        """`StageDataset.collate`, with the arguments of `Lotus.forward`, and the tokens of either loss."""
        batch = super().collate([row[:2] for row in rows])
        width, first = batch["input_ids"].shape[1], next(iter(batch["latent_columns"]), 0)
        found = []
        for number, (input_ids, _, row_labels) in enumerate(rows):
            for index, token in row_labels:  # padding may stand between the start marker and the first latent
                column = first - 1 + index if index else input_ids.index(self.markers.latent) - 1
                found.append((number * width + column, token))
        batch["label_places"] = torch.tensor([place for place, _ in found], dtype=torch.int64)
        batch["label_targets"] = torch.tensor([token for _, token in found], dtype=torch.int64)
        batch["loss_counts"] = {"loss": len(batch["supervised"]), "auxiliary": len(found)}
        return batch


class Lotus(Coconut):
    """Latents that have labels, in training; latent_labels: their loss's weight beside the answer's."""

    def __init__(self, *args, latent_labels: float = 0.05, **kwargs):
        super().__init__(*args, **kwargs)
        self.latent_labels = latent_labels

    def forward(
        self, *args, label_places: torch.Tensor | None = None, label_targets: torch.Tensor | None = None, **kwargs
    ) -> CoconutOutput:
        """`Coconut.forward`; with targets, (S,) int64, at places in the flattened (B, T), the output's `auxiliary` is
        their weighted cross-entropy, summed over the batch."""
        if label_targets is None:
            return super().forward(*args, **kwargs)
        output = super().forward(*args, return_hidden=True, **kwargs)
        hidden = output.hidden.flatten(0, 1)[label_places]  # (S, D)
        auxiliary = self.latent_labels * self.backbone.cross_entropy(hidden, label_targets, reduction="sum")
        return output._replace(hidden=None, auxiliary=auxiliary)


MODEL, DATASET = Lotus, LabelledDataset
