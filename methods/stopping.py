"""A head that stops the thoughts: after each one it predicts whether the answer would be right if language began now.

After k = 0..K thoughts the probability is p_k = sigmoid(w h_k + b), where h_k is the last hidden state that thought k +
1 is computed from. The label y_k is 1 if greedy decoding, forced after k thoughts, ends with the tokens of the gold
answer (SLPO, arXiv 2607.19691). A row stops at the first k with p_k > stop_threshold, and after K thoughts at the
latest.

    loss = mean over examples and k = 0..K of BCE(p_k, y_k)

The Coconut that `load_model_path` names is frozen. The labels therefore stay those of the evaluated model, the loss is
convex, and the answer after k thoughts is bitwise unchanged. Joint training would change the labels in every step.

Legend: B rows, T columns of a batch, K latents, D hidden size, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import methods
from methods import key


class Method(methods.Method):
    has_latents = True
    generates = True
    has_stages = False
    variant_of = "coconut"
    defaults = {"stop_threshold": 0.6}
    stop_threshold: float = key(
        1.0,
        "stopping: stop the thoughts when the predicted probability of a right answer exceeds this; 1: never",
        low=0,
        high=1,
        free=True,
        shapes=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method != "stopping":
            if config.stop_threshold != 1:
                yield f"stop_threshold is for method stopping, not {config.method}"
            return
        passes = getattr(config, "latent_passes", "sequential")
        if config.thought == "pause" or passes != "sequential":
            how = "thought pause has none" if config.thought == "pause" else f"latent_passes {passes} runs all at once"
            yield f"method stopping decides after each thought, and {how}"
        if getattr(config, "positions", "plain") != "plain" and not config.only_eval:
            yield "method stopping trains on no sequence of the model: unset positions"
        if config.lora_rank is not None:
            yield "method stopping trains only its head: unset lora_rank; LoRA updates of a checkpoint are merged"

    @staticmethod
    def options(config) -> dict:
        return {"stop_threshold": config.stop_threshold, "max_new_tokens": config.n_new_tokens}


# --- With torch ---

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from coconut import Coconut, CoconutOutput, Edit
from curriculum import prefix, prompt
from dataset import MicroBatch, StageDataset, collate_prompts, latent_columns, to_device
from model.layout import Rows, take
from model.thought import Seen
from preprocessing.tokens import batched
from trainer.checkpoint import differences
from trainer.evaluate import autocast, before_eos, evaluate
from trainer.files import read_weights
from trainer.pretrained import read_description
from utils import UserError, log


class ForcedDataset(StageDataset):
    """Items (input_ids, labels, prompts): the last stage's sequence, and the prompts after 0..K thoughts."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], list[list[int]]]:
        input_ids, labels = super().__getitem__(key)
        question, n_latents = self.tokens[key[0]][0], input_ids.count(self.markers.latent)
        prompts = [prefix(question, k, self.config, self.markers) for k in range(n_latents + 1)]
        return input_ids, labels, prompts

    def others(self, item: tuple, words) -> list:
        return [f"  language is forced after 0 to {len(item[2]) - 1} thoughts"]

    def weight(self, micro: MicroBatch, stage: int) -> float:
        """Weights by examples: the loss is a mean over examples, whatever the number of tokens."""
        return micro.weight

    def collate(self, rows: list[tuple]) -> dict:
        """Returns the arguments of `Stopping.forward`. No token is supervised."""
        batch = collate_prompts([one for _, _, prompts in rows for one in prompts], self.markers.eos)
        answers = [before_eos(self.markers.eos, ids[len(prompts[-1]) :]) for ids, _, prompts in rows]
        return batch | {"answers": answers, "supervised": torch.tensor([], dtype=torch.int64)}


class AllStopped(Exception):
    """Every row of a batch has stopped."""


class Stopping(Coconut):
    """A frozen Coconut with a head that stops its thoughts.

    Args, besides those of Coconut:
        stop_threshold: the probability, from 0 to 1, above which a row stops; 1: never.
        max_new_tokens: length of the forced generations that give the labels.
    """

    saved_parts = ("stop_head",)  # a checkpoint saves each of these modules in its own file

    def __init__(self, *args, stop_threshold: float = 1.0, max_new_tokens: int = 128, **kwargs):
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)
        self.stop_threshold, self.max_new_tokens = stop_threshold, max_new_tokens
        width = self.base_causallm.get_input_embeddings().weight.shape[1]
        self.stop_head = nn.Linear(width, 1, dtype=self.base_causallm.dtype)
        for parameter in self.stop_head.parameters():
            nn.init.zeros_(parameter)

    def train(self, mode: bool = True) -> Stopping:
        """Keeps dropout off: the frozen model must behave as in evaluation."""
        return super().train(False)

    def load_companion(self, config, folder: Path | None, _) -> None:
        """Loads the head of a checkpoint; a checkpoint of another method gets a new one. Raises UserError if a head is
        missing, or if that checkpoint's sequences or thoughts are others."""
        path = None if folder is None else folder / "stop_head.safetensors"
        if path is not None and path.is_file():
            self.stop_head.load_state_dict(read_weights(path, self.stop_head.state_dict(), "stop head"))
        elif config.only_eval or (folder and read_description(folder).get("method") == "stopping"):
            raise UserError(
                f"{folder or config.load_model_path} has no stop_head.safetensors: method stopping trains it"
            )
        elif folder is not None and (others := _differences(config, folder)):
            raise UserError(f"method stopping freezes {folder}, which was trained otherwise: {'; '.join(others)}")
        elif config.load_model_path is None:
            log.warning("method stopping trains a head for a Coconut that is not trained: set load_model_path to one")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args,
        answers: list[list[int]] | None = None,
        **kwargs,
    ) -> CoconutOutput:
        """Runs `Coconut.forward`; with `answers`, returns the head's loss.

        Args:
            input_ids, attention_mask: (B (K + 1), T), each example after 0..K thoughts, padded on the left.
            answers: the B gold answers, without EOS.
        """
        if answers is None:
            output = super().forward(input_ids, attention_mask, *args, **kwargs)
            unused = sum(0 * parameter.sum() for parameter in self.stop_head.parameters())  # DDP waits for a gradient
            return output if output.loss is None else output._replace(loss=output.loss + unused)
        each = len(input_ids) // len(answers)  # K + 1
        with torch.no_grad():
            right = self.right(input_ids, attention_mask, answers)  # (B, K + 1)
            states = self._states_between(input_ids[each - 1 :: each], attention_mask[each - 1 :: each])
        logits = self.stop_head(states)[..., 0]  # (B, K + 1)
        return CoconutOutput(F.binary_cross_entropy_with_logits(logits, right.to(logits)), states, None)

    @torch.no_grad()
    def right(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
        """Returns (B, K + 1) bool: whether greedy decoding after 0..K thoughts ends with the answer. Arguments as in
        `forward`."""
        limit = self.max_positions or math.inf
        n_new = [min(self.max_new_tokens, limit - length) for length in attention_mask.sum(dim=1).tolist()]
        rows: list[list[int]] = [[] for _ in n_new]
        for n in set(n_new):  # a label must not depend on the lengths of other rows
            indices = [index for index, own in enumerate(n_new) if own == n]
            tokens = super().generate(input_ids[indices], attention_mask[indices], n).tolist()
            for index, row in zip(indices, tokens, strict=True):
                rows[index] = row
        each = len(rows) // len(answers)  # K + 1
        gold = [answer for answer in answers for _ in range(each)]
        right = [
            before_eos(self.eos_token_id, row)[-len(answer) :] == answer for row, answer in zip(rows, gold, strict=True)
        ]
        return torch.tensor(right, device=input_ids.device).view(-1, each)

    @torch.no_grad()
    def probabilities(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns p_0 .. p_K, (B, K + 1), for prompts as in `generate` whose K latents are in the same columns."""
        return self._probability(self._states_between(input_ids, attention_mask))

    def _states_between(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns h_0 .. h_K, (B, K + 1, D)."""
        hidden, _ = self.states(input_ids, attention_mask)
        columns = latent_columns(input_ids, self.latent_token_id)
        return hidden[:, [columns[0] - 1, *columns]]

    def _probability(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, t, D) -> (B, t)."""
        return self.stop_head(hidden)[..., 0].float().sigmoid()

    def shortened(self, prompts: list[list[int]]) -> list[list[int]]:
        """Returns prompts without the latents that come after each one's stop."""
        if self.stop_threshold == 1:
            return prompts
        batch, device = collate_prompts(prompts, self.eos_token_id), self.stop_head.weight.device
        _, takes_part = self.think(*(batch[name].to(device) for name in ("input_ids", "attention_mask")))
        rows = zip(batch["input_ids"], takes_part.cpu(), strict=True)
        return [ids[columns].tolist() for ids, columns in rows]

    @torch.no_grad()
    def think(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes thoughts until every row has stopped, for prompts as in `generate`. Returns the input embeddings
        with the thoughts, (B, T, D), and the attended columns, (B, T) bool: a row's latents after its stop are left
        out."""
        is_latent = input_ids == self.latent_token_id  # (B, T)
        columns, embeds = latent_columns(input_ids, self.latent_token_id), self.backbone.embed(input_ids)
        takes_part = ~is_latent if attention_mask is None else attention_mask.bool() & ~is_latent
        thinking = is_latent.any(dim=1)  # (B,)

        def watch(number: int, thought: torch.Tensor, seen: Seen) -> torch.Tensor:
            nonlocal thinking
            column = columns[number]
            stops = self._probability(seen.hidden)[:, 0] > self.stop_threshold  # (B,)
            thinking = thinking & ~(is_latent[:, column] & stops)
            if not thinking.any():
                raise AllStopped
            goes_on = thinking & is_latent[:, column]
            takes_part[:, column] |= goes_on
            embeds[:, column] = torch.where(goes_on[:, None], thought[:, 0].to(embeds.dtype), embeds[:, column])
            return thought

        with suppress(AllStopped):
            self.states(input_ids, attention_mask, edit=watch)
        return embeds, takes_part

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 16,
        position_ids: torch.Tensor | None = None,
        edit: Edit | None = None,
        return_thoughts: bool = False,
        **sampling,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Same as `Coconut.generate`, but each row leaves out its latents after it stops. Thoughts are computed until
        the last row stops; then one pass runs all prompts, each with its own number of thoughts.

        With `edit` or `return_thoughts`, which refer to thoughts by number, no row stops. position_ids are ignored:
        positions count from 0.
        """
        if self.stop_threshold == 1 or edit is not None or return_thoughts:
            return super().generate(
                input_ids, attention_mask, max_new_tokens, position_ids, edit, return_thoughts, **sampling
            )
        embeds, takes_part = self.think(input_ids, attention_mask)
        # move padding and omitted latents to the left, and cut to the longest row
        order = takes_part.int().argsort(dim=1, stable=True)[:, -int(takes_part.sum(dim=1).max()) :]
        mask = take(takes_part, order).long()
        ids = take(input_ids, order).masked_fill(mask == 0, self.eos_token_id)
        if sampling:
            return super().generate(ids, mask, max_new_tokens, **sampling)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        rows = Rows(ids, mask, positions, columns=[], before=None, masks=(True, True))
        cache = self.backbone.make_cache(ids.shape[1] + max_new_tokens, keeps=True)
        hidden = self.backbone.span(take(embeds, order), *rows.part(0, ids.shape[1]), cache)
        return self._decode(hidden, rows, cache, max_new_tokens)


def _differences(config, folder: Path) -> list[str]:
    """Returns the keys that make other thoughts or sequences than a checkpoint's, but for the number of thoughts."""
    names = ("method", "thought", "latent_markers", "step_separator", "latent_passes")
    return [text for name, text in differences(config, folder).items() if name in names]


MODEL, DATASET = Stopping, ForcedDataset


def validate(pretrained, data, stage: int, config, world, title: str = "validating") -> tuple[dict, list[dict]]:
    """Runs trainer.evaluate.evaluate and adds the number of computed thoughts: `thoughts` of each prediction, and their
    mean. Collective: every rank must call it."""
    metrics, predictions = evaluate(pretrained, data, stage, config, world, title)
    model, _, markers = pretrained
    for part in batched(predictions, config.eval_batch_size):
        prompts = [prompt(*data.val[prediction["index"]][:2], stage, config, markers) for prediction in part]
        batch = to_device(collate_prompts(prompts, markers.eos), world.device)
        with autocast(config, world):
            _, takes_part = model.think(batch["input_ids"], batch["attention_mask"])
        is_latent = batch["input_ids"] == markers.latent
        kept, left_out = ((is_latent & columns).sum(dim=1).tolist() for columns in (takes_part, ~takes_part))
        for prediction, n_kept, n_left_out in zip(part, kept, left_out, strict=True):
            prediction["thoughts"] = n_kept
            prediction["generated_tokens"] -= n_left_out
    means = {name: float(np.mean([each[name] for each in predictions])) for name in ("thoughts", "generated_tokens")}
    return metrics | means, predictions
