"""A language model that reasons in its hidden states (Coconut, arXiv 2412.06769), for inference.

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    questions = tokenizer(["a question", "another one"], padding=True, return_tensors="pt")
    rows = model.generate(**questions)  # each question, followed by the model's output
    tokenizer.batch_decode(rows[:, questions["input_ids"].shape[1] :], skip_special_tokens=True)

`generate` appends to each question what training appended: a newline, the markers and the latent positions. It fills
the latent positions with thoughts, one after the other over a key-value cache; each thought is made from the hidden
state of the position before it. Then Hugging Face's own `generate` continues, with all of its options.

`forward` is the language model's, with thoughts at latent tokens. It does not append anything; `prompts` does. Thoughts
carry no gradient.

In the trainer's repository this file is tools/modeling_coconut.py. An exported folder holds a copy, and thought.py with
the definitions that are imported from `model` here, so that the folder needs only torch and transformers.

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
from model.thought import REGISTRY, Seen

logger = logging.get_logger(__name__)


class CoconutConfig(PreTrainedConfig):
    """
    Args:
        text_config: the language model's configuration, or its dictionary.
        thought, thought_number: the thought's name in REGISTRY (thought.py) and the number in its spelling.
        latent_passes: how often all thoughts are updated in parallel; None: thoughts come one after the other.
        stop_threshold: a row has no further thoughts once the stopping head's probability exceeds this; None: the model
            has no stopping head.
        latent_token_id: the token whose embedding a thought replaces; None: the model has no thoughts.
        newline: the tokens of the newline after a question.
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
        """Runs the language model on (B, T) tokens or (B, T, D) embeddings; returns logits, (B, T, V), and with
        `labels` a loss. Without a cache it fills latent tokens with thoughts."""
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
        """Makes the thoughts and calls Hugging Face's `generate`; returns (B, T + N): questions and N new tokens.

        Args:
            inputs, or input_ids: (B, T) int64, padded on the left, as the tokenizer returns them.
            attention_mask: (B, T), 0 at padding; default: see `prompts`.
            generation_config, options: of Hugging Face's `generate`. Lengths count the question and the new tokens, but
                not what this method appends; generation stops at the model's last position. The default top_k is none,
                not Hugging Face's 50.

        Raises ValueError without questions, and if a question fills all positions.
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
            inputs=questions,  # returned in the output, and seen by stopping criteria and penalties
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            **options,
        )

    def prompts(self, questions, attention_mask=None):
        """Appends newline, markers and latents to (B, T) questions; returns ids padded on the left, and their mask.

        The default attention_mask is 0 at padding tokens at both ends of a question, except those that all questions
        have.
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
        left, right = left - left.min(), right - right.min()  # a tokenizer may begin or end every text with this token
        if (left + right).any():
            logger.warning_once("generate got no attention_mask: it ignores padding tokens at the ends of questions")
        columns = torch.arange(questions.shape[1], device=questions.device)
        return ((columns >= left) & (columns < questions.shape[1] - right)).long()

    def _think(self, input_ids, attention_mask):
        """Returns the embeddings and attention mask of prompts, padded on the left, with their thoughts, without the
        latents after which the stopping head ended a row."""
        if self.config.stop_threshold is None:
            return self.embed(input_ids, attention_mask), attention_mask
        dropped = torch.zeros_like(input_ids, dtype=torch.bool)  # (B, T)
        embeds = self.embed(input_ids, attention_mask, dropped)
        mask = attention_mask * ~dropped
        order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(dim=1).max()) :]  # padding first, then the rest
        return embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])), mask.gather(1, order)

    @torch.no_grad()
    def embed(self, input_ids, attention_mask=None, dropped=None):
        """Returns the input embeddings, (B, T, D), of (B, T) ids with a thought at each latent token. A cache makes
        each column run once.

        dropped: (B, T) bool, all false; the method sets it at the latents that a row lacks because the stopping head
            ended its thoughts.
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
        accepted, vocabulary = _accepted(decoder), Vocabulary(self.base_causallm)
        prepared = self.thought.precomputed(vocabulary)
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
            if dropped is not None:
                stops = self.stop_head(hidden)[..., 0].float().sigmoid() > self.config.stop_threshold  # (B, 1)
                dropped[:, column:] |= stops & is_latent[:, column:]
                if (dropped | ~is_latent)[:, column:].all():
                    break
            stream = torch.stack(states) if states else None
            seen = Seen(hidden, embeds[:, column : column + 1], stream, prepared, vocabulary)
            thought = self.thought(seen)[:, 0].to(embeds.dtype)  # (B, D)
            # rows with an ordinary token in this column keep its embedding
            embeds[:, column] = torch.where(is_latent[:, column, None], thought, embeds[:, column])
            begin = column
        return embeds

    def _embed_in_parallel(self, embeds, is_latent, columns, attention_mask, positions):
        """`embed` for thoughts in parallel: each pass makes all thoughts from the hidden states of the pass before."""
        decoder, end = self.get_decoder(), columns[-1] + 1
        vocabulary = Vocabulary(self.base_causallm)
        prepared = self.thought.precomputed(vocabulary)
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

    @cached_property
    def _recorder(self):
        return Recorder(self.base_causallm)


def _accepted(module):
    """Returns the parameters of a module's forward."""
    return inspect.signature(type(module).forward).parameters


def _positions(attention_mask):
    """Returns position ids, (B, T), which count the attended columns from 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


# makes save_pretrained write auto_map into config.json and copy the code
CoconutConfig.register_for_auto_class()
CoconutForCausalLM.register_for_auto_class("AutoModelForCausalLM")
