"""A trained model with questions: its thoughts, its outputs, and how likely it finds given names.

Legend: N questions, B questions in a batch, T columns, K thoughts, D hidden size, V vocabulary, C names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import DynamicCache

from coconut import Coconut, Edit
from curriculum import prompt
from dataset import collate_prompts, to_device
from model.kv_cache import can_fork
from model.layout import restored
from preprocessing.tokens import ANSWER_PREFIX, question_ids
from trainer.evaluate import before_eos, extract_answer
from trainer.inference import config_for, load_for_use
from utils import UserError


class Change(NamedTuple):
    """Vectors that replace some of the model's own thoughts."""

    content: torch.Tensor  # (N, K, D)
    numbers: frozenset[int]  # which thoughts, from 0

    def of(self, rows: slice) -> Edit:
        """Returns the edit (see `Coconut.forward`) for a batch of these questions."""

        def edit(number: int, thought: torch.Tensor, _) -> torch.Tensor:
            return self.content[rows, number, None].to(thought) if number in self.numbers else thought

        return edit


class Subject:
    """A model with the questions that it is asked.

    Args:
        model: with its tokenizer, markers, config and stage, as `trainer.inference.load` returns it.
        examples: {question, answer, steps, ...} each.
        n_thoughts: thoughts for each question; default: as many as in training at the model's stage.
        batch: questions in a batch.
    """

    def __init__(self, model: Coconut, examples: list[dict], n_thoughts: int | None = None, batch: int = 250):
        self.model, self.examples, self.batch = model, examples, batch
        self.tokenizer, self.markers = model.tokenizer, model.markers
        self._ids = question_ids(model.tokenizer, [example["question"] for example in examples])
        self.n_thoughts = self._prompt([], n_thoughts).count(model.markers.latent)

    @classmethod
    def load(
        cls, checkpoint: str, examples: list[dict], n_thoughts: int | None = None, trust_remote_code: bool = False
    ) -> Subject:
        """Loads a checkpoint. Raises UserError if it does not exist, or if it does not make one thought a step, one
        after the other, with text right after the last one."""
        model = load_for_use(checkpoint, trust_remote_code=trust_remote_code)
        if hasattr(model, "stop_threshold"):
            model.stop_threshold = 1.0  # never: as many thoughts as asked for
        config = config_for(model, n_thoughts)  # raises UserError for an impossible number
        subject = cls(model, examples, n_thoughts)
        if config.rules.predicts_end_marker or not model.one_by_one:
            raise UserError(
                f"{checkpoint} has method {config.method}: the analysis needs a method that makes thoughts one after "
                "the other and continues with text right after the last one"
            )
        if subject.n_thoughts == 0:
            raise UserError(
                f"{checkpoint} has no thoughts to analyse: its method is {config.method}, its stage {model.stage}"
                + " (--thoughts K gives it K)" * config.has_latents
            )
        if config.c_thought != 1:
            raise UserError(
                f"{checkpoint} has {config.c_thought} thoughts a step (c_thought): the analysis compares the k-th "
                "thought with the k-th step, so it needs one"
            )
        return subject

    def asking(self, examples: list[dict]) -> Subject:
        """Returns the same model with other questions."""
        return Subject(self.model, examples, self.n_thoughts, self.batch)

    def _prompt(self, question: list[int], n_thoughts: int | None) -> list[int]:
        config = config_for(self.model, n_thoughts)
        return prompt(question, [], self.model.stage, config, self.markers)

    def batches(
        self, n_thoughts: int | None = None, forced: list[int] | None = None, size: int | None = None
    ) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """Yields all questions in batches of `size` (default: `batch`): their indices, and input_ids, attention_mask
        and position_ids, (B, T) int64, padded on the left.

        A row is a question, its thoughts and the tokens `forced`. Raises UserError if a row leaves no position free.
        """
        n_thoughts = self.n_thoughts if n_thoughts is None else n_thoughts
        rows = [self._prompt(ids, n_thoughts) + (forced or []) for ids in self._ids]
        longest, limit = max(map(len, rows)), self.model.max_positions or math.inf
        if longest >= limit:
            raise UserError(f"a question with its thoughts takes {longest} tokens, and the model has {limit} positions")
        device, size = self.model.base_causallm.device, size or self.batch
        for begin in range(0, len(rows), size):
            chosen = slice(begin, begin + size)
            yield chosen, to_device(collate_prompts(rows[chosen], self.markers.eos), device)

    def thoughts(self, n_thoughts: int | None = None) -> torch.Tensor:
        """Returns the input embeddings at the latent positions, (N, K, D) float32."""
        return torch.cat([embeds[:, columns].float().cpu() for _, embeds, columns in self._states(n_thoughts)])

    def readings(self) -> torch.Tensor:
        """Returns the last hidden states one position before each latent, (N, K, D) float32. Feedback makes thoughts
        from them; a model without feedback has them too."""
        return torch.cat([hidden[:, columns - 1].float().cpu() for hidden, _, columns in self._states(None)])

    def _states(self, n_thoughts: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields each batch's hidden states and input embeddings, (B, T, D), and the columns of its latents, (K,)."""
        for _, inputs in self.batches(n_thoughts):
            yield *self.model.states(**inputs), self._latent_columns(inputs)

    def _latent_columns(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["input_ids"][0] == self.markers.latent).nonzero()[:, 0]

    def outputs(
        self, n_thoughts: int | None = None, change: Change | None = None, masked_thoughts: frozenset[int] = frozenset()
    ) -> list[str]:
        """Generates the text after each question, at most twice as long as the longest steps and answer.

        masked_thoughts: the numbers of the thoughts that later positions may not attend to.
        """
        texts, longest = [], 2 * self._longest_answer()
        for rows, inputs in self.batches(n_thoughts):
            if masked_thoughts:
                inputs["attention_mask"][:, self._latent_columns(inputs)[sorted(masked_thoughts)]] = 0
            edit = change.of(rows) if change is not None else None
            n_new = min(longest, (self.model.max_positions or math.inf) - inputs["input_ids"].shape[1])
            for row in self.model.generate(**inputs, max_new_tokens=n_new, edit=edit).tolist():
                new = before_eos(self.markers.eos, row)
                texts.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return texts

    def answers(self, **options) -> list[str]:
        """Returns the answers in `outputs`."""
        return [extract_answer(text) for text in self.outputs(**options)]

    def _longest_answer(self) -> int:
        """Returns the largest number of tokens of an example's steps, answer and EOS."""
        separator = self.model.config.step_separator
        texts = [
            "".join(step + separator for step in example["steps"]) + ANSWER_PREFIX + example["answer"]
            for example in self.examples
        ]
        return 1 + max(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    @torch.no_grad()
    def values(
        self, names: list[list[str]], forced: str = "", n_thoughts: int | None = None, change: Change | None = None
    ) -> torch.Tensor:
        """Returns the probability of each of a question's C names, (N, C) float64, when the text after the thoughts
        begins with `forced` and continues with the name (paper, Section 5.2): the product of its tokens' probabilities.

        A question with fewer names has 0 in the columns that remain. Where the tokenizer joins a space at the end of
        `forced` with the name, that token counts as the name's.
        """
        count, every = max(map(len, names)), sorted({name for row in names for name in row})
        ids = self.tokenizer([forced + name for name in every], add_special_tokens=False)["input_ids"]
        forced_ids = self.tokenizer(forced, add_special_tokens=False)["input_ids"]
        columns = zip(forced_ids, *(row[:-1] for row in ids), strict=False)  # each name keeps a token
        common = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
        width = max(map(len, ids)) - len(common)
        padded = {name: (row[len(common) :] + [-1] * width)[:width] for name, row in zip(every, ids, strict=True)}
        rest = torch.tensor([[padded[name] for name in row] + [[-1] * width] * (count - len(row)) for row in names])
        found = []
        # each name of several tokens takes a copy of its question's cache
        size = self.batch if width == 1 else max(1, self.batch // count)
        for rows, inputs in self.batches(n_thoughts, common, size):
            edit = change.of(rows) if change is not None else None
            logs = self._log_probabilities(inputs, rest[rows].to(inputs["input_ids"].device), edit)
            found.append(logs.cpu().double().exp())  # a sentence's probability may be too small for float32
        values = torch.cat(found)
        for index, row in enumerate(names):
            values[index, len(row) :] = 0
        return values

    def _log_probabilities(
        self, inputs: dict[str, torch.Tensor], names: torch.Tensor, edit: Edit | None
    ) -> torch.Tensor:
        """Returns the log-probability of each name after its row, (B, C) float32.

        names: (B, C, n) int64, -1 after a name's last token. The names of a row share one cache, so the model makes
        the thoughts once.
        """
        hidden, embeds = self.model.states(**inputs, edit=edit)
        first = self.model.head(hidden[:, -1]).float().log_softmax(-1)  # (B, V)
        total = first.gather(1, names[:, :, 0].clamp(min=0))  # (B, C)
        n_rows, count, width = names.shape
        if width == 1:
            return total
        rows = self.model.lay_out(**inputs, prompts=True)  # a method may mask latents
        mask, positions = restored(rows.attention_mask, rows), inputs["position_ids"]
        cache = DynamicCache(config=self.model.base_causallm.config)
        before, forks = (embeds, mask, positions), can_fork(cache)
        if not forks:
            before = [value.repeat_interleave(count, 0) for value in before]
        self.model.backbone.span(*before, masked=True, cache=cache)
        if forks:
            cache.batch_repeat_interleave(count)
        flat = names.flatten(0, 1)  # (B * C, n)
        after = positions[:, -1:].repeat_interleave(count, 0) + 1 + torch.arange(width - 1, device=mask.device)
        mask = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(flat[:, :-1])], dim=1)
        tokens = self.model.base_causallm.get_input_embeddings()(flat[:, :-1].clamp(min=0))
        states = self.model.backbone.span(tokens, mask, after, masked=True, cache=cache)  # (B * C, n - 1, D)
        later = self.model.head(states).float().log_softmax(-1)  # (B * C, n - 1, V)
        shares = later.gather(2, flat[:, 1:, None].clamp(min=0))[..., 0].masked_fill(flat[:, 1:] < 0, 0)
        return total + shares.sum(1).view(n_rows, count)
