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

import methods
from methods import LARGEST_FACTOR, key


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
    def problems(config) -> list[str]:
        found = []
        if config.rules.has_stages:
            return found
        if config.uniform_prob or config.advance_at is not None:
            always = f"method {config.method} has always the thoughts of the last one"
            found.append(f"uniform_prob and advance_at are of stages, and {always}")
        if not config.c_thought * config.max_latent_stage * config.pad_latent_to_max:
            what = f"method {config.method} thinks max_latent_stage x c_thought thoughts"
            found.append(f"{what}: it needs both, and pad_latent_to_max")
        return found


# ---------------------------------------------------------------------------------------------------------------
# With torch
# ---------------------------------------------------------------------------------------------------------------

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from coconut import Coconut, CoconutOutput
from curriculum import IGNORE
from dataset import StageDataset, collate_for_device
from model.backbone import decoder_blocks
from utils import UserError


class TaughtDataset(StageDataset):
    """Items (input_ids, labels, place, teacher's input_ids, labels, place): a place is that of the token before the
    answer's first."""

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        input_ids, labels = super().__getitem__(key)
        question, steps, answer = self.tokens.auxiliary[key[0]]
        written = [*(token for step in steps for token in step), *answer, self.markers.eos]
        teacher = question + written
        prefix = self.tokens.answer_prefix
        shared = next(
            (n for n, pair in enumerate(zip(prefix, answer, strict=False)) if pair[0] != pair[1]), len(prefix)
        )
        places = [len(ids) - 1 - len(answer) + shared - 1 for ids in (input_ids, teacher)]
        return input_ids, labels, places[0], teacher, [IGNORE] * len(question) + written, places[1]

    def collate(self, rows: list[tuple]) -> dict:
        """`StageDataset.collate`, with the arguments of `Codi.forward`."""
        batch = super().collate([row[:2] for row in rows])
        taught = collate_for_device([row[3:5] for row in rows], self.markers.eos, self.markers.latent)
        lefts = (batch["attention_mask"].cumsum(dim=1) == 0).sum(dim=1)  # (B,): padding of each row
        batch["student_places"] = lefts + torch.tensor([row[2] for row in rows])
        batch["teacher_places"] = torch.tensor([row[5] for row in rows])  # padded on the right only
        names = ("input_ids", "attention_mask", "position_ids", "labels", "supervised")
        return batch | {f"teacher_{name}": taught[name] for name in names}


class Codi(Coconut):
    """Coconut that is taught in training, where a batch has a teacher's part."""

    distillation = 1.0  # its weight
    first_layer = 0  # of those that are compared: 0 is the embeddings

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._layers = LayerStates(self)

    def configure(self, config) -> None:
        self.distillation = config.distillation

    def forward(
        self,
        *args,
        student_places: torch.Tensor | None = None,
        teacher_places: torch.Tensor | None = None,
        teacher_input_ids: torch.Tensor | None = None,
        teacher_attention_mask: torch.Tensor | None = None,
        teacher_position_ids: torch.Tensor | None = None,
        teacher_labels: torch.Tensor | None = None,
        teacher_supervised: torch.Tensor | None = None,
        **kwargs,
    ) -> CoconutOutput:
        """`Coconut.forward` of the student; with a teacher's arguments, which are as the student's and padded on the
        right only, `loss` is the whole one. student_places, teacher_places: (B,) int64, the columns that are compared.
        """
        if teacher_input_ids is None:
            return super().forward(*args, **kwargs)
        with self._layers.recording():
            taught = super().forward(
                teacher_input_ids,
                attention_mask=teacher_attention_mask,
                position_ids=teacher_position_ids,
                labels=teacher_labels,
                supervised=teacher_supervised,
                latent_columns=[],
                left_padded=False,
                return_hidden=True,
            )
            wanted = [state.detach() for state in self._layers.at(teacher_places, taught.hidden)]
            # the teacher's pass is the earlier one, so its backward comes last: FSDP waits for that
            tell, self.before_first_span = self.before_first_span, None
            try:
                output = super().forward(*args, return_hidden=True, **kwargs)
            finally:
                self.before_first_span = tell
            found = self._layers.at(student_places, output.hidden, self._moved(kwargs))
        pairs = list(zip(found, wanted, strict=True))[self.first_layer :]
        distances = [F.smooth_l1_loss(ours, theirs) / theirs.std() for ours, theirs in pairs]
        loss = output.loss + self.distillation * torch.stack(distances).mean() + taught.loss
        return output._replace(loss=loss, hidden=None)

    def _moved(self, batch: dict) -> torch.Tensor | int:
        """By how much each row of the student's last pass was moved to the left (see padding.Shift), (B,): where
        nothing waits for hidden states it is the only pass, padding and all."""
        if self.thought.sequential or not (batch["left_padded"] and self._makes_masks):
            return 0
        return (batch["attention_mask"].cumsum(dim=1) == 0).sum(dim=1)


class LayerStates:
    """All columns of the residual stream of the last pass: what the first block is given and what each block returns.

    They are part of the graph anyway, so that keeping them takes no room.
    """

    def __init__(self, model: Coconut):
        blocks = decoder_blocks(model.base_causallm)
        if not blocks:
            raise UserError("method codi compares layers: it needs a model that names its decoder blocks")
        self.states: list[torch.Tensor] | None = None  # while passes are recorded
        self.first = blocks[0]
        for block in blocks:
            block.register_forward_hook(self._record, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.states = []
        try:
            yield
        finally:
            self.states = None

    @torch.compiler.disable
    def _record(self, block, args: tuple, kwargs: dict, output) -> None:
        if self.states is None:
            return
        if block is self.first:
            self.states = [args[0] if args else kwargs["hidden_states"]]
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def at(self, places: torch.Tensor, hidden: torch.Tensor, moved: torch.Tensor | int = 0) -> list[torch.Tensor]:
        """L + 1 states, (B, 1, D) each, as transformers' hidden_states, at the columns (B,) of the last hidden states
        (B, T, D). The last pass must hold those columns, each row moved to the left by so many."""

        def pick(state: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            return state.gather(1, columns[:, None, None].expand(-1, 1, state.shape[-1]))

        in_pass = places - (hidden.shape[1] - self.states[0].shape[1]) - moved
        return [*(pick(state, in_pass) for state in self.states[:-1]), pick(hidden, places)]


MODEL, DATASET = Codi, TaughtDataset
