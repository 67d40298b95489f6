"""A Hugging Face causal LM behind the interface that Coconut calls: decoder, embeddings, LM head, blocks, recorder.

Legend: B rows, T columns of a batch, t columns of a pass, D hidden size, V vocabulary, S supervised tokens, L decoder
blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from model.kv_cache import has_attention, make_cache
from model.layout import causal_mask, column_of, take
from utils import UserError

Pick = Callable[[torch.Tensor], torch.Tensor]  # (B, t, D) states of a pass -> (B, 1, D)


class Vocabulary:
    """Input embeddings of tokens, and logits of hidden states, as in the model's own forward."""

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self._scale, self._cap = _around_the_head(base.config)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, D) input embeddings."""
        return self.base.get_input_embeddings()(input_ids)

    def input_embeddings(self) -> torch.Tensor:
        """Returns the (V, D) input embeddings that the model receives: some embedding modules scale their weights."""
        module = self.base.get_input_embeddings()
        if type(module).forward is nn.Embedding.forward:
            return module.weight
        return module(torch.arange(len(module.weight), device=module.weight.device))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) hidden states -> (..., V) logits."""
        logits = self.base.get_output_embeddings()(self._scaled(hidden))
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self._scale == 1 else hidden * self._scale


class Recorder:
    """Records the residual stream of a pass: the input of the first block and the output of each block.

    transformers' output_hidden_states keeps all columns of all layers, and applies the final norm to the last state.
    Raises UserError if the model does not name its blocks.
    """

    def __init__(self, base: PreTrainedModel):
        blocks = decoder_blocks(base)
        if not blocks:
            raise UserError("a thought or loss that uses the layers needs a model that names its decoder blocks")
        self._pick: Pick | None = None  # set during `recording`
        self._states: list[torch.Tensor] = []
        decoder_of(base).register_forward_pre_hook(lambda *_: self._states.clear() if self._pick else None)
        for block in blocks:
            block.register_forward_hook(self._record, with_kwargs=True)

    @contextmanager
    def recording(self, pick: Pick) -> Iterator[list[torch.Tensor]]:
        """Yields a list that holds the L + 1 states of the last pass inside, before the final norm, each reduced by
        `pick`. A nested recording replaces the outer one until it ends."""
        outer = self._pick, self._states
        self._pick, self._states = pick, []
        try:
            yield self._states
        finally:
            self._pick, self._states = outer

    @torch.compiler.disable  # otherwise compiled anew for each length of the list
    def _record(self, _, args: tuple, kwargs: dict, output) -> None:
        if self._pick is None:
            return
        if not self._states:
            self._states.append(self._pick(args[0] if args else kwargs["hidden_states"]))
        self._states.append(self._pick(output[0] if isinstance(output, tuple) else output))


class Backbone(Vocabulary):
    """The interface of the wrapped model. It is no Module, so that parameters keep the names that Coconut gives
    them."""

    def __init__(self, base: PreTrainedModel):
        super().__init__(base)
        self.decoder, self.blocks = decoder_of(base), decoder_blocks(base)
        self.recorder: Recorder | None = None
        for module in self.decoder.modules():
            if isinstance(module, NewGELUActivation):  # same function in one kernel instead of eight
                module.forward = partial(F.gelu, approximate="tanh")
        config = base.config.get_text_config(decoder=True)
        accepted = inspect.signature(type(self.decoder).forward).parameters
        # transformers renames the argument during 5.x
        self._cache_argument = "cache" if "cache" in accepted else "past_key_values"
        self.takes_position_ids = "position_ids" in accepted  # most models with ALiBi have none
        # whether attention depends on positions and masks only. Padding may then follow the question, hidden by
        # causality. Windows and recurrent states count columns: padding must come first
        self.makes_masks = self.takes_position_ids and _attends_plainly(config)
        self.max_positions = _max_positions(config)
        self._head_is_a_matrix = getattr(type(base.get_output_embeddings()), "forward", None) is nn.Linear.forward
        # set by trainer/check_family.py: whether some trainable parameters get no gradient, and whether generation must
        # recompute everything for each token, because decoding with a cache gives other results
        self.leaves_parameters_out = False
        self.recomputes = False

    @cached_property
    def _attends(self) -> bool:
        return has_attention(self.base.config)  # fails for some families: check_family.py catches it

    def cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Returns the cross-entropy, in nats, of the tokens (S,) predicted from the hidden states (S, D)."""
        if self._cap is None and self._head_is_a_matrix:
            head = self.base.get_output_embeddings()
            hidden, options = self._scaled(hidden), {"linear_bias": head.bias, "reduction": reduction}
            return F.linear_cross_entropy(hidden, head.weight, targets, **options)
        return F.cross_entropy(self.head(hidden), targets, reduction=reduction)

    def make_cache(self, capacity: int, keeps: bool) -> Cache | None:
        """Returns a cache for up to `capacity` columns, or None if the passes need none. keeps: whether a later pass
        reads it."""
        return None if self.recomputes else make_cache(self.base.config, capacity, keeps)

    def span(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        masked: bool,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Runs t new columns after those in the cache, adds them to the cache, and returns their last hidden states (B,
        t, D).

        attention_mask is (B, cached and new columns), position_ids (B, t). masked=False: no token of these columns has
        padding before it. The hidden states are taken after the decoder's final norm, as in the reference.
        """
        arguments = {"use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_argument] = cache
        if self.takes_position_ids:
            arguments["position_ids"] = position_ids
        mask = attention_mask if self._attends else attention_mask[:, -embeds.shape[1] :]
        if self.makes_masks:
            mask = causal_mask(attention_mask, embeds.shape[1], masked)
        return self.decoder(inputs_embeds=embeds, attention_mask=mask, **arguments).last_hidden_state

    @contextmanager
    def own_generation_config(self) -> Iterator[None]:
        """Hides the model's own generation_config from Hugging Face's `generate`."""
        brought, self.base.generation_config = self.base.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self.base.generation_config = brought

    def check_takes_embeds(self) -> None:
        """Raises UserError if Hugging Face's `generate` does not take embeddings from this family."""
        if "inputs_embeds" not in inspect.signature(self.base.prepare_inputs_for_generation).parameters:
            raise UserError(
                f"transformers' generate takes no thoughts for a {self.base.config.model_type}: decode greedily, or "
                "sample with --samples or val_samples"
            )

    def generate_uncached(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, eos_token_id: int
    ) -> torch.Tensor:
        """Decodes greedily without a cache, recomputing everything for each token. Returns (B, N) int64 new tokens,
        filled up with EOS. The prompts (B, T) may have padding anywhere."""
        lengths = attention_mask.sum(dim=1, keepdim=True)  # (B, 1)
        # move padding to the right, where causality hides it
        ids = take(input_ids, attention_mask.argsort(dim=1, descending=True, stable=True))
        ids = F.pad(ids, (0, max_new_tokens), value=eos_token_id)
        columns = torch.arange(ids.shape[1], device=ids.device)
        finished = torch.zeros_like(lengths, dtype=torch.bool)  # (B, 1)
        tokens = []
        while len(tokens) < max_new_tokens and not finished.all():
            mask, positions = (columns < lengths).long(), columns.expand_as(ids)
            hidden = self.span(self.embed(ids), mask, positions, masked=False, cache=None)  # (B, T + N, D)
            token = self.head(column_of(hidden, lengths[:, 0] - 1)).argmax(-1).masked_fill(finished, eos_token_id)
            tokens.append(token)
            ids = ids.scatter(1, lengths, token)
            lengths, finished = lengths + 1, finished | (token == eos_token_id)
        return torch.cat(tokens, dim=1) if tokens else input_ids[:, :0]

    def record_layers(self) -> None:
        """Adds the hooks for `recording`. Call it before the blocks are compiled or sharded. Raises UserError."""
        self.recorder = self.recorder or Recorder(self.base)

    def recording(self, pick: Pick, on: bool = True) -> AbstractContextManager[list[torch.Tensor]]:
        """See Recorder.recording; records nothing unless `on`."""
        return self.recorder.recording(pick) if on else nullcontext([])


# --- Families ---


def decoder_of(base: PreTrainedModel) -> PreTrainedModel:
    """Returns the module that turns input embeddings into hidden states.

    transformers' get_decoder guesses by names: it returns the LM head of the ModernBERT decoder, and all of a Llama 4.
    """
    decoder = base.get_decoder()
    if decoder is base or not isinstance(decoder, PreTrainedModel):
        inner = [module for module in base.children() if isinstance(module, PreTrainedModel)]
        return inner[0] if len(inner) == 1 else decoder
    return decoder


def decoder_blocks(base: PreTrainedModel) -> list[nn.Module]:
    """Returns the L decoder blocks: those that the model names, or else those that transformers can checkpoint. The
    list may be empty."""
    modules = list(decoder_of(base).modules())
    named = [module for module in modules if type(module).__name__ in (base._no_split_modules or ())]
    blocks = named or [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inner]


def freeze_unused(base: PreTrainedModel) -> None:
    """Freezes towers for images and sound, since only the language model runs and DDP waits for a gradient of every
    trainable parameter."""
    run = (decoder_of(base), base.get_input_embeddings(), base.get_output_embeddings())
    reached = {parameter for module in run if module is not None for parameter in module.parameters()}
    for parameter in base.parameters():
        if parameter not in reached:
            parameter.requires_grad_(False)


def _max_positions(config: PreTrainedConfig) -> int | None:
    """Returns the longest sequence, in tokens, whatever the family calls it; None if it declares none."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
    names += ("max_target_positions", "context_length")
    attention = getattr(config, "attn_config", None) or {}  # MPT and similar families
    inner = attention if isinstance(attention, dict) else vars(attention)
    values = [*(getattr(config, name, None) for name in names), *map(inner.get, names)]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _attends_plainly(config: PreTrainedConfig) -> bool:
    """Whether every layer is causal attention over all columns, computed by torch's scaled_dot_product_attention."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    has_alibi = getattr(config, "alibi", False)  # Falcon adds it to its own mask
    return config._attn_implementation == "sdpa" and layers == {"full_attention"} and window is None and not has_alibi


def _around_the_head(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Returns (scale, cap) of the family's LM head: cap tanh(scale U h / cap), or scale U h without a cap.

    They come from the configuration, because the meta device has no numbers; check_family.py compares the logits.
    """
    text = config.get_text_config(decoder=True)

    def value(name: str) -> float | None:
        return getattr(config, name, None) or getattr(text, name, None)

    scale = value("logit_scale") or value("lm_head_multiplier") or 1  # Cohere, Falcon-H1
    scaling = value("logits_scaling") or 1  # Granite divides by it
    scale = scale * scaling if text.model_type == "hyperclovax" else scale / scaling
    if value("logits_mup_width_multiplier"):  # Inkling
        scale /= value("logits_mup_width_multiplier")
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return scale, next((value(name) for name in caps if value(name)), None)
