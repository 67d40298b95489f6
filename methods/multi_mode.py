"""Multi-mode training (arXiv 2604.04902): one model that answers at once, after written steps, and after thoughts.

In every step each example is seen three times (see MODES), and the losses, each a mean over its own tokens, are added.
A tool for comparing latent, written and no reasoning within one model: its accuracy is the harmonic mean of the three,
and the best checkpoint the best by it.

Legend: B rows, T columns of a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import curriculum
import methods
from methods import key

MODES = ("direct", "written", "latent")  # Q end A; Q start S_1..S_n end A; Q start latent* S_{s+1}..S_n end A


class Method(methods.Method):
    has_latents = True
    goes_on_at_once = False  # the end marker is
    mode: str = key(
        "latent",
        "multi_mode: latent | written | direct, how the model is asked in an eval-only run: for thoughts, for written "
        "steps, for the answer at once; a training run validates all three",
        choices=("latent", "written", "direct"),
        free=True,
    )

    @staticmethod
    def variants(config) -> list:
        return [replace(config, mode=mode) for mode in MODES]

    @staticmethod
    def thoughts_and_dropped(n_steps: int, stage: int, config) -> tuple[int, int]:
        """In no stage are steps left out that no thoughts stand for."""
        if config.mode != "latent":
            return 0, (n_steps if config.mode == "direct" else 0)
        groups = min(stage, config.max_latent_stage)
        if stage > config.max_latent_stage and not config.pad_latent_to_max:
            groups = min(groups, n_steps)
        return groups * config.c_thought, min(groups, n_steps)

    @staticmethod
    def prefix(question: Sequence[int], n_latents: int, config, markers) -> list[int]:
        """The end marker ends the reasoning, and is predicted."""
        if config.mode == "direct":
            return [*question, markers.end]
        return [*question, markers.start, *[markers.latent] * n_latents]

    @staticmethod
    def training_sequence(question, steps, answer, stage: int, config, markers) -> tuple[list[int], list[int]]:
        answer = list(answer) if config.mode == "direct" else [markers.end, *answer]
        return curriculum.training_sequence.paper(question, steps, answer, stage, config, markers)

    @staticmethod
    def output(tokens: list[int], markers) -> list[int]:
        return [token for token in tokens if token != markers.end]

    @staticmethod
    def reasoning_left(stage: int, config) -> str:
        _, dropped = Method.thoughts_and_dropped(config.max_latent_stage, stage, config)
        return f"all but {dropped} steps" if dropped else "all"

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method == "multi_mode" and config.latent_markers == "none":
            yield "method multi_mode distinguishes its modes by the markers: latent_markers must be both"
        if config.mode == "latent":
            return
        if config.method != "multi_mode":
            yield f"mode {config.mode} is for method multi_mode"
        if not config.only_eval:
            yield f"mode {config.mode} is for eval-only runs: a training run has all modes"
        if config.eval_latents is not None:
            yield f"eval_latents counts latents, and mode {config.mode} has none"


# ---- With torch ----

import torch

from coconut import Coconut, CoconutOutput
from dataset import MicroBatch, StageDataset, collate_for_device
from trainer.evaluate import evaluate

OTHERS = [mode for mode in MODES if mode != "latent"]


class ModesDataset(StageDataset):
    """Items {mode: (input_ids, labels)}."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        variants = Method.variants(self.config)
        self.modes = {one.mode: StageDataset(self.tokens, one, self.markers, self.epoch) for one in variants}

    def __getitem__(self, key: tuple[int, int]) -> dict[str, tuple[list[int], list[int]]]:
        return {mode: dataset[key] for mode, dataset in self.modes.items()}

    def sequence(self, item: dict) -> tuple[list[int], list[int]]:
        return item["latent"]

    def others(self, item: dict, words) -> list:
        return [(mode, *item[mode]) for mode in OTHERS]

    def micro_batch(self, micro: MicroBatch, stage: int) -> dict:
        """`StageDataset.micro_batch`, by the latent mode's tokens; `share`: another mode's weight beside that."""
        batch = super().micro_batch(micro, stage)
        for mode in OTHERS if batch["weight"] else ():
            batch[mode]["share"] = self.modes[mode].weight(micro, stage) / batch["weight"]
        return batch

    def collate(self, rows: list[dict]) -> dict:
        """The latent mode as `StageDataset.collate` has it, and the other modes' batches by their names."""
        batch = super().collate([row["latent"] for row in rows])
        others = {mode: [row[mode] for row in rows] for mode in OTHERS}
        return batch | {mode: collate_for_device(items, self.markers.eos, None) for mode, items in others.items()}


class MultiMode(Coconut):
    """Coconut whose training batches hold the other modes too."""

    def forward(self, *args, direct: dict | None = None, written: dict | None = None, **kwargs) -> CoconutOutput:
        """`Coconut.forward` of the latent mode; with batches of the other modes, as `collate_for_device` makes them,
        the sum of the three losses."""
        # the first pass is the last to go backward
        losses = [self._loss_of(**batch) for batch in (direct, written) if batch is not None]
        output = super().forward(*args, **kwargs)
        return output._replace(loss=sum(losses, output.loss)) if losses else output

    def _loss_of(self, share: float = 1.0, **batch) -> torch.Tensor:
        return share * super().forward(**batch).loss


MODEL, DATASET = MultiMode, ModesDataset


def validate(pretrained, data, stage: int, config, world, title: str = "validating") -> tuple[dict, list[dict]]:
    """trainer.evaluate.evaluate in all three modes. Collective: every rank must call it.

    The metrics are those of the latent mode but for `loss`, the sum of all, and `accuracy`, the harmonic mean of
    accuracy_direct, accuracy_written and accuracy_latent; cot_match_MODE and generated_tokens_MODE are there too. A
    prediction has under the name of each other mode its "output", "answer" and "correct".
    """
    found = {
        one.mode: evaluate(pretrained, data, stage, one, world, f"{title}, {one.mode}")
        for one in Method.variants(config)
    }
    metrics, predictions = found["latent"]
    for name in ("accuracy", "cot_match", "generated_tokens"):
        metrics = metrics | {f"{name}_{mode}": of_mode[name] for mode, (of_mode, _) in found.items()}
    metrics["accuracy"] = statistics.harmonic_mean([of_mode["accuracy"] for of_mode, _ in found.values()])
    metrics |= {name: sum(of_mode[name] for of_mode, _ in found.values()) for name in ("loss", "seconds")}
    for mode in OTHERS:
        for prediction, other in zip(predictions, found[mode][1], strict=True):
            prediction[mode] = {name: other[name] for name in ("output", "answer", "correct")}
    return metrics, predictions
