"""Coconut: a causal language model that reasons in its hidden states (Hao et al. 2024, Section 3).

Legend: B rows, T columns of a batch, D hidden size, V vocabulary, N new tokens.

A sequence is processed in spans, through one key-value cache: the columns before the first latent in one pass; then,
one pass each, the spans that begin at a latent column, because the embedding there is made from the hidden state of
the column before. The span of the last latent reaches to the end of the sequence. Every token is processed once.

Nothing here waits for the device: where the latents and the labels are, and whether rows are padded on the left, comes
from the collator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from curriculum import IGNORE
from dataset import latent_columns as find_latent_columns
from model.backbone import StreamRecorder, decoder_blocks, decoder_of
from model.kv_cache import forked_cache, has_attention, make_cache
from model.padding import Shift, causal_mask, is_left_padded, masks_and_positions
from model.thought import Seen, Thought, make_thought
from utils import UserError

Edit = Callable[[int, torch.Tensor, "Seen"], torch.Tensor]  # (its number from 0, thought (B, 1, D), its origin)
NO_FILTERS = {"top_k": 0, "top_p": 1.0}  # Hugging Face's `generate` would take the likeliest 50


class CoconutOutput(NamedTuple):
    loss: torch.Tensor | None  # scalar
    inputs_embeds: torch.Tensor  # (B, T, D), with the thoughts filled in
    logits: torch.Tensor | None  # (B, T, V), only where no labels were given
    thoughts: torch.Tensor | None = None  # (B, K, D) of inputs_embeds, where they are asked for
    hidden: torch.Tensor | None = None  # (B, T, D) last hidden states, where they are asked for
    auxiliary: torch.Tensor | None = None  # scalar, of methods that add to the loss: a sum over the batch's units


class Coconut(nn.Module):
    """Wraps a Hugging Face causal LM, whose parameters keep their names under the prefix `base_causallm.`.

    Args:
        base_causallm: any decoder-only model that takes `inputs_embeds` and a key-value cache.
        latent_token_id: the token whose embedding is replaced by a thought; None for methods without latents.
        start_latent_id, end_latent_id: the markers around the latents, ordinary tokens to the model.
        eos_token_id: ends a generation.
        thought: what is fed back, as config.THOUGHTS spells it; its parameters are under the prefix `thought.`.
        latent_passes: None for latents one after the other; for latents in parallel (latent_block.py) the number of
            passes after the first, or "stage" for as many passes in all as there are groups of c_thought latents.
        c_thought: latents of a group.

    Raises UserError where there is no such thought, or not for this model.
    """

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        latent_token_id: int | None,
        start_latent_id: int | None,
        end_latent_id: int | None,
        eos_token_id: int,
        thought: str = "last",
        latent_passes: int | str | None = None,
        c_thought: int = 1,
    ):
        super().__init__()
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.thought = make_thought(thought, base_causallm)
        self._recorder = StreamRecorder(decoder_blocks(base_causallm)) if self.thought.needs_layers else None
        self.latent_passes, self.c_thought = latent_passes, c_thought
        if latent_passes is not None:
            if self.thought.needs_layers:
                raise UserError(f"thought {thought} needs the layers, which latents made in parallel do not give")
            forked_cache(base_causallm.config, kept=0)  # says where a family cannot
        accepted = inspect.signature(type(decoder_of(base_causallm)).forward).parameters
        # transformers renames the argument during 5.x
        self._cache_argument = "cache" if "cache" in accepted else "past_key_values"
        self._takes_position_ids = "position_ids" in accepted  # most models with ALiBi have none
        config = base_causallm.config.get_text_config(decoder=True)
        self._makes_masks = self._takes_position_ids and _attends_plainly(config)
        # called in the backward pass when nothing is left but the first span: what FSDP waits for
        self.before_first_span: Callable[[], None] | None = None
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)  # longest sequence
        self._logit_scale, self._softcap = _around_the_head(base_causallm.config)
        head = type(base_causallm.get_output_embeddings())
        self._head_is_a_matrix = getattr(head, "forward", None) is nn.Linear.forward
        _freeze_what_is_not_run(base_causallm)
        # what `check_family` finds: whether some parameters that want gradients get none, and whether generation has
        # to compute everything again for each token, because decoding over a cache would give something else
        self.leaves_parameters_out = False
        self.recomputes = False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        latent_columns: list[int] | None = None,
        supervised: torch.Tensor | None = None,
        left_padded: bool | None = None,
        edit: Edit | None = None,
        return_thoughts: bool = False,
        return_hidden: bool = False,
    ) -> CoconutOutput:
        """Runs the latent passes and the mean cross-entropy of the supervised tokens.

        Args:
            input_ids: (B, T) int64. Rows may hold different numbers of latents, in any columns but the first; rows
                whose first latents stand in one column, as `dataset.collate` puts them, share passes.
            attention_mask: (B, T), 0 at padding; default all ones.
            labels: (B, T) int64, IGNORE where nothing is supervised; labels[t] is predicted from position t - 1.
            position_ids: (B, T) int64; default counts the attended tokens from 0.
            latent_columns, supervised: where the latents and the labels are, as `dataset.collate_for_device` gives
                them; without them the model has to wait for the device to know.
            left_padded: whether rows are padded on the left; said either way, it promises that padding is at the ends
                of rows only, and spares the first span, which is most of a sequence, an attention mask.
            edit: called at each column with latents, with the thought's number from 0, the thought (B, 1, D), and what
                it was made of; what it returns is fed in the thought's place. Where a thought does not wait (`pause`),
                it is the latent token's embedding, and the latents are then gone through one by one all the same.
            return_thoughts: whether the output holds the embeddings of the latent columns.
            return_hidden: whether it holds the last hidden states.

        Gradients flow through the thoughts and the cache: the whole chain is trained. The LM head runs on the
        supervised positions only; without labels it runs on all, and the logits are returned instead of a loss.
        """
        attention_mask, position_ids = masks_and_positions(input_ids, attention_mask, position_ids)
        if return_thoughts and latent_columns is None:
            latent_columns = find_latent_columns(input_ids, self.latent_token_id)
        hidden, embeds, _, _ = self._run(
            input_ids, attention_mask, position_ids, left_padded, latent_columns, edit=edit
        )
        thoughts = embeds[:, latent_columns] if return_thoughts else None
        states = hidden if return_hidden else None
        if labels is None:
            return CoconutOutput(None, embeds, self.head(hidden), thoughts, states)
        loss = self._loss(hidden, labels, supervised)
        for parameter in self.thought.parameters():
            loss = loss + 0 * parameter.sum()  # a batch without latents must not leave it without a gradient: DDP waits
        return CoconutOutput(loss, embeds, None, thoughts, states)

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
        """Greedy decoding of a batch of prompts, padded on the left; returns the new tokens only.

        Args:
            input_ids, attention_mask, position_ids: (B, T) as in `forward`.
            max_new_tokens: N at most; decoding stops earlier once every row has said EOS.
            edit: of the thoughts, as in `forward`.
            return_thoughts: whether to return (tokens, thoughts), the latter (B, K, D).
            generation_options: for anything but greedy decoding, options of Hugging Face's `generate` (do_sample,
                temperature, num_beams, ...), which then continues from the embeddings with the thoughts filled in. The
                model's own generation_config does not count, nor do Hugging Face's defaults: without a top_k there is
                none.

        Returns: (B, N) int64; each row ends with EOS, where it came to say it, and is filled up with EOS.
        """
        attention_mask, position_ids = masks_and_positions(input_ids, attention_mask, position_ids)
        left_padded = is_left_padded(attention_mask)
        if generation_options:
            _, embeds, _, _ = self._run(input_ids, attention_mask, position_ids, left_padded, edit=edit)
            plain = {"eos_token_id": self.eos_token_id, "pad_token_id": self.eos_token_id, **NO_FILTERS}
            with _own_distribution(self.base_causallm):
                tokens = self.base_causallm.generate(
                    inputs_embeds=embeds,
                    attention_mask=attention_mask,
                    max_new_tokens=max_new_tokens,
                    **{**plain, **generation_options},
                )
        elif self.recomputes:
            embeds = self._embed(input_ids)
            tokens = self._generate_anew(input_ids, attention_mask, max_new_tokens)
        else:
            hidden, embeds, cache, attention_mask = self._run(
                input_ids, attention_mask, position_ids, left_padded, new_columns=max_new_tokens, edit=edit
            )
            masked = left_padded is not False
            tokens = self._decode(hidden[:, -1:], cache, attention_mask, position_ids[:, -1:], masked, max_new_tokens)
        if not return_thoughts:
            return tokens
        return tokens, embeds[:, find_latent_columns(input_ids, self.latent_token_id)]

    def _decode(
        self,
        hidden: torch.Tensor,
        cache: Cache,
        attention_mask: torch.Tensor,
        position: torch.Tensor,
        masked: bool,
        max_new_tokens: int,
    ) -> torch.Tensor:
        """Greedy decoding over the cache, from the hidden state (B, 1, D) at the position (B, 1) of the last column."""
        finished = torch.zeros_like(position, dtype=torch.bool)  # (B, 1)
        tokens = []
        for _ in range(max_new_tokens):
            token = self.head(hidden).argmax(-1).masked_fill(finished, self.eos_token_id)  # (B, 1)
            tokens.append(token)
            finished = finished | (token == self.eos_token_id)
            if len(tokens) == max_new_tokens or finished.all():
                break
            position = position + 1
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
            hidden = self.span(self._embed(token), attention_mask, position, masked, cache)
        return torch.cat(tokens, dim=1) if tokens else position[:, :0]

    def _generate_anew(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int
    ) -> torch.Tensor:
        """`generate` for prompts without latents, without a cache, and with the padding on the right, where it changes
        nothing."""
        ids, lengths = Shift(attention_mask)(input_ids), attention_mask.sum(dim=1, keepdim=True)  # (B, T), (B, 1)
        ids = F.pad(ids, (0, max_new_tokens), value=self.eos_token_id)
        columns = torch.arange(ids.shape[1], device=ids.device)
        finished = torch.zeros_like(lengths, dtype=torch.bool)  # (B, 1)
        tokens = []
        while len(tokens) < max_new_tokens and not finished.all():
            mask = (columns < lengths).long()
            hidden = self._run(ids, mask, columns.expand_as(ids), left_padded=False, columns=[])[0]  # (B, T + N, D)
            last = hidden.gather(1, (lengths - 1)[..., None].expand(-1, 1, hidden.shape[-1]))  # (B, 1, D)
            token = self.head(last).argmax(-1).masked_fill(finished, self.eos_token_id)  # (B, 1)
            tokens.append(token)
            ids = ids.scatter(1, lengths, token)
            lengths, finished = lengths + 1, finished | (token == self.eos_token_id)
        return torch.cat(tokens, dim=1) if tokens else input_ids[:, :0]

    @torch.no_grad()
    def states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        edit: Edit | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states and input embeddings with the thoughts filled in, (B, T, D) each, for rows as in
        `generate`; `head` makes logits of the former. `edit` as in `forward`."""
        attention_mask, position_ids = masks_and_positions(input_ids, attention_mask, position_ids)
        left_padded = is_left_padded(attention_mask)
        return self._run(input_ids, attention_mask, position_ids, left_padded, edit=edit)[:2]

    @torch.no_grad()
    def thought_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        edit: Edit | None = None,
        return_thoughts: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What the LM head makes of the positions before the latents, those that thoughts are made from: for rows as in
        `generate`, whose K latents stand in the same columns, (B, K, V); with return_thoughts (logits, thoughts), the
        latter (B, K, D). `edit` as in `forward`."""
        columns = find_latent_columns(input_ids, self.latent_token_id)
        hidden, embeds = self.states(input_ids, attention_mask, position_ids, edit)
        logits = self.head(hidden[:, [column - 1 for column in columns]])
        return (logits, embeds[:, columns]) if return_thoughts else logits

    def _run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        left_padded: bool | None,
        columns: list[int] | None = None,
        new_columns: int = 0,
        edit: Edit | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Cache | None, torch.Tensor]:
        """All spans of a batch: last hidden states (B, T, D), filled input embeddings (B, T, D), the cache, where there
        are latents or new columns are to follow, and the attention mask of its columns, (B, T)."""
        embeds = self._embed(input_ids)  # (B, T, D)
        is_latent = input_ids == self.latent_token_id if self.latent_token_id is not None else None  # (B, T)
        if columns is None:
            columns = find_latent_columns(input_ids, self.latent_token_id)
        if not self.thought.sequential and edit is None:
            columns = []
        if columns and columns[0] == 0:
            raise ValueError("a latent token has no position before it: a sequence must begin with another token")
        if columns and self.latent_passes is not None:
            if edit is not None:
                raise ValueError("thoughts that are made in parallel cannot be edited one by one")
            from methods.parallel_latents import run_block

            masked = left_padded is not False
            return run_block(self, input_ids, attention_mask, position_ids, masked, columns, new_columns)
        keeps = bool(columns) or new_columns > 0
        width = input_ids.shape[1] + new_columns
        cache = None if self.recomputes else make_cache(self.base_causallm.config, width, keeps)
        bounds = [0, *columns, input_ids.shape[1]]
        prepared = self._precompute() if columns else None
        shift = None
        if left_padded and self._makes_masks:
            shift = Shift(attention_mask[:, : bounds[1]])
            attention_mask = torch.cat([shift(attention_mask[:, : bounds[1]]), attention_mask[:, bounds[1] :]], dim=1)
        hidden_spans, embed_spans, stream = [], [], None
        # one split, not a slice for each span: the backward of a slice fills a tensor of the size of the whole
        widths = [end - begin for begin, end in pairwise(bounds)]
        spans = embeds.split(widths, dim=1) if columns else [embeds]
        for number, (span, (begin, end)) in enumerate(zip(spans, pairwise(bounds), strict=True), start=-1):
            if begin > 0:
                seen = Seen(hidden_spans[-1][:, -1:], span[:, :1], stream, prepared, self)
                span = self._with_thought(span, is_latent[:, begin], seen, number, edit)
            embed_spans.append(span)
            records = self._recorder is not None and end < input_ids.shape[1]
            moved = shift if begin == 0 else None
            positions, masked = position_ids[:, begin:end], left_padded is not False and moved is None
            if moved is not None:
                span, positions = moved(span), moved(positions)
            with self._recorder.recording(moved and moved.last) if records else nullcontext() as states:
                hidden = self.span(span, attention_mask[:, :end], positions, masked, cache)
            if moved is not None:
                hidden = moved.back(hidden)
            stream = torch.stack(states) if records else None  # (layers + 1, B, 1, D)
            if begin == 0 and hidden.requires_grad and self.before_first_span is not None:
                hidden.register_hook(lambda _, tell=self.before_first_span: tell())
            hidden_spans.append(hidden)
        if not columns:
            return hidden_spans[0], embeds, cache, attention_mask
        return torch.cat(hidden_spans, dim=1), torch.cat(embed_spans, dim=1), cache, attention_mask

    def _with_thought(
        self, span: torch.Tensor, is_latent: torch.Tensor, seen: Seen, number: int, edit: Edit | None
    ) -> torch.Tensor:
        """Embeddings (B, t, D) of a span with the thought at its first column, in the rows (B,) that have a latent
        there; the others keep the embedding of their token."""
        thought = self.thought(seen) if self.thought.sequential else seen.embedding  # (B, 1, D)
        if edit is not None:
            thought = edit(number, thought, seen)
        first = torch.where(is_latent[:, None, None], thought.to(span.dtype), span[:, :1])
        return torch.cat([first, span[:, 1:]], dim=1) if span.shape[1] > 1 else first

    def latent_updates(self, n_columns: int) -> int:
        """How often the inputs of a block of so many columns are made anew: the passes over it less one. Where each is
        made from the column before, those of K columns are right after K times, and stay what they are."""
        if self.latent_passes == "stage":
            return max(n_columns // self.c_thought - 1, 0)
        return self.latent_passes if self.thought.in_place else min(self.latent_passes, n_columns)

    def still_updated(self, is_latent: torch.Tensor, number: int) -> torch.Tensor:
        """(B, 1): whether a row of (B, K) latents takes part in this update, counted from 1. With "stage" a row has as
        many passes as it has groups of latents, whatever others have."""
        if self.latent_passes != "stage":
            return torch.ones_like(is_latent[:, :1])
        return number < is_latent.sum(dim=1, keepdim=True) // self.c_thought

    def span(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        masked: bool,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Last hidden states (B, t, D) of t new columns after those in the cache, which then holds them too.

        attention_mask is (B, columns so far with these), position_ids (B, t); unless `masked`, no token of these
        columns has padding before it. The decoder's output is taken after its final norm, as in the reference.
        """
        arguments = {"use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_argument] = cache
        if self._takes_position_ids:
            arguments["position_ids"] = position_ids
        mask = attention_mask if self._has_attention else attention_mask[:, -embeds.shape[1] :]
        if self._makes_masks:
            mask = causal_mask(attention_mask, embeds.shape[1], masked)
        return decoder_of(self.base_causallm)(inputs_embeds=embeds, attention_mask=mask, **arguments).last_hidden_state

    @cached_property
    def _has_attention(self) -> bool:
        return has_attention(self.base_causallm.config)

    @torch.no_grad()
    def _precompute(self) -> Any:
        if type(self.thought).precompute is Thought.precompute:
            return None
        base = self.base_causallm
        return self.thought.precompute(_input_embeddings(base), base.get_output_embeddings().weight)

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.base_causallm.get_input_embeddings()(input_ids)

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, supervised: torch.Tensor | None) -> torch.Tensor:
        """Mean cross-entropy over the supervised tokens; the LM head sees only the positions that predict them."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # (B * T,): what each position predicts
        if supervised is None:
            supervised = (targets != IGNORE).nonzero().flatten()
        hidden, targets = hidden.flatten(0, 1)[supervised], targets[supervised]  # (S, D), (S,)
        if hasattr(F, "linear_cross_entropy") and self._softcap is None and self._head_is_a_matrix:
            head = self.base_causallm.get_output_embeddings()
            return F.linear_cross_entropy(self._scaled(hidden), head.weight, targets, linear_bias=head.bias)
        return F.cross_entropy(self.head(hidden), targets)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V), as the model's own forward makes them."""
        logits = self.base_causallm.get_output_embeddings()(self._scaled(hidden))
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self._logit_scale == 1 else hidden * self._logit_scale


@contextmanager
def _own_distribution(base: PreTrainedModel) -> Iterator[None]:
    """Lets Hugging Face's `generate` use nothing of the generation_config that a model brings along."""
    brought, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = brought


def _attends_plainly(config: PreTrainedConfig) -> bool:
    """Whether every layer is causal attention over all columns, computed by torch's scaled_dot_product_attention."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    has_alibi = getattr(config, "alibi", False)  # Falcon adds it to a mask of its own
    return config._attn_implementation == "sdpa" and layers == {"full_attention"} and window is None and not has_alibi


def _around_the_head(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, cap): what a family does around the LM head: cap tanh(scale U h / cap), without a cap scale U h.

    It is read from the configuration, because on the meta device there are no numbers; `check_family` compares.
    """
    text = config.get_text_config(decoder=True)

    def value(name: str) -> float | None:
        return getattr(config, name, None) or getattr(text, name, None)

    scale = value("logit_scale") or value("lm_head_multiplier") or 1  # Cohere, Falcon-H1
    scaling = value("logits_scaling") or 1  # by which Granite divides
    scale = scale * scaling if text.model_type == "hyperclovax" else scale / scaling
    if value("logits_mup_width_multiplier"):  # Inkling
        scale /= value("logits_mup_width_multiplier")
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return scale, next((value(name) for name in caps if value(name)), None)


def _freeze_what_is_not_run(base: PreTrainedModel) -> None:
    """Takes towers for images and sound out of training: DDP waits for the gradient of every parameter that wants one,
    and here only the language model runs."""
    run = (decoder_of(base), base.get_input_embeddings(), base.get_output_embeddings())
    reached = {parameter for module in run if module is not None for parameter in module.parameters()}
    for parameter in base.parameters():
        if parameter not in reached:
            parameter.requires_grad_(False)


def _input_embeddings(base: PreTrainedModel) -> torch.Tensor:
    """(V, D), as the model gets them: some embedding modules scale their weights."""
    module = base.get_input_embeddings()
    if type(module).forward is nn.Embedding.forward:
        return module.weight
    return module(torch.arange(len(module.weight), device=module.weight.device))
