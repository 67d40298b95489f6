"""Coconut: a causal language model that reasons in its hidden states (Hao et al. 2024, Section 3).

Legend: B rows, T columns of a batch, K latents, D hidden size, V vocabulary, N new tokens.

A sequence is processed in spans over one key-value cache. The first ends before the first latent column. Each
latent column begins a new span, because its embedding is made from the hidden state of the token before it; the last
span reaches to the end. Every token is processed once. definition.py computes the same without a cache.

Training needs no device sync here: the collator passes on where latents, labels and padding are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel

from curriculum import IGNORE
from model.backbone import Backbone, freeze_unused
from model.layout import Rows, column_of, joined, lay_out, lay_out_prompts, restored
from model.thought import Seen, make_thought

Edit = Callable[[int, torch.Tensor, Seen], torch.Tensor]  # (index of the latent, thought (B, 1, D), its inputs)


class CoconutOutput(NamedTuple):
    loss: torch.Tensor | None  # scalar
    inputs_embeds: torch.Tensor  # (B, T, D), with the thoughts filled in
    logits: torch.Tensor | None  # (B, T, V), only without labels
    thoughts: torch.Tensor | None = None  # (B, K, D), inputs_embeds of the latent columns, if return_thoughts
    hidden: torch.Tensor | None = None  # (B, T, D), last hidden states, if return_hidden
    auxiliary: torch.Tensor | None = None  # scalar, the auxiliary loss of some methods: a sum over the batch


class Coconut(nn.Module):
    """Wraps a Hugging Face causal LM. Its parameters keep their names, with the prefix `base_causallm.`.

    Args:
        base_causallm: any decoder-only model that takes `inputs_embeds` and a key-value cache.
        latent_token_id: the token whose embedding is replaced by a thought; None for methods without latents.
        start_latent_id, end_latent_id: the markers around the latents, ordinary tokens to the model.
        eos_token_id: ends a generation.
        thought: what is fed back, a name of config.THOUGHTS; its parameters have the prefix `thought.`.

    Raises UserError for a thought that does not exist or that this model does not support.
    """

    one_by_one = True  # False: the thoughts of a sequence are computed in parallel

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        latent_token_id: int | None,
        start_latent_id: int | None,
        end_latent_id: int | None,
        eos_token_id: int,
        thought: str = "last",
    ):
        super().__init__()
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.thought = make_thought(thought, base_causallm)
        self.backbone = Backbone(base_causallm)
        if self.thought.needs_layers:
            self.backbone.record_layers()
        freeze_unused(base_causallm)

    @property
    def companions(self) -> dict[str, Coconut]:
        """Returns the models that are trained and checkpointed beside this one."""
        return {}

    @property
    def thinks(self) -> bool:
        """Whether latent positions are fed thoughts, not the latent token's embedding."""
        return self.thought.sequential

    def shortened(self, prompts: list[list[int]]) -> list[list[int]]:
        """Returns prompts as generation runs them: a method may leave out latents."""
        return prompts

    def lay_out(self, *batch: torch.Tensor | None, prompts: bool = False, **hints) -> Rows:
        """Returns (input_ids, attention_mask, position_ids) in the layout of the passes (model/layout.py)."""
        arrange, padding_first = lay_out_prompts if prompts else lay_out, not self.backbone.makes_masks
        return arrange(*batch, **hints, latent_token_id=self.latent_token_id, padding_first=padding_first)

    @property
    def max_positions(self) -> int | None:
        """The model's longest sequence, in tokens; None if it has no limit."""
        return self.backbone.max_positions

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        latent_columns: list[int] | None = None,
        prefix_lengths: torch.Tensor | None = None,
        supervised: torch.Tensor | None = None,
        edit: Edit | None = None,
        return_thoughts: bool = False,
        return_hidden: bool = False,
    ) -> CoconutOutput:
        """Computes the thoughts and the mean cross-entropy of the supervised tokens, or without labels the logits.

        Args:
            input_ids: (B, T) int64. Rows may hold different numbers of latents, in any columns but the first; rows
                whose first latents are in one column, as in `dataset.collate`, share passes.
            attention_mask: (B, T), 0 at padding; default all ones.
            labels: (B, T) int64, IGNORE where nothing is supervised; labels[t] is predicted at position t - 1.
            position_ids: (B, T) int64; by default the attended tokens are numbered from 0.
            latent_columns, prefix_lengths, supervised: as in `dataset.collate_for_device`; without them the model
                computes them, which needs device syncs.
            edit: called once per latent column as edit(index, thought (B, 1, D), seen); its result replaces the
                thought. With `pause`, whose thought is the latent token's embedding, the latents are then processed one
                by one.
            return_thoughts, return_hidden: whether the output holds `thoughts` and `hidden`.

        Gradients flow through the thoughts and the cache: the whole chain is trained. With labels the LM head runs on
        the supervised positions only.
        """
        hints = {"latent_columns": latent_columns, "prefix_lengths": prefix_lengths}
        rows = self.lay_out(input_ids, attention_mask, position_ids, **hints)
        hidden, embeds, _ = self._run(rows, edit=edit)
        thoughts = embeds[:, rows.columns] if return_thoughts else None
        hidden, embeds = restored(hidden, rows), restored(embeds, rows)
        if labels is None:
            return CoconutOutput(None, embeds, self.head(hidden), thoughts, hidden if return_hidden else None)
        loss = self._loss(hidden, labels, supervised)
        for parameter in self.thought.parameters():
            loss = loss + 0 * parameter.sum()  # DDP waits for its gradient, also in a batch without latents
        return CoconutOutput(loss, embeds, None, thoughts, hidden if return_hidden else None)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 16,
        position_ids: torch.Tensor | None = None,
        edit: Edit | None = None,
        return_thoughts: bool = False,
        **generation_options,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Decodes a batch of prompts greedily; returns the new tokens only, (B, N) int64, rows padded with EOS.

        Args:
            input_ids, attention_mask, position_ids: (B, T) as in `forward`, padded on the left.
            max_new_tokens: the largest N; decoding ends earlier once every row has produced EOS.
            edit: edits the thoughts, as in `forward`.
            return_thoughts: whether to return (tokens, thoughts), thoughts (B, K, D).
            generation_options: of Hugging Face's `generate` (do_sample, temperature, num_beams, ...), which then
                continues from the embeddings with the thoughts filled in. The model's own generation_config is ignored,
                and top_k is off unless given. Raises UserError for a family of which it takes no embeddings.
        """
        rows = self.lay_out(input_ids, attention_mask, position_ids, prompts=True)
        if generation_options:
            self.backbone.check_takes_embeds()
            _, embeds, _ = self._run(rows, edit=edit)
            plain = {"eos_token_id": self.eos_token_id, "pad_token_id": self.eos_token_id, "top_k": 0, "top_p": 1.0}
            with self.backbone.own_generation_config():
                tokens = self.base_causallm.generate(
                    inputs_embeds=restored(embeds, rows),
                    attention_mask=restored(rows.attention_mask, rows),
                    max_new_tokens=max_new_tokens,
                    **{**plain, **generation_options},
                )
        elif self.backbone.recomputes:
            embeds = self.backbone.embed(rows.input_ids)
            tokens = self.backbone.generate_uncached(
                rows.input_ids, rows.attention_mask, max_new_tokens, self.eos_token_id
            )
        else:
            hidden, embeds, cache = self._run(rows, max_new_tokens, edit)
            tokens = self._decode(hidden, rows, cache, max_new_tokens)
        return (tokens, embeds[:, rows.columns]) if return_thoughts else tokens

    def _decode(self, hidden: torch.Tensor, rows: Rows, cache: Cache, max_new_tokens: int) -> torch.Tensor:
        """Decodes greedily, over the cache of a batch of prompts with last hidden states `hidden` (B, T, D)."""
        last = None if rows.columns else rows.before
        hidden, position = column_of(hidden, last), column_of(rows.position_ids, last)  # (B, 1, D), (B, 1)
        attention_mask, tokens = rows.attention_mask, []
        finished = torch.zeros_like(position, dtype=torch.bool)  # (B, 1)
        for _ in range(max_new_tokens):
            token = self.head(hidden).argmax(-1).masked_fill(finished, self.eos_token_id)  # (B, 1)
            tokens.append(token)
            finished = finished | (token == self.eos_token_id)
            if len(tokens) == max_new_tokens or finished.all():
                break
            position = position + 1
            attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
            embeds = self.backbone.embed(token)
            hidden = self.backbone.span(embeds, attention_mask, position, rows.masks[1], cache)
        return torch.cat(tokens, dim=1) if tokens else position[:, :0]

    @torch.no_grad()
    def states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        edit: Edit | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns last hidden states and input embeddings with the thoughts filled in, (B, T, D) each. Arguments as in
        `generate`; `head` turns hidden states into logits."""
        rows = self.lay_out(input_ids, attention_mask, position_ids, prompts=True)
        hidden, embeds, _ = self._run(rows, edit=edit)
        return restored(hidden, rows), restored(embeds, rows)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits (..., V) of hidden states (..., D), as in the model's own forward."""
        return self.backbone.head(hidden)

    def _run(
        self, rows: Rows, new_columns: int = 0, edit: Edit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Processes a batch span by span.

        Returns the last hidden states (B, T, D), the input embeddings with the thoughts filled in (B, T, D), and the
        cache, which holds all columns if new_columns > 0.
        """
        embeds, width = self.backbone.embed(rows.input_ids), rows.input_ids.shape[1]
        columns = rows.columns if self.thought.sequential or edit is not None else []
        bounds = list(pairwise([0, *columns, width]))
        cache = self.backbone.make_cache(width + new_columns, keeps=bool(columns) or new_columns > 0)
        precomputed = self.thought.precomputed(self.backbone) if columns else None
        hidden, filled, last_token, stream = [], [], None, None
        is_latent = rows.input_ids == self.latent_token_id if columns else None  # (B, T)
        # one split instead of slices: the backward of each slice would fill a tensor of the whole size
        spans = embeds.split([end - begin for begin, end in bounds], dim=1) if columns else [embeds]
        for index, (span, (begin, end)) in enumerate(zip(spans, bounds, strict=True), start=-1):
            if begin > 0:  # the hidden state before this column becomes the embedding in it
                seen = Seen(column_of(hidden[-1], last_token), span[:, :1], stream, precomputed, self.backbone)
                span = self._with_thought(span, is_latent[:, begin], seen, index, edit)
            # (B,) column, or None for the last: padding may follow the tokens of the first span
            last_token = rows.before if begin == 0 else None
            wanted = self.thought.needs_layers and end < width
            with self.backbone.recording(lambda state, last=last_token: column_of(state, last), wanted) as states:
                hidden.append(self.backbone.span(span, *rows.part(begin, end), cache))
            stream = torch.stack(states) if wanted else None  # (layers + 1, B, 1, D)
            filled.append(span)
        return joined(hidden), joined(filled), cache

    def _with_thought(
        self, span: torch.Tensor, is_latent: torch.Tensor, seen: Seen, index: int, edit: Edit | None
    ) -> torch.Tensor:
        """Replaces the first embedding of a span (B, t, D) by the thought, in the rows where is_latent (B,)."""
        thought = self.thought(seen) if self.thought.sequential else seen.embedding  # (B, 1, D)
        if edit is not None:
            thought = edit(index, thought, seen)
        first = torch.where(is_latent[:, None, None], thought.to(span.dtype), span[:, :1])
        return torch.cat([first, span[:, 1:]], dim=1) if span.shape[1] > 1 else first

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, supervised: torch.Tensor | None) -> torch.Tensor:
        """Returns the mean cross-entropy of the supervised tokens; the LM head runs only where they are predicted."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # (B * T,), the target of each position
        if supervised is None:
            supervised = (targets != IGNORE).nonzero().flatten()
        return self.backbone.cross_entropy(hidden.flatten(0, 1)[supervised], targets[supervised])

    # --- Loading, saving, asking: implemented in trainer/inference.py ---

    @classmethod
    def from_pretrained(cls, source: str | Path, trust_remote_code: bool = False, **hub_options) -> Coconut:
        """Loads a checkpoint, a run's newest checkpoint or a hub id, on the CPU and in the dtype of its file.

        Sets `tokenizer`, `markers`, `config` and `stage`, which the methods below need. hub_options: of
        huggingface_hub.snapshot_download (revision, token, ...). Raises UserError.
        """
        from trainer import inference

        return inference.load(source, trust_remote_code, **hub_options)

    def save_pretrained(self, folder: str | Path, **hub_options) -> None:
        """Writes a new folder that `from_pretrained` reads; AutoModelForCausalLM reads it too, without thoughts.
        hub_options: push_to_hub=True, with repo_id and the options of `push_to_hub`."""
        from trainer import inference

        inference.save(self, folder, **hub_options)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Uploads the model. options: private, token, and those of huggingface_hub.upload_folder."""
        from trainer import inference

        return inference.push(self, repo_id, **options)

    def ask(self, question: str, **options) -> str:
        """Returns the model's output for a question. Options as in `answers`."""
        return self.answers([question], **options)[0]["output"]

    def answers(self, questions: list[str], **options) -> list[dict]:
        """Answers questions as one batch, greedily; returns {"output", "answer"} for each.

        options: max_new_tokens (128); n_thoughts, the number of latents (by default that of the model's stage); mode,
        of a model that has several; show_thoughts, which adds "thoughts": for each latent the five likeliest [token,
        probability] pairs at the position before it (paper, Section 5.2); sampling options of `generate`. Raises
        UserError.
        """
        from trainer import inference

        return inference.answers(self, questions, **options)
