"""Several answers to one question: noise in the thoughts, sampled tokens, pass@k and vote.

Random numbers are a function of a question's key, such as (seed, index), and of the sample's number: no rank, batch or
restart changes them. The question runs once, and its cache is forked; without noise the thoughts run once too.

Legend: B questions, N samples of each, R = B N rows, the samples of a question side by side; T columns, K latents, D
hidden size, V vocabulary, C columns with latents.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from coconut import Coconut
from config import Config, split_noise
from dataset import collate_prompts
from model.backbone import Backbone
from model.layout import Rows, column_of, lay_out_prompts
from model.thought import Seen
from utils import UserError

NOISE, TOKENS, DROPOUT = 1, 2, 3  # streams of random numbers of a sample


class Policy(NamedTuple):
    """What samples differ by: the keys temperature, thought_noise and thought_dropout."""

    temperature: float = 0.0
    noise: float | str = 0.0
    dropout: float = 0.0

    @classmethod
    def of(cls, config: Config) -> Policy:
        return cls(config.temperature, config.thought_noise, config.thought_dropout)


class Samples(NamedTuple):
    """What `generate` returns; of each of R rows."""

    tokens: list[list[int]]  # the new tokens, with EOS where the row came to it
    eps: torch.Tensor | None  # (R, K, D) standard normal: of the noise; 0 behind a row's last latent
    entropy: tuple[float, int]  # sum over all new tokens, in nats, and their number
    norms: tuple[float, int]  # sum of the thoughts' L2 norms as they were fed, and their number


# ---------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------


def pass_at_k(n_samples: int, n_right: int, k: int) -> float:
    """The probability that k of n samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k) (Chen
    et al. 2021, arXiv 2107.03374, Section 2.1). Raises ValueError where k > n."""
    if not 1 <= k <= n_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n_samples}")
    return 1.0 - math.comb(n_samples - n_right, k) / math.comb(n_samples, k)


def vote(answers: Sequence[Hashable]) -> int:
    """The place of the most frequent answer's first appearance; of several as frequent the one seen first (maj@N)."""
    counts: dict[Hashable, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    return answers.index(max(counts, key=counts.__getitem__))


def measures(verdicts: Sequence[Sequence[bool]], votes: Sequence[bool]) -> dict[str, float]:
    """vote@N and pass@1, 4, 16, N, those k with k <= N: means over questions of N verdicts each."""
    n = len(verdicts[0])
    found = {f"vote@{n}": float(np.mean(votes))}
    for k in sorted({k for k in (1, 4, 16, n) if k <= n}):
        found[f"pass@{k}"] = float(np.mean([pass_at_k(n, sum(of_one), k) for of_one in verdicts]))
    return found


# ---------------------------------------------------------------------------------------------------------------
# Noise and dropout
# ---------------------------------------------------------------------------------------------------------------


def _random(key: tuple[int, ...], stream: int) -> np.random.Generator:
    return np.random.default_rng((*key, stream))


class Noise:
    """An `edit` of Coconut.forward: z + s eps, with s = S |z| / sqrt(D) or, of "absolute:S", S (LatentTTS, arXiv
    2510.07745).

    spelling: the key thought_noise. eps: (R, K, D). is_latent: (R, C) bool.
    """

    def __init__(self, spelling: float | str, eps: torch.Tensor, is_latent: torch.Tensor):
        self.sigma, self.relative = split_noise(spelling)
        self.eps, self.is_latent = eps, is_latent
        self.numbers = is_latent.cumsum(dim=1).sub(1).clamp(min=0)  # (R, C): of the row's latent in a column

    def at(self, column: int, thought: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """eps (R, 1, D) and s (R, 1, 1) in the `column`-th column with latents."""
        norm = thought.norm(dim=-1, keepdim=True)
        share = self.sigma / thought.shape[-1] ** 0.5
        scale = share * norm if self.relative else torch.full_like(norm, self.sigma)
        return column_of(self.eps, self.numbers[:, column]).to(thought.dtype), scale

    def __call__(self, column: int, thought: torch.Tensor, seen: Seen) -> torch.Tensor:
        eps, scale = self.at(column, thought)
        return thought + scale * eps


def draw_noise(keys: list[tuple[int, ...]], n_latents: list[int], width: int, device: torch.device) -> torch.Tensor:
    """(R, K, D) float64, standard normal: the first of each row's stream."""
    eps = np.zeros((len(keys), max(n_latents), width))
    for row, (key, n) in enumerate(zip(keys, n_latents, strict=True)):
        eps[row, :n] = _random(key, NOISE).standard_normal((n, width))
    return torch.from_numpy(eps).to(device)


@contextmanager
def thought_dropout(model: Coconut, share: float, keys: list[tuple[int, ...]], rows: Rows) -> Iterator[None]:
    """Dropout of what attention and MLP add to the residual stream, at every position before a row's last latent: in
    the passes whose next position is a latent, as if they were in training (LatentTTS, arXiv 2510.07745)."""
    is_latent = rows.input_ids == model.latent_token_id
    ends = (rows.position_ids * is_latent).amax(dim=1, keepdim=True)  # (R, 1) position of the last latent
    branches = [module for block in model.backbone.blocks for module in block.children() if _has_matrix(module)]
    width = _width(model)
    kept = np.zeros((len(keys), max(int(ends.max()), 1), len(branches), width), dtype=bool)
    for row, (key, end) in enumerate(zip(keys, ends.flatten().tolist(), strict=True)):
        kept[row, :end] = _random(key, DROPOUT).random((end, *kept.shape[2:]), dtype=np.float32) >= share
    masks = torch.from_numpy(kept).to(ends.device)
    now = torch.zeros_like(ends)  # (R, t) positions of the pass

    def drop(branch: int, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[-1] != width:
            return output
        at = now.clamp(max=masks.shape[1] - 1)
        mask = masks[torch.arange(len(keys), device=now.device)[:, None], at, branch]  # (R, t, D)
        states = torch.where((now < ends)[..., None], states * mask / (1 - share), states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def span(embeds, attention_mask, position_ids, masked, cache):
        nonlocal now
        now = position_ids
        return Backbone.span(model.backbone, embeds, attention_mask, position_ids, masked, cache)

    hooks = [
        module.register_forward_hook(lambda _, __, output, number=number: drop(number, output))
        for number, module in enumerate(branches)
    ]
    model.backbone.span = span
    try:
        yield
    finally:
        del model.backbone.span
        for hook in hooks:
            hook.remove()


def _width(model: Coconut) -> int:
    return model.base_causallm.get_input_embeddings().weight.shape[1]


def _has_matrix(module: torch.nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


@contextmanager
def first_pass_once(backbone: Backbone, n: int) -> Iterator[None]:
    """Lets the first pass inside run on every n-th row, and forks its cache into n rows each."""

    def span(embeds, attention_mask, position_ids, masked, cache):
        del backbone.span
        hidden = backbone.span(embeds[::n], attention_mask[::n], position_ids[::n], masked, cache)
        cache.batch_repeat_interleave(n)
        return hidden.repeat_interleave(n, dim=0)

    backbone.span = span
    try:
        yield
    finally:
        vars(backbone).pop("span", None)


# ---------------------------------------------------------------------------------------------------------------
# Generating
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Coconut,
    prompts: list[list[int]],
    keys: list[tuple[int, ...]],
    n_samples: int,
    policy: Policy,
    max_new_tokens: int,
) -> Samples:
    """N answers to each of B prompts, in one batch of R rows.

    keys: of each prompt, numbers from 0 on; sample j of a prompt has the random numbers of (*key, j).
    A row ends with EOS, after max_new_tokens, or where the model has no more positions.

    Raises UserError where the model makes no thoughts to disturb, and where its family decodes without a cache.
    """
    backbone, device = model.backbone, model.base_causallm.device
    batch = {name: value.to(device) for name, value in collate_prompts(prompts, model.eos_token_id).items()}
    rows = lay_out_prompts(**batch, **model.family)
    keys = [(*key, sample) for key in keys for sample in range(n_samples)]
    disturbed = bool(split_noise(policy.noise)[0] or policy.dropout)
    if disturbed and not (model.latent_token_id is not None and model.thinks and model.one_by_one):
        raise UserError.of_all("thought_noise and thought_dropout need thoughts that are fed back one after the other")
    if (cache := backbone.make_cache(1, keeps=True)) is None:
        family = model.base_causallm.config.model_type
        raise UserError.of_all(f"answers are sampled over a cache, and the model family {family} decodes without one")
    forks = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    is_latent = batch["input_ids"][:, rows.columns] == (-1 if model.latent_token_id is None else model.latent_token_id)
    is_latent = is_latent.repeat_interleave(n_samples, dim=0)  # (R, C)
    eps = edit = None
    if split_noise(policy.noise)[0] and rows.columns:
        eps = draw_noise(keys, is_latent.sum(dim=1).tolist(), _width(model), device)
        edit = Noise(policy.noise, eps, is_latent)
    if forks and not disturbed:
        hidden, embeds, cache = model._run(rows, max_new_tokens)
        cache.batch_repeat_interleave(n_samples)
        hidden, embeds = (value.repeat_interleave(n_samples, dim=0) for value in (hidden, embeds))
        rows = _repeated(rows, n_samples)
    else:
        rows = _repeated(rows, n_samples)
        how = first_pass_once(backbone, n_samples) if forks and not policy.dropout else nullcontext()
        dropout = thought_dropout(model, policy.dropout, keys, rows) if policy.dropout else nullcontext()
        with how, dropout:
            hidden, embeds, cache = model._run(rows, max_new_tokens, edit)
    norms = embeds[:, rows.columns].norm(dim=-1)[is_latent].double()
    uniform = np.stack([_random(key, TOKENS).random(max_new_tokens) for key in keys])
    tokens, lengths, entropy = _decode(
        model, hidden, rows, cache, torch.from_numpy(uniform).to(device), policy.temperature
    )
    new = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return Samples(new, eps, (entropy, sum(lengths)), (norms.sum().item(), len(norms)))


def _repeated(rows: Rows, n: int) -> Rows:
    """Each row n times."""
    found = {name: value for name, value in rows._asdict().items() if isinstance(value, torch.Tensor)}
    return rows._replace(**{name: value.repeat_interleave(n, dim=0) for name, value in found.items()})


def _decode(
    model: Coconut, hidden: torch.Tensor, rows: Rows, cache: Cache, uniform: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, list[int], float]:
    """`Coconut._decode` that draws each token with a number of `uniform`, (R, N): (R, N) tokens, how many of each row
    count, and the sum of their entropies."""
    last = None if rows.columns else rows.before
    hidden, position = column_of(hidden, last), column_of(rows.position_ids, last)  # (R, 1, D), (R, 1)
    attention_mask, tokens, entropy = rows.attention_mask, [], 0.0
    limit = model.max_positions or math.inf
    goes_on, lengths = torch.ones_like(position, dtype=torch.bool), torch.zeros_like(position)  # (R, 1)
    for number in range(uniform.shape[1]):
        logits = sampled_from(model.head(hidden), temperature, model.latent_token_id)
        token, spread = choose(logits, uniform[:, number : number + 1])
        tokens.append(token)
        lengths, entropy = lengths + goes_on, entropy + (spread * goes_on).sum()
        position = position + 1
        goes_on = goes_on & (token != model.eos_token_id) & (position + 1 < limit)
        if len(tokens) == uniform.shape[1] or not goes_on.any():
            break
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
        # what a row that has ended is fed changes no other
        at = position if limit == math.inf else position.clamp(max=limit - 1)
        hidden = model.backbone.span(model.backbone.embed(token), attention_mask, at, rows.masks[1], cache)
    return torch.cat(tokens, dim=1), lengths.flatten().tolist(), float(entropy)


def sampled_from(logits: torch.Tensor, temperature: float, latent_token_id: int | None) -> torch.Tensor:
    """(..., V) logits of the distribution that tokens are sampled from: without the latent token, which in a sequence
    would stand for a thought; with temperature 0 the likeliest token has all of it."""
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits / temperature
    if latent_token_id is not None:
        logits[..., latent_token_id] = -math.inf
    return logits


def choose(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (R, 1) that the uniform numbers (R, 1) draw from softmax(logits), logits (R, 1, V), by its inverse
    cumulative distribution, and its entropies (R, 1) in nats."""
    probabilities = logits.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    token = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)
    return token, torch.special.entr(probabilities).sum(-1)
