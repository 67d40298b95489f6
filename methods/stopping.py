"""A head that ends the thinking: after each thought it says whether the answer would be right if language began now.

The probability after k = 0..K thoughts is p_k = sigmoid(w h_k + b), where h_k is the last hidden state of the position
that thought k + 1 is made from. Its label y_k is 1 where language that is forced after k thoughts, decoded greedily,
ends with the tokens of the gold answer (SLPO, arXiv 2607.19691). Thinking stops at the first k with
p_k > stop_threshold, after K thoughts at the latest.

    loss = mean over examples and k = 0..K of BCE(p_k, y_k)

The Coconut that `load_model_path` names is frozen. So the labels are those of the model that will be asked, however
long the head is trained; the loss is convex; and the answer after k thoughts stays what it was, bit for bit. Trained
jointly, every step would make the labels of the step before wrong.

Legend: B rows, T columns of a batch, K latents, D hidden size, N new tokens.
"""

from __future__ import annotations

import methods
from methods import key


class Method(methods.Method):
    has_latents = True
    has_stages = False
    variant_of = "coconut"
    defaults = {"stop_threshold": 0.6}
    stop_threshold: float = key(
        1.0,
        "stopping: thinking stops once the answer is taken to be right with more than this probability; 1: never",
        low=0,
        high=1,
        free=True,
        shapes=True,
    )

    @staticmethod
    def problems(config) -> list[str]:
        if config.method != "stopping":
            wrong = config.stop_threshold != 1
            return [f"stop_threshold is for method stopping, not {config.method}"] if wrong else []
        found, passes = [], getattr(config, "latent_passes", "sequential")
        if config.thought == "pause" or passes != "sequential":
            how = "thought pause has none" if config.thought == "pause" else f"latent_passes {passes} makes all at once"
            found.append(f"method stopping decides after each thought, and {how}")
        if config.lora_rank is not None:
            found.append("method stopping trains its head alone, without lora_rank: a checkpoint's updates are merged")
        return found

    @staticmethod
    def options(config) -> dict:
        return {"stop_threshold": config.stop_threshold, "max_new_tokens": config.max_new_tokens}

    @staticmethod
    def mixes_in(config) -> bool:
        """The head is the model's, in an eval-only run too."""
        return config.method == "stopping"


# ---------------------------------------------------------------------------------------------------------------
# With torch
# ---------------------------------------------------------------------------------------------------------------

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from coconut import Coconut, CoconutOutput
from curriculum import prefix, prompt
from dataset import MicroBatch, StageDataset, collate_prompts, latent_columns
from model.layout import Rows, take
from model.thought import Seen
from trainer.evaluate import autocast, evaluate
from trainer.files import read_weights
from trainer.pretrained import read_description
from utils import UserError


class ForcedDataset(StageDataset):
    """Items (input_ids, labels, prompts): the last stage's sequence, and what language follows after 0..K thoughts."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], list[list[int]]]:
        input_ids, labels = super().__getitem__(key)
        question, n_latents = self.tokens[key[0]][0], input_ids.count(self.markers.latent)
        prompts = [prefix(question, k, self.config, self.markers) for k in range(n_latents + 1)]
        return input_ids, labels, prompts

    def others(self, item: tuple, words) -> list:
        return [f"  language is forced after 0 to {len(item[2]) - 1} thoughts"]

    def weight(self, micro: MicroBatch, stage: int) -> float:
        """The loss is a mean over examples, whatever tokens they have."""
        return micro.weight

    def collate(self, rows: list[tuple]) -> dict:
        """The arguments of `Stopping.forward`; none of the tokens is supervised."""
        batch = collate_prompts([one for _, _, prompts in rows for one in prompts], self.markers.eos)
        answers = [_before(self.markers.eos, ids[len(prompts[-1]) :]) for ids, _, prompts in rows]
        return batch | {"answers": answers, "supervised": torch.tensor([], dtype=torch.int64)}


class AllStopped(Exception):
    """No row of a batch goes on thinking."""


class Stopping(Coconut):
    """A frozen Coconut with a head that stops its thoughts.

    Args, beside those of Coconut:
        stop_threshold: the probability, from 0 to 1, above which a row stops; 1: never.
        max_new_tokens: of the forced language that the labels come from.
    """

    saved_parts = ("stop_head",)  # modules that a checkpoint keeps in a file of their own

    def __init__(self, *args, stop_threshold: float = 1.0, max_new_tokens: int = 128, **kwargs):
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)
        self.stop_threshold, self.max_new_tokens = stop_threshold, max_new_tokens
        width = self.base_causallm.get_input_embeddings().weight.shape[1]
        self.stop_head = nn.Linear(width, 1, dtype=self.base_causallm.dtype)
        for parameter in self.stop_head.parameters():
            nn.init.zeros_(parameter)

    def train(self, mode: bool = True) -> Stopping:
        """Nothing of it has dropout in training: the frozen model is the one that will be asked."""
        return super().train(False)

    def load_companion(self, config, folder: Path | None, _) -> None:
        """The head of a checkpoint; of another method's it is new. Raises UserError where there must be one."""
        path = None if folder is None else folder / "stop_head.safetensors"
        if path is not None and path.is_file():
            self.stop_head.load_state_dict(read_weights(path, self.stop_head.state_dict(), "stop head"))
        elif config.only_eval or (folder and (read_description(folder) or {}).get("method") == "stopping"):
            raise UserError(
                f"{folder or config.load_model_path} has no stop_head.safetensors: method stopping trains it"
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args,
        answers: list[list[int]] | None = None,
        **kwargs,
    ) -> CoconutOutput:
        """`Coconut.forward`; with answers the head's loss.

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
        """(B, K + 1) bool: whether greedy decoding after 0..K thoughts ends with the answer; as in `forward`."""
        left = min(self.max_new_tokens, (self.max_positions or math.inf) - input_ids.shape[1])
        each, rows = len(input_ids) // len(answers), super().generate(input_ids, attention_mask, left).tolist()
        written = [_before(self.eos_token_id, row) for row in rows]
        found = [ids[-len(answers[i // each]) :] == answers[i // each] for i, ids in enumerate(written)]
        return torch.tensor(found, device=input_ids.device).view(-1, each)

    @torch.no_grad()
    def probabilities(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """p_0 .. p_K, (B, K + 1), of prompts as in `generate` whose K latents stand in the same columns."""
        return self._probability(self._states_between(input_ids, attention_mask))

    def _states_between(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """h_0 .. h_K, (B, K + 1, D)."""
        hidden, _ = self.states(input_ids, attention_mask)
        columns = latent_columns(input_ids, self.latent_token_id)
        return hidden[:, [columns[0] - 1, *columns]]

    def _probability(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, t, D) -> (B, t)."""
        return self.stop_head(hidden)[..., 0].float().sigmoid()

    @torch.no_grad()
    def think(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Thinks until every row has stopped: input embeddings with the thoughts, (B, T, D), and which columns take
        part, (B, T) bool: of a row's latents those before it stopped. Prompts as in `generate`."""
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
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`Coconut.generate`, where a row leaves out its latents from where it stops on. It makes the thoughts until
        the last row has stopped, and then one pass over all prompts, each with its own number of thoughts.

        With `edit` or `return_thoughts`, which number the thoughts, no row stops. Positions are counted from 0,
        whatever position_ids.
        """
        if self.stop_threshold == 1 or options.get("edit") or options.get("return_thoughts"):
            return super().generate(input_ids, attention_mask, max_new_tokens, **options)
        embeds, takes_part = self.think(input_ids, attention_mask)
        # padding and what is left out, then the rest: as wide as the longest row
        order = takes_part.int().argsort(dim=1, stable=True)[:, -int(takes_part.sum(dim=1).max()) :]
        mask = take(takes_part, order).long()
        ids = take(input_ids, order).masked_fill(mask == 0, self.eos_token_id)
        sampling = {name: value for name, value in options.items() if name not in SETTINGS}
        if sampling:
            return super().generate(ids, mask, max_new_tokens, **sampling)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        rows = Rows(ids, mask, positions, columns=[], before=None, masks=(True, True))
        cache = self.backbone.make_cache(ids.shape[1] + max_new_tokens, keeps=True)
        hidden = self.backbone.span(take(embeds, order), *rows.part(0, ids.shape[1]), cache)
        return self._decode(hidden, rows, cache, max_new_tokens)


SETTINGS = ("position_ids", "edit", "return_thoughts")  # options of `Coconut.generate` that are not of sampling


def _before(eos: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


MODEL, DATASET = Stopping, ForcedDataset


def validate(pretrained, data, stage: int, config, world, title: str = "validating") -> tuple[dict, list[dict]]:
    """trainer.evaluate.evaluate, which counts all latents, with the thoughts that are made: a mean and, of each
    prediction, `thoughts`. Collective: every rank must call it."""
    metrics, predictions = evaluate(pretrained, data, stage, config, world, title)
    model, _, markers = pretrained
    for begin in range(0, len(predictions), config.eval_batch_size):
        part = predictions[begin : begin + config.eval_batch_size]
        prompts = [prompt(*data.val[one["index"]][:2], stage, config, markers) for one in part]
        batch = {name: value.to(world.device) for name, value in collate_prompts(prompts, markers.eos).items()}
        with autocast(config, world):
            _, takes_part = model.think(batch["input_ids"], batch["attention_mask"])
        is_latent = batch["input_ids"] == markers.latent
        made, left_out = ((is_latent & which).sum(dim=1).tolist() for which in (takes_part, ~takes_part))
        for one, thoughts, fewer in zip(part, made, left_out, strict=True):
            one["thoughts"], one["generated_tokens"] = thoughts, one["generated_tokens"] - fewer
    means = {name: float(np.mean([one[name] for one in predictions])) for name in ("thoughts", "generated_tokens")}
    return metrics | means, predictions
