"""CODI (EMNLP 2025, arXiv 2502.21074): self-distillation from written steps to latent thoughts.

In every step the same weights process an example twice. The student answers after a fixed number of latent thoughts.
The teacher writes all steps but the last, and answers. A distillation loss pulls the student's hidden states towards
the teacher's in all layers, at one position: the token before the first token of the answer's text. CODI's own thought
is `mlp`; any other works too.

    loss = CE of the student's answer + distillation x D + CE of the teacher's steps and answer
    D = mean over the layers j, embeddings and final norm included, of SmoothL1(student_j, teacher_j) / std(teacher_j)

No gradient reaches the teacher's states in D. The std is over the (B, 1, D) states of the batch. The three terms are
means over a micro-batch, which is weighted by its number of examples. Unlike in the published code, no position attends
to padding.

Legend: B rows, T columns of a batch, D hidden size, L decoder blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import methods
from methods import LARGEST_FACTOR, Texts, key


def teacher_steps(steps: Sequence[str]) -> list[str]:
    """Returns the teacher's reasoning as one text: all steps but the last, joined by blanks."""
    return [" ".join(steps[:-1])] if len(steps) > 1 else []


class Method(methods.Method):
    has_latents = True
    evaluates_as_coconut = True
    has_stages = False
    defaults = {"thought": "mlp"}
    distillation: float = key(
        1.0,
        "codi: weight of the distance between the student's and the teacher's hidden states",
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
            yield f"uniform_prob and advance_at need stages, and {method} always has the thoughts of the last stage"
        if not config.c_thought * config.max_latent_stage * config.pad_latent_to_max:
            yield f"{method} has max_latent_stage x c_thought thoughts: set both above 0, and pad_latent_to_max to true"

    @staticmethod
    def texts(config) -> Texts:
        return Texts({"teacher": "all steps but the last, blanks between them"}, teacher_steps, True)

    @staticmethod
    def options(config) -> dict:
        return {"distillation": config.distillation}


# --- With torch ---

import torch
import torch.nn.functional as F

from coconut import Coconut, CoconutOutput
from curriculum import IGNORE
from dataset import MicroBatch, StageDataset, collate_for_device
from model.layout import column_of


class TeacherDataset(StageDataset):
    """Items (input_ids, labels, position, teacher's input_ids, labels, position). A position is the index of the token
    before the first token of the answer's text, which follows "### "."""

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        input_ids, labels = super().__getitem__(key)
        question, steps, answer = self.tokens.auxiliary[key[0]]
        written = [*(token for step in steps for token in step), *answer, self.markers.eos]
        teacher = question + written
        prefix = self.tokens.answer_prefix  # of "### "; a tokenizer may join its blank to the answer's text
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(prefix, answer, strict=False))])
        student_position, position = (len(ids) - 1 - len(answer) + shared - 1 for ids in (input_ids, teacher))
        return input_ids, labels, student_position, teacher, [IGNORE] * len(question) + written, position

    def weight(self, micro: MicroBatch, stage: int) -> float:
        """Returns its share of the step's examples: each loss counts other tokens."""
        return micro.weight

    def others(self, item: tuple, words) -> list:
        ids, _, position, teacher, labels, teacher_position = item
        pair = f"{words(ids[position : position + 1])!r}, before {words(ids[position + 1 : position + 2])!r}"
        where = f"  compared: the states at {pair}, columns {position} and {teacher_position}"
        return [("teacher", teacher, labels), where]

    def collate(self, rows: list[tuple]) -> dict:
        """Returns `StageDataset.collate` with the further arguments of `Codi.forward`."""
        batch = super().collate([row[:2] for row in rows])
        column = next(iter(batch["latent_columns"]), 0)  # of each row's first latent
        gaps = [column - row[0].index(self.markers.latent) if column else 0 for row in rows]
        batch["columns"] = torch.tensor([row[2] + gap for row, gap in zip(rows, gaps, strict=True)])
        batch["teacher"] = collate_for_device([row[3:5] for row in rows], self.markers.eos, None)
        batch["teacher"]["columns"] = torch.tensor([row[5] for row in rows])
        return batch


class Codi(Coconut):
    """Coconut with a teacher's pass in training.

    Args, besides those of Coconut:
        distillation: weight of the distance between the student's and the teacher's states.
        first_layer: the first compared layer; 0 is the embeddings.
    """

    def __init__(self, *args, distillation: float = 1.0, first_layer: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.distillation, self.first_layer = distillation, first_layer
        self.backbone.record_layers()

    def forward(
        self, *args, columns: torch.Tensor | None = None, teacher: dict | None = None, **kwargs
    ) -> CoconutOutput:
        """Runs `Coconut.forward` on the student's batch. With a teacher's batch, `loss` is the sum of all three terms.

        columns: (B,) int64, the compared column of each student's row; `teacher` holds the teacher's as "columns".
        """
        if teacher is None:
            return super().forward(*args, **kwargs)
        # the teacher runs first, so its backward comes last, as trainer.parallel.sync_gradients expects of a first pass
        teacher_output, teacher_states = self._states_at(**teacher)
        output, student_states = self._states_at(columns, *args, **kwargs)
        distances = [
            F.smooth_l1_loss(student, target.detach()) / target.detach().std()
            for student, target in zip(student_states, teacher_states, strict=True)
        ]
        distance = torch.stack(distances[self.first_layer :]).mean()
        return output._replace(loss=output.loss + self.distillation * distance + teacher_output.loss)

    def _states_at(self, columns: torch.Tensor, *args, **kwargs) -> tuple[CoconutOutput, list[torch.Tensor]]:
        """Returns Coconut's output and the L + 1 hidden states, (B, 1, D) each, at the columns (B,), in the order of
        transformers' hidden_states. The last pass must contain those columns."""
        width = (args[0] if args else kwargs["input_ids"]).shape[1]

        def pick(state: torch.Tensor) -> torch.Tensor:
            return column_of(state, (columns - (width - state.shape[1])).clamp(min=0))

        with self.backbone.recording(pick) as states:
            output = super().forward(*args, return_hidden=True, **kwargs)
        return output._replace(hidden=None), [*states[:-1], column_of(output.hidden, columns)]


MODEL, DATASET = Codi, TeacherDataset
