"""CODI (EMNLP 2025, arXiv 2502.21074): a model that thinks is taught by itself writing its steps.

In every step the same weights see an example twice. The student answers after latent thoughts, always as many; the
teacher writes the steps, all but the last, and answers. The student's hidden states at one position, that of the token
before the first of the answer itself, are drawn to the teacher's, in all layers. A thought of its own, `mlp`, feeds the
student; whatever thought there is will do.

    loss = CE of the student's answer + distillation x D + CE of the teacher's steps and answer
    D = mean over the layers j, embeddings and final norm included, of SmoothL1(student_j, teacher_j) / std(teacher_j)

with no gradient to the teacher's states, and the std over the (B, 1, D) of the batch. The means are those of a batch,
weighted by its examples, as the loss of Coconut is here. Padding is attended to nowhere, unlike in the published code.

Legend: B rows, T columns of a batch, D hidden size, L decoder blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import methods
from methods import LARGEST_FACTOR, Texts, key


def teacher_steps(steps: Sequence[str]) -> list[str]:
    """The reasoning of the teacher as one text: all steps but the last, joined by blanks."""
    return [" ".join(steps[:-1])] if len(steps) > 1 else []


class Method(methods.Method):
    has_latents = True
    has_stages = False
    distillation: float = key(
        1.0,
        "codi: weight of the distance between the student's states and the teacher's",
        low=0,
        high=LARGEST_FACTOR,
        later=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        method = f"method {config.method}"
        if config.rules.has_stages:
            return
        if config.uniform_prob or config.advance_at is not None:
            yield f"uniform_prob and advance_at are of stages, and {method} has always the thoughts of the last one"
        if not config.c_thought * config.max_latent_stage * config.pad_latent_to_max:
            yield f"{method} thinks max_latent_stage x c_thought thoughts: it needs both, and pad_latent_to_max"

    @staticmethod
    def texts(config) -> Texts:
        return Texts({"teacher": "all steps but the last, blanks between them"}, teacher_steps)

    @staticmethod
    def options(config) -> dict:
        return {"distillation": config.distillation}


# ---- With torch ----

import torch
import torch.nn.functional as F

from coconut import Coconut, CoconutOutput
from curriculum import IGNORE
from dataset import StageDataset, collate_for_device
from model.layout import column_of


class TaughtDataset(StageDataset):
    """Items (input_ids, labels, position, teacher's input_ids, labels, position): that of the token before the
    answer's first."""

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        input_ids, labels = super().__getitem__(key)
        question, steps, answer = self.tokens.auxiliary[key[0]]
        written = [*(token for step in steps for token in step), *answer, self.markers.eos]
        teacher = question + written
        prefix = self.tokens.answer_prefix
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(prefix, answer, strict=False))])
        student_position, position = (len(ids) - 1 - len(answer) + shared - 1 for ids in (input_ids, teacher))
        return input_ids, labels, student_position, teacher, [IGNORE] * len(question) + written, position

    def others(self, item: tuple, words) -> list:
        ids, _, position, teacher, labels, teacher_position = item
        pair = f"{words(ids[position : position + 1])!r}, before {words(ids[position + 1 : position + 2])!r}"
        where = f"  compared: the states at {pair}, columns {position} and {teacher_position}"
        return [("teacher", teacher, labels), where]

    def collate(self, rows: list[tuple]) -> dict:
        """`StageDataset.collate`, with the arguments of `Codi.forward`."""
        batch = super().collate([row[:2] for row in rows])
        column = next(iter(batch["latent_columns"]), 0)  # of the first latent, in each row
        gaps = [max(column - row[0].index(self.markers.latent), 0) if column else 0 for row in rows]
        batch["columns"] = torch.tensor([row[2] + gap for row, gap in zip(rows, gaps, strict=True)])
        batch["teacher"] = collate_for_device([row[3:5] for row in rows], self.markers.eos, None)
        batch["teacher"]["columns"] = torch.tensor([row[5] for row in rows])
        return batch


class Codi(Coconut):
    """Coconut that is taught in training, where a batch has a teacher's part.

    distillation: weight of the distance between the student's states and the teacher's.
    first_layer: of those that are compared; 0 is the embeddings.
    """

    def __init__(self, *args, distillation: float = 1.0, first_layer: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.distillation, self.first_layer = distillation, first_layer
        self.backbone.record_layers()

    def forward(
        self, *args, columns: torch.Tensor | None = None, teacher: dict | None = None, **kwargs
    ) -> CoconutOutput:
        """`Coconut.forward` of the student; with a teacher's batch, which is as the student's, `loss` is the whole one.
        columns: (B,) int64, those that are compared."""
        if teacher is None:
            return super().forward(*args, **kwargs)
        # the teacher's pass is the earlier one, so its backward comes last
        taught, wanted = self._states_at(**teacher)
        output, found = self._states_at(columns, *args, **kwargs)
        distances = [
            F.smooth_l1_loss(own, target.detach()) / target.detach().std()
            for own, target in list(zip(found, wanted, strict=True))[self.first_layer :]
        ]
        loss = output.loss + self.distillation * torch.stack(distances).mean() + taught.loss
        return output._replace(loss=loss)

    def _states_at(self, columns: torch.Tensor, *args, **kwargs) -> tuple[CoconutOutput, list[torch.Tensor]]:
        """Coconut's forward, and L + 1 states, (B, 1, D) each, as transformers' hidden_states, at the columns (B,).
        The last pass must hold those columns."""
        width = (args[0] if args else kwargs["input_ids"]).shape[1]

        def pick(state: torch.Tensor) -> torch.Tensor:
            return column_of(state, (columns - (width - state.shape[1])).clamp(min=0))

        with self.backbone.recording(pick) as states:
            output = super().forward(*args, return_hidden=True, **kwargs)
        return output._replace(hidden=None), [*states[:-1], column_of(output.hidden, columns)]


MODEL, DATASET = Codi, TaughtDataset
