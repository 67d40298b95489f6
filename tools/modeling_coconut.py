"""A model that was trained to reason in its hidden states (Coconut, arXiv 2412.06769).

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    questions = tokenizer(["a question", "another one"], padding=True, return_tensors="pt")
    rows = model.generate(**questions)  # each question, followed by the model's output
    tokenizer.batch_decode(rows[:, questions["input_ids"].shape[1] :], skip_special_tokens=True)

`generate` appends to each question what training appended: a newline, the markers and the latent positions. The
embedding at a latent position is a thought, made from the hidden state of the position before it, one after the other
over a key-value cache; then Hugging Face's own `generate` continues, with all of its options.

`forward` is that of the language model on tokens, with thoughts at latent tokens. It appends nothing: `prompts` does.
Thoughts carry no gradient: this file is for inference.

In the trainer's repository this is tools/modeling_coconut.py. An exported folder holds it with thought.py, which has
the names imported from `model` here: the folder needs torch and transformers only.

Legend: B rows, T columns, D hidden size, V vocabulary, K latents.
"""

import inspect
from contextlib import nullcontext
from functools import cached_property
from typing import ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from model.backbone import Recorder, Vocabulary, decoder_of
from model.thought import REGISTRY, Seen, Thought

logger = logging.get_logger(__name__)


class CoconutConfig(PreTrainedConfig):
    """
    Args:
        text_config: the configuration of the language model, or its dictionary.
        thought, thought_number: the name of the thought's class in thought.py, and the number in its spelling.
        latent_passes: None for thoughts one after the other; for thoughts in parallel, the number of their updates.
        stop_threshold: None for a model without a head that stops its thoughts; else a row makes no further thought
            once the head gives it more than this probability.
        latent_token_id: the token whose embedding a thought replaces; None for a model without thoughts.
        newline: the tokens of the newline that ends a question.
        endings: for each token that the tokenizer joins with a newline, the tokens of both together.
        appended: the tokens after the newline: markers and latents.
    """

    model_type = "coconut"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        thought="last",
        thought_number=None,
        latent_passes=None,
        stop_threshold=None,
        latent_token_id=None,
        newline=(),
        endings=None,
        appended=(),
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.thought = thought
        self.thought_number = thought_number
        self.latent_passes = latent_passes
        self.stop_threshold = stop_threshold
        self.latent_token_id = latent_token_id
        self.newline = list(newline)
        self.endings = {str(token): list(tokens) for token, tokens in (endings or {}).items()}
        self.appended = list(appended)
        super().__init__(**kwargs)

    @property
    def max_position_embeddings(self):
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self):
        return self.text_config.vocab_size


class CoconutForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CoconutConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.base_causallm = AutoModelForCausalLM.from_config(config.text_config)
        self.thought = REGISTRY[config.thought](self.base_causallm, config.thought_number)
        if config.stop_threshold is not None:
            self.stop_head = torch.nn.Linear(self.get_input_embeddings().weight.shape[1], 1)
        self.post_init()

    def get_input_embeddings(self):
        return self.base_causallm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base_causallm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base_causallm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.base_causallm.set_output_embeddings(value)

    def get_decoder(self):
        return decoder_of(self.base_causallm)

    @property
    def _latent(self):
        return -1 if self.config.latent_token_id is None else self.config.latent_token_id

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **options):
        """As of the language model: (B, T) tokens or (B, T, D) embeddings to logits, (B, T, V), and with `labels` a
        loss. Without a cache, latent tokens get their thoughts."""
        if options.get("past_key_values", options.get("cache")) is None:
            if input_ids is not None and (input_ids == self._latent).any():
                inputs_embeds, input_ids = self.embed(input_ids, attention_mask), None
            if attention_mask is not None and "position_ids" in _accepted(self.base_causallm):
                options.setdefault("position_ids", _positions(attention_mask))
        return self.base_causallm(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options
        )

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **options):
        """Hugging Face's `generate` after the thoughts: (B, T) questions to (B, T + N) with N new tokens at most.

        Args:
            inputs, or input_ids: (B, T) int64, padded on the left, as the tokenizer gives them.
            attention_mask: (B, T), 0 at padding; default as in `prompts`.
            generation_config, and all else: options of `generate`. Lengths count the questions as they are given,
                without what is appended; generation stops at the model's longest sequence. Sampling is from all tokens
                unless top_k is given: Hugging Face's own default are the likeliest 50.

        Raises ValueError without questions, and for a question as long as the model's longest sequence.
        """
        questions = options.pop("input_ids", inputs)
        if questions is None:
            raise ValueError("generate takes questions, as input_ids")
        questions = questions.to(self.device)
        options.pop("token_type_ids", None)
        input_ids, attention_mask = self.prompts(questions, options.pop("attention_mask", None))
        settings = generation_config or self.generation_config
        length = options.pop("max_length", settings.max_length if settings.max_new_tokens is None else None)
        if length is not None:
            options.setdefault("max_new_tokens", length - questions.shape[1])
        if (length := options.pop("min_length", settings.min_length)) is not None:
            options.setdefault("min_new_tokens", max(length - questions.shape[1], 0))
        limit, length = self.config.max_position_embeddings, input_ids.shape[1]
        if limit is not None:
            if length >= limit:
                raise ValueError(f"a question of {length} tokens fills all {limit} positions")
            wanted = options.get("max_new_tokens", settings.max_new_tokens)
            options["max_new_tokens"] = limit - length if wanted is None else min(wanted, limit - length)
        if options.get("do_sample", settings.do_sample) and settings.top_k is None:
            options.setdefault("top_k", 0)
        embeds, attention_mask = self._think(input_ids, attention_mask)
        self.base_causallm.generation_config = self.generation_config
        return self.base_causallm.generate(
            inputs=questions,  # what is returned, and what stopping rules and penalties see
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            **options,
        )

    def prompts(self, questions, attention_mask=None):
        """(B, T) questions to the sequences that answers follow, padded on the left, and their attention mask.

        Without an attention_mask, padding tokens at a question's ends are padding as far as others have none there.
        """
        if attention_mask is None:
            attention_mask = self._guessed_mask(questions)
        rows = []
        for row, mask in zip(questions.tolist(), attention_mask.tolist(), strict=True):
            row = [token for token, attended in zip(row, mask, strict=True) if attended]
            joined = self.config.endings.get(str(row[-1])) if row else None
            row = [*row, *self.config.newline] if joined is None else [*row[:-1], *joined]
            rows.append(row + self.config.appended)
        width = max(map(len, rows))
        ids = [[0] * (width - len(row)) + row for row in rows]
        masks = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return tuple(torch.tensor(values, device=questions.device) for values in (ids, masks))

    def _guessed_mask(self, questions):
        pad = self.generation_config.pad_token_id
        is_pad = (questions == (-1 if pad is None else pad)).long()  # (B, T)
        left, right = (ids.cumprod(dim=1).sum(dim=1, keepdim=True) for ids in (is_pad, is_pad.flip(1)))  # (B, 1)
        left, right = left - left.min(), right - right.min()  # a tokenizer may begin or end each text with this token
        if (left + right).any():
            logger.warning_once("generate got padded questions without attention_mask, and takes their ends as padding")
        columns = torch.arange(questions.shape[1], device=questions.device)
        return ((columns >= left) & (columns < questions.shape[1] - right)).long()

    def _think(self, input_ids, attention_mask):
        """`embed` of prompts, padded on the left, and their attention mask; a model with a head that stops its thoughts
        leaves out the latents of a row from where it stops on."""
        if self.config.stop_threshold is None:
            return self.embed(input_ids, attention_mask), attention_mask
        left_out = torch.zeros_like(input_ids, dtype=torch.bool)  # (B, T)
        embeds = self.embed(input_ids, attention_mask, left_out)
        mask = attention_mask * ~left_out
        order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(dim=1).max()) :]  # padding, then the rest
        return embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])), mask.gather(1, order)

    @torch.no_grad()
    def embed(self, input_ids, attention_mask=None, left_out=None):
        """Input embeddings, (B, T, D), of (B, T) ids, with a thought at each latent token, made from the hidden state
        of the column before it, over a cache: each column is computed once.

        left_out: (B, T) bool, false; becomes true at the latents of a row from where the head stops it on.
        """
        embeds = self.get_input_embeddings()(input_ids)
        is_latent = input_ids == self._latent  # (B, T)
        columns = is_latent.any(dim=0).nonzero().flatten().tolist()
        if not self.thought.sequential or not columns:
            return embeds
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        decoder, positions = self.get_decoder(), _positions(attention_mask)
        if self.config.latent_passes is not None:
            return self._embed_in_parallel(embeds, is_latent, columns, attention_mask, positions)
        accepted, vocabulary, prepared = _accepted(decoder), Vocabulary(self.base_causallm), self._precompute()
        cache = DynamicCache(config=self.config.text_config)
        options = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}
        begin = 0
        for column in columns:
            if "position_ids" in accepted:
                options["position_ids"] = positions[:, begin:column]
            recording = self._recorder.recording(lambda state: state[:, -1:]) if self.thought.needs_layers else None
            with recording or nullcontext() as states:
                hidden = decoder(
                    inputs_embeds=embeds[:, begin:column], attention_mask=attention_mask[:, :column], **options
                ).last_hidden_state[:, -1:]  # (B, 1, D)
            if left_out is not None:
                stops = self.stop_head(hidden)[..., 0].float().sigmoid() > self.config.stop_threshold  # (B, 1)
                left_out[:, column:] |= stops & is_latent[:, column:]
                if (left_out | ~is_latent)[:, column:].all():
                    break
            stream = torch.stack(states) if states else None
            thought = self.thought(
                Seen(hidden, embeds[:, column : column + 1], stream, prepared, vocabulary)
            )  # (B, 1, D)
            # rows with an ordinary token in this column keep its embedding
            fed = torch.where(is_latent[:, column, None], thought[:, 0].to(embeds.dtype), embeds[:, column])
            embeds[:, column] = fed
            begin = column
        return embeds

    def _embed_in_parallel(self, embeds, is_latent, columns, attention_mask, positions):
        """`embed` with all thoughts of a pass made from the hidden states of the pass before."""
        decoder, end = self.get_decoder(), columns[-1] + 1
        vocabulary, prepared = Vocabulary(self.base_causallm), self._precompute()
        learned, before = embeds[:, columns], [column - 1 for column in columns]  # (B, K, D)
        options = {"position_ids": positions[:, :end]} if "position_ids" in _accepted(decoder) else {}
        for _ in range(self.config.latent_passes):
            hidden = decoder(
                inputs_embeds=embeds[:, :end], attention_mask=attention_mask[:, :end], use_cache=False, **options
            ).last_hidden_state
            hidden = hidden[:, columns if self.thought.in_place else before]
            thoughts = self.thought(Seen(hidden, learned, None, prepared, vocabulary)).to(embeds.dtype)  # (B, K, D)
            embeds[:, columns] = torch.where(is_latent[:, columns, None], thoughts, learned)
        return embeds

    def _precompute(self):
        if type(self.thought).precompute is Thought.precompute:
            return None
        inputs = Vocabulary(self.base_causallm).input_embeddings()  # (V, D)
        return self.thought.precompute(inputs, self.get_output_embeddings().weight)

    @cached_property
    def _recorder(self):
        return Recorder(self.base_causallm)


def _accepted(module):
    """The arguments of its forward."""
    return inspect.signature(type(module).forward).parameters


def _positions(attention_mask):
    """(B, T): the attended columns, counted from 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


# save_pretrained then writes auto_map into config.json and copies the code
CoconutConfig.register_for_auto_class()
CoconutForCausalLM.register_for_auto_class("AutoModelForCausalLM")
