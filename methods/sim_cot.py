"""SIM-CoT (arXiv 2509.20317): in training, a second model predicts each step's text from the step's thoughts.

The step decoder is a causal LM of the same family with its own weights. For each group of c thoughts of a row, its
input is the thoughts as fed back, followed by the tokens of the group's target text in the base's input embedding. It
sees neither the question nor the other groups. Its loss is the cross-entropy of that text and an EOS, averaged over all
groups of all rows of an optimizer step on all ranks. The gradients run through the thoughts into the base. The decoder
belongs to the trainer's state: the evaluated model has none.

Legend: B rows, T columns of a batch, D hidden size; P groups of thoughts in a batch, c thoughts of a group, m tokens of
the longest text, S predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import methods
from methods import LARGEST_FACTOR, Texts, key


def step_targets(steps: Sequence[str], max_latent_stage: int) -> list[str]:
    """Returns the target texts of the groups of thoughts: each of the first max_latent_stage steps. If there are more
    steps, one more text follows: step max_latent_stage and all later steps, joined by newlines. The last group predicts
    it once no step is written."""
    if not max_latent_stage:
        return []
    more = ["\n".join(steps[max_latent_stage - 1 :])] if len(steps) > max_latent_stage else []
    return [*steps[:max_latent_stage], *more]


def group_targets(
    texts: Sequence[Sequence[int]], answer: Sequence[int], n_latents: int, stage: int, config
) -> list[Sequence[int] | None]:
    """Returns the target tokens, without EOS, of each group of a row's latents at a stage, or None for no target;
    `texts` are the tokens of `step_targets`."""
    last = config.max_latent_stage
    surplus = answer if config.step_decoder_surplus == "answer" else None
    targets = list(texts[:last])
    if stage > last and len(texts) > last:
        targets[-1] = texts[last]
    return [targets[group] if group < len(targets) else surplus for group in range(n_latents // config.c_thought)]


class Method(methods.Method):
    has_latents = True
    evaluates_as_coconut = True
    n_companions = 1
    variant_of = "coconut"
    defaults = {"step_decoder": "pretrained", "c_thought": 2, "max_latent_stage": 5, "epochs_per_stage": 3}
    step_decoder: str = key(
        "none",
        "sim_cot: none | pretrained | copy: in training, a second model predicts each step from the thoughts that "
        "replace it: model_id with its pretrained weights, or a copy of this model's initial weights",
        choices=("none", "pretrained", "copy"),
        later=True,
    )
    step_decoder_weight: float = key(
        1.0, "sim_cot: weight of that model's loss", low=0, high=LARGEST_FACTOR, later=True
    )
    step_decoder_reduction: str = key(
        "sum", "sim_cot: sum | mean of its loss over the tokens of a step", choices=("sum", "mean"), later=True
    )
    step_decoder_surplus: str = key(
        "answer",
        "sim_cot: answer | none: target of the groups of thoughts beyond an example's steps",
        choices=("answer", "none"),
        later=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.only_eval:
            return
        if config.step_decoder == "none":
            if config.method == "sim_cot":
                yield "method sim_cot needs a step_decoder, pretrained or copy: without one it is method coconut"
            return
        if config.method != "sim_cot":
            yield f"step_decoder is for method sim_cot, not {config.method}"
        elif config.thought == "pause" or not config.c_thought or getattr(config, "latent_passes", None) == "0":
            yield "method sim_cot predicts steps from thoughts: it needs a thought that is fed back, and c_thought"
        if config.step_decoder == "pretrained" and config.from_scratch:
            yield "step_decoder pretrained needs the weights of model_id, and from_scratch ignores them: set it to copy"

    @staticmethod
    def texts(config) -> Texts:
        n_groups = config.max_latent_stage
        return Texts({"step targets": n_groups}, lambda steps: step_targets(steps, n_groups))

    @staticmethod
    def options(config) -> dict:
        return {"step_decoder_weight": config.step_decoder_weight}

    @staticmethod
    def older(values: dict) -> None:
        """Method coconut with step_decoder."""
        if values.get("method", "coconut") == "coconut" and values.get("step_decoder", "none") != "none":
            values["method"] = "sim_cot"


# --- With torch ---

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coconut import Coconut, CoconutOutput
from dataset import StageDataset, collate_prompts
from model import lora


class StepTargetDataset(StageDataset):
    """Items (input_ids, labels, targets): for each group of the row's thoughts its target tokens, or None for no
    target."""

    counts_loss_terms = True

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], list[list[int] | None]]:
        input_ids, labels = super().__getitem__(key)
        _, texts, answer = self.tokens.auxiliary[key[0]]
        n_latents = input_ids.count(self.markers.latent)
        stage = self.stage_of(key, n_steps=len(self.tokens[key[0]][1]))
        return input_ids, labels, group_targets(texts, answer, n_latents, stage, self.config)

    def others(self, item: tuple, words) -> list:
        size, texts = self.config.c_thought, ["nothing" if target is None else words(target) for target in item[2]]
        return [f"  latents {k * size + 1} to {k * size + size} predict: {text}" for k, text in enumerate(texts)]

    def collate(self, rows: list[tuple]) -> dict:
        """Returns `StageDataset.collate` with the further arguments of `SimCot.forward`; `loss_counts` is the number of
        groups. A batch without groups gets one that does not count, because DDP waits for a gradient of the decoder's
        weights."""
        batch = super().collate([row[:2] for row in rows])
        size, eos = self.config.c_thought, self.markers.eos
        first = next(iter(batch["latent_columns"]), 0)  # first latent column of each row that has latents
        groups = [
            (row, first + number * size, [*target, eos])
            for row, (_, _, targets) in enumerate(rows)
            for number, target in enumerate(targets)
            if target is not None
        ]
        batch["loss_counts"] = {"auxiliary": len(groups)}
        is_mean = self.config.step_decoder_reduction == "mean"
        divisors = [len(target) if is_mean else 1 for _, _, target in groups]
        if not groups:
            groups, divisors = [(0, 0, [eos])], [math.inf]
        row_numbers, columns, targets = zip(*groups, strict=True)
        lengths = torch.tensor([len(target) for target in targets])
        begins = torch.arange(len(targets)) * (size - 1 + lengths.max()) + size - 1
        batch["steps"] = {
            "rows": torch.tensor(row_numbers),
            "columns": torch.tensor(columns)[:, None] + torch.arange(size),
            "ids": collate_prompts([target[:-1] for target in targets], eos, on_the_left=False)["input_ids"],
            "indices": torch.cat([begin + torch.arange(n) for begin, n in zip(begins, lengths, strict=True)]),
            "targets": torch.tensor([*chain(*targets)]),
            "divisors": torch.tensor(divisors).repeat_interleave(lengths),
        }
        return batch


class StepDecoder(Coconut):
    """A causal LM without latents and without dropout that continues thoughts with their target text.

    Its own input embeddings are unused; they are frozen unless its LM head is tied to them.
    """

    def __init__(self, base: PreTrainedModel, eos_token_id: int):
        super().__init__(base, None, None, None, eos_token_id)
        embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
        if embeddings.weight is not head.weight:
            embeddings.requires_grad_(False)

    def train(self, mode: bool = True) -> StepDecoder:
        return super().train(False)

    def forward(self, embeds: torch.Tensor, indices: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the (S,) cross-entropies of the targets, (S,), at indices in the flattened (P, c + m) of embeds,
        (P, c + m, D). Positions count from 1, which matters for absolute position embeddings."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        positions = mask.cumsum(dim=1)
        cache = self.backbone.make_cache(embeds.shape[1], keeps=False)
        hidden = self.backbone.span(embeds, mask, positions, masked=False, cache=cache)
        return self.backbone.cross_entropy(hidden.flatten(0, 1)[indices], targets, reduction="none")


class SimCot(Coconut):
    """Coconut with a step decoder in training; step_decoder_weight is the weight of the decoder's loss."""

    def __init__(self, *args, step_decoder_weight: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.step_decoder: StepDecoder | None = None
        self.step_decoder_weight = step_decoder_weight

    @property
    def companions(self) -> dict[str, Coconut]:
        return {} if self.step_decoder is None else {"step_decoder": self.step_decoder}

    def add_companion(self, base: PreTrainedModel) -> None:
        self.step_decoder = StepDecoder(base, self.eos_token_id)

    def load_companion(self, config, folder: Path | None, load: Callable[[str], PreTrainedModel]) -> None:
        """Loads the step decoder with its own weights; a pretrained one has no embeddings of the markers."""
        if config.step_decoder == "copy":
            base = copy.deepcopy(self.base_causallm)
            lora.apply_lora(base, None, 0, folder)  # merges a checkpoint's LoRA updates into the copy
        else:
            base = load(config.model_id)
        self.add_companion(base)

    def forward(self, *args, steps: dict[str, torch.Tensor] | None = None, **kwargs) -> CoconutOutput:
        """Runs `Coconut.forward`. With `steps`, the output's `auxiliary` is the decoder's loss, summed over the groups
        of the batch.

        steps, int64 as `StepTargetDataset.collate` returns them:
            rows, columns: (P,) and (P, c), where the thoughts of each group are in (B, T).
            ids: (P, m) the tokens of its text, padded.
            indices, targets: (S,), see StepDecoder.forward.
            divisors: (S,) divisor of each token's loss: 1 for a sum over a group's tokens, their number for a mean;
                infinity, float32, in a batch without groups.
        """
        output = super().forward(*args, **kwargs)
        if steps is None:
            return output
        thoughts = output.inputs_embeds[steps["rows"][:, None], steps["columns"]]  # (P, c, D)
        embeds = torch.cat([thoughts, self.backbone.embed(steps["ids"]).to(thoughts.dtype)], dim=1)
        losses = self.step_decoder(embeds, steps["indices"], steps["targets"]) / steps["divisors"]
        return output._replace(auxiliary=self.step_decoder_weight * losses.sum())


MODEL, DATASET = SimCot, StepTargetDataset
