"""Multi-mode training (arXiv 2604.04902): one model answers directly, after written steps, and after thoughts.

Every step trains each example in three modes (MODES) and adds the three losses, each a mean over its own tokens. The
method compares latent, written and no reasoning within one model. Its accuracy is the harmonic mean of the three, which
also chooses the best checkpoint.

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
    predicts_end_marker = True
    evaluates_as_coconut = True
    mode: str = key(
        "latent",
        "multi_mode: latent | written | direct, what an eval-only run generates: the answer after thoughts, after "
        "written steps, or alone; a training run validates all three",
        choices=("latent", "written", "direct"),
        free=True,
    )

    @staticmethod
    def variants(config) -> list:
        return [replace(config, mode=mode) for mode in MODES]

    @staticmethod
    def thoughts_and_dropped(n_steps: int, stage: int, config) -> tuple[int, int]:
        """Only steps that thoughts replace are dropped, in the last stage too."""
        if config.mode != "latent":
            return 0, (n_steps if config.mode == "direct" else 0)
        groups = min(stage, config.max_latent_stage)
        if stage > config.max_latent_stage and not config.pad_latent_to_max:
            groups = min(groups, n_steps)
        return groups * config.c_thought, min(groups, n_steps)

    @staticmethod
    def prefix(question: Sequence[int], n_latents: int, config, markers) -> list[int]:
        """The start marker precedes reasoning; the model predicts the end marker, except in mode direct."""
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
        return f"from step {dropped + 1} on" if dropped else "all"

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method == "multi_mode" and config.latent_markers == "none":
            yield "method multi_mode tells its modes apart by their markers: latent_markers must be both"
        if config.mode == "latent":
            return
        if config.method != "multi_mode":
            yield f"mode {config.mode} is for method multi_mode"
        if not config.only_eval:
            yield f"mode {config.mode} is for eval-only runs: a training run uses all modes"
        if config.eval_latents is not None:
            yield f"eval_latents counts latents, and mode {config.mode} has none"


# --- With torch ---

import torch

from coconut import Coconut, CoconutOutput
from dataset import MicroBatch, StageDataset, collate_for_device
from trainer.evaluate import evaluate

OTHERS = [mode for mode in MODES if mode != "latent"]


class ModesDataset(StageDataset):
    """Items {mode: (input_ids, labels)}."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.modes = {
            variant.mode: StageDataset(self.tokens, variant, self.markers, self.epoch)
            for variant in Method.variants(self.config)
        }

    def __getitem__(self, key: tuple[int, int]) -> dict[str, tuple[list[int], list[int]]]:
        return {mode: dataset[key] for mode, dataset in self.modes.items()}

    def sequence(self, item: dict) -> tuple[list[int], list[int]]:
        return item["latent"]

    def others(self, item: dict, words) -> list:
        return [(mode, *item[mode]) for mode in OTHERS]

    def micro_batch(self, micro: MicroBatch, stage: int) -> dict:
        """Returns `StageDataset.micro_batch`, whose weight counts the latent mode's tokens. `share` is another mode's
        weight divided by that weight."""
        batch = super().micro_batch(micro, stage)
        for mode in OTHERS if batch["weight"] else ():
            batch[mode]["share"] = self.modes[mode].weight(micro, stage) / batch["weight"]
        return batch

    def collate(self, rows: list[dict]) -> dict:
        """Returns the latent mode's batch, with the batches of the other modes under their names."""
        batch = super().collate([row["latent"] for row in rows])
        others = {mode: [row[mode] for row in rows] for mode in OTHERS}
        return batch | {mode: collate_for_device(items, self.markers.eos, None) for mode, items in others.items()}


class MultiMode(Coconut):
    """Coconut that adds the losses of the other modes in training."""

    def forward(self, *args, direct: dict | None = None, written: dict | None = None, **kwargs) -> CoconutOutput:
        """Runs `Coconut.forward` on the latent mode. With batches of the other modes, as `collate_for_device` returns
        them, the loss is the sum of all three."""
        # the latent pass runs last, so its backward comes first
        losses = [self._loss_of(**batch) for batch in (direct, written) if batch is not None]
        output = super().forward(*args, **kwargs)
        return output._replace(loss=sum(losses, output.loss)) if losses else output

    def _loss_of(self, share: float = 1.0, **batch) -> torch.Tensor:
        return share * super().forward(**batch).loss


MODEL, DATASET = MultiMode, ModesDataset


def validate(pretrained, data, stage: int, config, world, title: str = "validating") -> tuple[dict, list[dict]]:
    """Evaluates all three modes with trainer.evaluate.evaluate. Collective: every rank must call it.

    The metrics are those of the latent mode, but `loss` is the sum over the modes and `accuracy` the harmonic mean of
    accuracy_direct, accuracy_written and accuracy_latent. cot_match_MODE and generated_tokens_MODE are added. Each
    prediction holds "output", "answer" and "correct" of the other modes under the mode's name.
    """
    by_mode = {
        variant.mode: evaluate(pretrained, data, stage, variant, world, f"{title}, {variant.mode}")
        for variant in Method.variants(config)
    }
    metrics, predictions = by_mode["latent"]
    for name in ("accuracy", "cot_match", "generated_tokens"):
        metrics = metrics | {f"{name}_{mode}": own_metrics[name] for mode, (own_metrics, _) in by_mode.items()}
    metrics["accuracy"] = statistics.harmonic_mean([metrics[f"accuracy_{mode}"] for mode in MODES])
    metrics |= {name: sum(own_metrics[name] for own_metrics, _ in by_mode.values()) for name in ("loss", "seconds")}
    for mode in OTHERS:
        for prediction, other in zip(predictions, by_mode[mode][1], strict=True):
            prediction[mode] = {name: other[name] for name in ("output", "answer", "correct")}
    return metrics, predictions
