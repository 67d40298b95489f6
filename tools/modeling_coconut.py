"""A model that was trained to reason in its hidden states (Coconut, arXiv 2412.06769), in one file: it needs torch and
transformers, and none of the code that has trained it.

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    questions = tokenizer(["a question", "another one"], padding=True, return_tensors="pt")
    rows = model.generate(**questions)  # each question, and behind it what the model writes
    tokenizer.batch_decode(rows[:, questions["input_ids"].shape[1] :], skip_special_tokens=True)

`generate` puts behind each question what the training put there: a newline, and the markers and latent positions. The
embedding at a latent position is a thought, made from the hidden state of the position before it, one after the other
over a key-value cache; from there on Hugging Face's own `generate` goes on, with all of its options.

`forward` is that of the model on tokens, with thoughts where they hold the latent token. It adds nothing: what
`generate` starts from is had from `prompts`. The thoughts pass no gradient: this file is for asking a model.

Legend: B rows, T columns, D hidden size, V vocabulary, L decoder blocks.
"""

import inspect
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

RIDGE = 1e-4  # of `realigned`, relative to the mean eigenvalue of the output embeddings' Gram matrix


class CoconutConfig(PreTrainedConfig):
    """
    Args:
        text_config: the configuration of the language model, or its dictionary.
        thought: what a latent position is fed, see `CoconutForCausalLM.think`.
        latent_passes: None for thoughts one after the other; for all at once, in how many passes each is made anew.
        latent_token_id: the token whose embedding a thought replaces; None where there are no thoughts.
        newline: the tokens of the newline that ends a question.
        endings: the tokens that stand for a question's last token and the newline together, by that last token, where
            the tokenizer joins the two.
        appended: the tokens after the newline: markers and latents.
    """

    model_type = "coconut"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        thought="last",
        latent_passes=None,
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
        self.latent_passes = latent_passes
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
        name, _, number = config.thought.partition(":")
        width = self.get_input_embeddings().weight.shape[1]
        if name.startswith("projected"):
            self.thought = nn.Linear(width, width, bias=False)
        if name == "mlp":
            inner = int(number or width)
            layers = (nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width), nn.LayerNorm(width))
            self.thought = nn.Sequential(*layers)
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
        return self.base_causallm.get_decoder()

    @property
    def _latent(self):
        return -1 if self.config.latent_token_id is None else self.config.latent_token_id

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **options):
        """As of the language model: (B, T) tokens or (B, T, D) embeddings to logits, (B, T, V), and with `labels` a
        loss. Latent tokens get their thoughts, where no cache is given."""
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
            attention_mask: (B, T), 0 at padding; default all ones.
            generation_config, and all else: options of `generate`. Lengths count the questions as they are given, not
                what is added to them, and no more is generated than the model has positions for. Sampling leaves no
                word out, unless top_k says so: Hugging Face's own default takes the likeliest 50.

        Raises ValueError where there are no questions, and where one leaves no room for an answer.
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
                raise ValueError(f"a question of {length} tokens leaves no room in {limit} positions")
            wanted = options.get("max_new_tokens", settings.max_new_tokens)
            options["max_new_tokens"] = limit - length if wanted is None else min(wanted, limit - length)
        if options.get("do_sample", settings.do_sample) and settings.top_k is None:
            options.setdefault("top_k", 0)
        self.base_causallm.generation_config = self.generation_config
        return self.base_causallm.generate(
            inputs=questions,  # what is returned, and what stopping rules and penalties see
            inputs_embeds=self.embed(input_ids, attention_mask),
            attention_mask=attention_mask,
            generation_config=generation_config,
            **options,
        )

    def prompts(self, questions, attention_mask=None):
        """(B, T) questions to what the model writes its answers after, padded on the left, and its attention mask."""
        if attention_mask is None:
            attention_mask = torch.ones_like(questions)
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

    @torch.no_grad()
    def embed(self, input_ids, attention_mask=None):
        """Input embeddings, (B, T, D), with the thoughts at the latent tokens of (B, T) ids: each from the hidden state
        of the column before it, over a cache, so that no column is computed twice."""
        embeds = self.get_input_embeddings()(input_ids)
        is_latent = input_ids == self._latent  # (B, T)
        columns = is_latent.any(dim=0).nonzero().flatten().tolist()
        if self.config.thought == "pause" or not columns:
            return embeds
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        decoder, positions = self.get_decoder(), _positions(attention_mask)
        accepted = _accepted(decoder)
        if self.config.latent_passes is not None:
            return self._embed_at_once(embeds, is_latent, columns, attention_mask, positions)
        cache = DynamicCache(config=self.config.text_config)
        options = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}
        prepared = self._prepare()
        begin = 0
        for column in columns:
            if "position_ids" in accepted:
                options["position_ids"] = positions[:, begin:column]
            with self._recorded() as stream:
                hidden = decoder(
                    inputs_embeds=embeds[:, begin:column], attention_mask=attention_mask[:, :column], **options
                ).last_hidden_state[:, -1:]  # (B, 1, D)
            thought = self.think(hidden, embeds[:, column : column + 1], stream, prepared)
            # rows with an ordinary token in this column keep its embedding
            fed = torch.where(is_latent[:, column, None], thought[:, 0].to(embeds.dtype), embeds[:, column])
            embeds[:, column] = fed
            begin = column
        return embeds

    def _embed_at_once(self, embeds, is_latent, columns, attention_mask, positions):
        """`embed` with all thoughts made at once, and anew in each pass from the hidden states of the pass before."""
        decoder, prepared, end = self.get_decoder(), self._prepare(), columns[-1] + 1
        learned, before = embeds[:, columns], [column - 1 for column in columns]
        options = {"position_ids": positions[:, :end]} if "position_ids" in _accepted(decoder) else {}
        for _ in range(self.config.latent_passes):
            hidden = decoder(
                inputs_embeds=embeds[:, :end], attention_mask=attention_mask[:, :end], use_cache=False, **options
            ).last_hidden_state
            of = columns if self.config.thought == "looped" else before
            thoughts = self.think(hidden[:, of], learned, None, prepared).to(embeds.dtype)  # (B, K, D)
            embeds[:, columns] = torch.where(is_latent[:, columns, None], thoughts, learned)
        return embeds

    def think(self, hidden, embedding, stream, prepared):
        """What a latent position is fed, (B, 1, D), with h the last hidden state of the position before, after the
        final norm, e the latent token's embedding, and r_0 .. r_L the residual stream of the position before:

            last                    h (the paper)
            pause                   e (`embed` does not come here: nothing waits for a hidden state)
            projected               W h, W learned
            mlp[:P]                 LayerNorm(V GELU(W h + a) + b), P rows of W, D if it is not said
            normalised              h, rescaled to the mean norm of the input embeddings
            projected+normalised    both, in this order
            realigned               h A, A the least squares map from the output to the input embeddings
            looped                  e + h, h that of the same position in the pass before
            layer:N                 the N-th of transformers' hidden_states, the L-th of which is h
            suppressed[:T]          the sum over the later half of the blocks l of r_{l-1} where |r_{l-1}| - |r_l| > T
            last+suppressed[:T], embedding+suppressed[:T]       that plus h, or plus e
        """
        name, _, number = self.config.thought.partition(":")
        if name == "layer":
            return stream[int(number)] if int(number) < len(stream) - 1 else hidden
        if name.endswith("suppressed"):
            later = torch.stack(stream[(len(stream) - 1) // 2 :])
            before, after = later[:-1], later[1:]
            taken = (before * (before.abs() - after.abs() > float(number or 0))).sum(dim=0)
            return taken + {"last": hidden, "embedding": embedding}.get(name.partition("+")[0], 0)
        if name.startswith("projected") or name == "mlp":
            hidden = self.thought(hidden)
        if name.endswith("normalised"):
            exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            return exact * (prepared / exact.norm(dim=-1, keepdim=True))
        if name == "looped":
            return embedding + hidden
        return hidden @ prepared.to(hidden.dtype) if name == "realigned" else hidden

    def _prepare(self):
        """What `normalised` and `realigned` need of the input embeddings E and output embeddings U, (V, D) each: the
        mean norm of E, or A = (U'U + r I)^-1 U'E, (D, D)."""
        name, outputs = self.config.thought, self.get_output_embeddings().weight  # (V, D)
        if not name.endswith("normalised") and name != "realigned":
            return None
        exact = torch.promote_types(outputs.dtype, torch.float32)
        embed = self.get_input_embeddings()  # called, as some families scale their weights
        inputs = embed(torch.arange(len(embed.weight), device=embed.weight.device)).to(exact)  # (V, D)
        if name != "realigned":
            return inputs.norm(dim=-1).mean()
        outputs = outputs.to(exact)
        gram = outputs.T @ outputs
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=exact, device=gram.device)
        return torch.cholesky_solve(outputs.T @ inputs, torch.linalg.cholesky(gram + ridge))

    @contextmanager
    def _recorded(self):
        """The list that gets the residual stream r_0 .. r_L of the last column of a pass, (B, 1, D) each, where the
        thought needs it. transformers' output_hidden_states has the final norm in its last."""
        stream, handles = [], []

        def keep(state):
            stream.append((state[0] if isinstance(state, tuple) else state)[:, -1:])

        if "layer" in self.config.thought or "suppressed" in self.config.thought:
            depth = self.config.text_config.get_text_config(decoder=True).num_hidden_layers
            lists = [part for part in self.get_decoder().modules() if isinstance(part, nn.ModuleList)]
            blocks = next(part for part in lists if len(part) == depth)
            handles = [block.register_forward_hook(lambda _, __, output: keep(output)) for block in blocks]
            first = blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            handles.append(first)
        try:
            yield stream
        finally:
            for handle in handles:
                handle.remove()


def _accepted(module):
    """The arguments that it takes."""
    return inspect.signature(type(module).forward).parameters


def _positions(attention_mask):
    """(B, T): those that are attended, counted from 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


# what a folder says of its files, where the model is saved: config.json's auto_map
CoconutConfig.register_for_auto_class()
CoconutForCausalLM.register_for_auto_class("AutoModelForCausalLM")
