"""A trained model and the questions that it is asked: its thoughts, what it writes, and how likely it finds names.

Legend: N questions, B of them in a batch, K thoughts, D hidden size, C names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from coconut import Coconut, Edit
from config import Config
from curriculum import Markers, prompt
from dataset import collate_prompts
from preprocessing.tokens import question_ids
from tools.generate import load
from trainer.evaluate import extract_answer
from trainer.inference import config_for
from utils import UserError


class Asked(NamedTuple):
    """A model, and what its prompts are made with."""

    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    markers: Markers
    config: Config
    stage: int


class Change(NamedTuple):
    """Thoughts that are put in the place of a model's own."""

    content: torch.Tensor  # (N, K, D)
    numbers: frozenset[int]  # which thoughts, from 0

    def of(self, rows: slice) -> Edit:
        """The edit of a batch."""

        def edit(number: int, thought: torch.Tensor, _) -> torch.Tensor:
            return self.content[rows, number, None].to(thought) if number in self.numbers else thought

        return edit


class Subject:
    """A model, and questions, {question, answer, steps, ...} each, `batch` of them at once, asked with n_thoughts, by
    default as many as its stage was trained with."""

    def __init__(self, asked: Asked, examples: list[dict], n_thoughts: int | None = None, batch: int = 250):
        self.asked, self.examples, self.batch = asked, examples, batch
        self.model, self.tokenizer = asked.model, asked.tokenizer
        self._ids = question_ids(asked.tokenizer, [example["question"] for example in examples])
        self.n_thoughts = self._row([], n_thoughts).count(asked.markers.latent)

    @classmethod
    def load(cls, checkpoint: str, examples: list[dict], n_thoughts: int | None = None) -> Subject:
        """Raises UserError where there is no such checkpoint, or where it has no thoughts to look at, or not one a
        step."""
        model = load(checkpoint)
        asked = Asked(model, model.tokenizer, model.markers, config_for(model, n_thoughts), model.stage)
        subject = cls(asked, examples, n_thoughts)
        config = asked.config
        if config.rules.predicts_end_marker or not model.one_by_one:
            raise UserError(
                f"{checkpoint} is of method {config.method}: what is asked here is asked of thoughts one after the "
                f"other, and of language that follows them at once"
            )
        if subject.n_thoughts == 0:
            raise UserError(
                f"{checkpoint} has no thoughts to look at: it is of method {config.method}, stage {asked.stage}"
                + " (--thoughts K asks it with K)" * config.has_latents
            )
        if config.c_thought != 1:
            raise UserError(
                f"{checkpoint} has {config.c_thought} thoughts a step (c_thought), but what is measured of the k-th "
                "thought is of the k-th step"
            )
        return subject

    def asking(self, examples: list[dict]) -> Subject:
        """The same model with other questions."""
        return Subject(self.asked, examples, self.n_thoughts, self.batch)

    def _row(self, question: list[int], n_thoughts: int | None) -> list[int]:
        config = replace(self.asked.config, eval_latents=n_thoughts)
        return prompt(question, [], self.asked.stage, config, self.asked.markers)

    def batches(
        self, n_thoughts: int | None = None, forced: list[int] | None = None, size: int | None = None
    ) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """All questions, each followed by its thoughts and by the tokens that are forced upon the model, in batches of
        `size` (default: `batch`): the questions' numbers, and input_ids, attention_mask, position_ids, (B, T) int64,
        padded on the left. Raises UserError where one does not fit into the model."""
        n_thoughts = self.n_thoughts if n_thoughts is None else n_thoughts
        rows = [self._row(ids, n_thoughts) + (forced or []) for ids in self._ids]
        longest, limit = max(map(len, rows)), self.model.max_positions or math.inf
        if longest >= limit:
            raise UserError(
                f"a question of {longest} tokens with its thoughts leaves no position of {limit} for an answer"
            )
        device = self.model.base_causallm.device
        size = size or self.batch
        for begin in range(0, len(rows), size):
            chosen = slice(begin, begin + size)
            inputs = collate_prompts(rows[chosen], self.asked.markers.eos)
            yield chosen, {name: tensor.to(device) for name, tensor in inputs.items()}

    def thoughts(self, n_thoughts: int | None = None) -> torch.Tensor:
        """(N, K, D) float32: the input embeddings of the latent positions."""
        return torch.cat([embeds[:, at].float().cpu() for _, embeds, at in self._states(n_thoughts)])

    def readings(self) -> torch.Tensor:
        """(N, K, D) float32: the last hidden states that thoughts are made from, one position before each latent;
        without feedback they exist all the same."""
        return torch.cat([hidden[:, at - 1].float().cpu() for hidden, _, at in self._states(None)])

    def _states(self, n_thoughts: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each batch the hidden states and input embeddings, (B, T, D), and the columns of the latents, (K,)."""
        for _, inputs in self.batches(n_thoughts):
            yield *self.model.states(**inputs), (inputs["input_ids"][0] == self.asked.markers.latent).nonzero()[:, 0]

    def outputs(
        self,
        n_thoughts: int | None = None,
        change: Change | None = None,
        hidden_columns: frozenset[int] = frozenset(),
    ) -> list[str]:
        """The text that the model generates for each question, at most twice as long as the longest steps and answer.

        hidden_columns: the numbers of thoughts that no later position may attend to.
        """
        texts, longest = [], 2 * self._longest_answer()
        for rows, inputs in self.batches(n_thoughts):
            if hidden_columns:
                latents = (inputs["input_ids"][0] == self.asked.markers.latent).nonzero().flatten()
                inputs["attention_mask"][:, latents[sorted(hidden_columns)]] = 0
            edit = change.of(rows) if change is not None else None
            n_new = min(longest, (self.model.max_positions or math.inf) - inputs["input_ids"].shape[1])
            for row in self.model.generate(**inputs, max_new_tokens=n_new, edit=edit).tolist():
                new = itertools.takewhile(lambda token: token != self.asked.markers.eos, row)
                texts.append(self.tokenizer.decode([*new], skip_special_tokens=True))
        return texts

    def answers(self, **options) -> list[str]:
        """The answers in `outputs`."""
        return [extract_answer(text) for text in self.outputs(**options)]

    def _longest_answer(self) -> int:
        """Tokens of the longest written steps and answer, EOS included."""
        separator = self.asked.config.step_separator
        texts = [
            "".join(step + separator for step in example["steps"]) + "### " + example["answer"]
            for example in self.examples
        ]
        return 1 + max(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    @torch.no_grad()
    def values(
        self, names: list[list[str]], forced: str = "", n_thoughts: int | None = None, change: Change | None = None
    ) -> torch.Tensor:
        """(N, C) float32: for each of a question's C names the product of its tokens' probabilities, when the model has
        to go on with `forced` after its thoughts, and then with the name (paper, Section 5.2). 0 where a question has
        fewer names. A space at the end of `forced` is of the name where the tokenizer has it so.
        """
        count, every = max(map(len, names)), sorted({name for row in names for name in row})
        ids = self.tokenizer([forced + name for name in every], add_special_tokens=False)["input_ids"]
        common = _common_prefix(self.tokenizer(forced, add_special_tokens=False)["input_ids"], ids)
        width = max(map(len, ids)) - len(common)
        padded = {name: (row[len(common) :] + [-1] * width)[:width] for name, row in zip(every, ids, strict=True)}
        rest = torch.tensor([[padded[name] for name in row] + [[-1] * width] * (count - len(row)) for row in names])
        found = []
        # each name of several tokens takes a copy of its question's cache
        size = self.batch if width == 1 else max(1, self.batch // count)
        for rows, inputs in self.batches(n_thoughts, common, size):
            edit = change.of(rows) if change is not None else None
            found.append(self._continued(inputs, rest[rows].to(inputs["input_ids"].device), edit).exp().cpu())
        values = torch.cat(found)
        for place, row in enumerate(names):
            values[place, len(row) :] = 0
        return values

    def _continued(self, inputs: dict[str, torch.Tensor], names: torch.Tensor, edit: Edit | None) -> torch.Tensor:
        """(B, C) float32: log-probability of each name, (B, C, n) int64 with -1 where it has fewer tokens.

        The thoughts are made once, and the names share the cache of what is before them.
        """
        hidden, embeds = self.model.states(**inputs, edit=edit)
        first = self.model.head(hidden[:, -1]).float().log_softmax(-1)  # (B, V)
        total = first.gather(1, names[:, :, 0].clamp(min=0))  # (B, C)
        n_rows, count, width = names.shape
        if width == 1:
            return total
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        cache = DynamicCache(config=self.model.base_causallm.config)
        self.model.backbone.span(embeds, mask, positions, masked=True, cache=cache)
        cache.batch_repeat_interleave(count)
        flat = names.flatten(0, 1)  # (B * C, n)
        after = positions[:, -1:].repeat_interleave(count, 0) + 1 + torch.arange(width - 1, device=mask.device)
        mask = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(flat[:, :-1])], dim=1)
        tokens = self.model.base_causallm.get_input_embeddings()(flat[:, :-1].clamp(min=0))
        states = self.model.backbone.span(tokens, mask, after, masked=True, cache=cache)  # (B * C, n - 1, D)
        later = self.model.head(states).float().log_softmax(-1)  # (B * C, n - 1, V)
        shares = later.gather(2, flat[:, 1:, None].clamp(min=0))[..., 0].masked_fill(flat[:, 1:] < 0, 0)
        return total + shares.sum(1).view(n_rows, count)


def _common_prefix(forced: list[int], rows: list[list[int]]) -> list[int]:
    """The first of the forced tokens, those with which all rows begin; each row has at least one after them."""
    length = min(len(forced), *(len(row) - 1 for row in rows))
    while any(row[:length] != forced[:length] for row in rows):
        length -= 1
    return forced[:length]
