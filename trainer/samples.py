"""Samples several answers to each question: noise in the thoughts, sampled tokens, pass@k and vote.

The random numbers are a function of the question's key, such as (seed, index), and of the sample's number: they do not
depend on rank, batch or restart. The question runs once, and its cache is repeated for the samples; without noise and
dropout the thoughts run once too.

Legend: B questions, N samples of each, R = B N rows, the samples of a question side by side; T columns, t columns of a
pass, K latents, D hidden size, V vocabulary, C columns with latents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from transformers import Cache

from coconut import Coconut
from config import split_noise
from dataset import collate_prompts, to_device
from model.backbone import Backbone
from model.kv_cache import can_fork
from model.layout import Rows, column_of
from model.thought import Seen
from utils import UserError

NOISE, TOKENS, DROPOUT = 1, 2, 3  # a sample's streams of random numbers


class Policy(NamedTuple):
    """How samples are drawn: the keys temperature, thought_noise and thought_dropout."""

    temperature: float = 0.0
    noise: float | str = 0.0
    dropout: float = 0.0


class Samples(NamedTuple):
    """Result of `generate`."""

    tokens: list[list[int]]  # the new tokens of each of R rows, including EOS
    eps: torch.Tensor | None  # (R, K, D) the noise's standard normal numbers; 0 after a row's last latent
    entropy: tuple[float, int]  # sum over all new tokens, in nats, and their number
    norms: tuple[float, int]  # sum of the L2 norms of the thoughts, noise included, and their number


# --- Measures ---


def pass_at_k(n_samples: int, n_right: int, k: int) -> float:
    """Returns the probability that k of n samples, drawn without replacement, include a right one: 1 - C(n - c, k) /
    C(n, k) (Chen et al. 2021, arXiv 2107.03374, Section 2.1). Raises ValueError if k > n."""
    if not 1 <= k <= n_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n_samples}")
    return 1.0 - math.comb(n_samples - n_right, k) / math.comb(n_samples, k)


def vote(answers: Sequence[Hashable]) -> int:
    """Returns the index of the most frequent answer (maj@N); ties go to the answer that comes first."""
    return answers.index(Counter(answers).most_common(1)[0][0])


def measures(verdicts: Sequence[Sequence[bool]], votes: Sequence[bool]) -> dict[str, float]:
    """Returns vote@N and, for k = 1, 4, 16 and N, pass@k where k <= N: means over the questions.

    verdicts: whether each of a question's N samples is right. votes: whether its most frequent answer is.
    """
    n = len(verdicts[0])
    found = {f"vote@{n}": float(np.mean(votes))}
    for k in sorted({k for k in (1, 4, 16, n) if k <= n}):
        found[f"pass@{k}"] = float(np.mean([pass_at_k(n, sum(right), k) for right in verdicts]))
    return found


# --- Noise and dropout ---


def _random(key: tuple[int, ...], stream: int) -> np.random.Generator:
    return np.random.default_rng((*key, stream))


class Noise:
    """An `edit` of Coconut.forward that adds noise to a thought z: z + s eps (LatentTTS, arXiv 2510.07745), where s is
    S |z| / sqrt(D) for thought_noise: S and S for thought_noise: "absolute:S".

    spelling: the key thought_noise. eps: (R, K, D). is_latent: (R, C) bool.
    """

    def __init__(self, spelling: float | str, eps: torch.Tensor, is_latent: torch.Tensor):
        self.sigma, self.relative = split_noise(spelling)
        self.eps, self.is_latent = eps, is_latent
        self.numbers = is_latent.cumsum(dim=1).sub(1).clamp(min=0)  # (R, C): number of the row's latent in the column

    def at(self, column: int, thought: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns eps (R, 1, D) and s (R, 1, 1) in the `column`-th column with latents."""
        norm = thought.norm(dim=-1, keepdim=True)
        share = self.sigma / thought.shape[-1] ** 0.5
        scale = share * norm if self.relative else torch.full_like(norm, self.sigma)
        return column_of(self.eps, self.numbers[:, column]).to(thought.dtype), scale

    def __call__(self, column: int, thought: torch.Tensor, seen: Seen) -> torch.Tensor:
        eps, scale = self.at(column, thought)
        return thought + scale * eps


def draw_noise(keys: list[tuple[int, ...]], n_latents: list[int], width: int, device: torch.device) -> torch.Tensor:
    """Draws (R, K, D) standard normal numbers: the first of each row's stream NOISE."""
    eps = np.zeros((len(keys), max(n_latents), width))
    for row, (key, n) in enumerate(zip(keys, n_latents, strict=True)):
        eps[row, :n] = _random(key, NOISE).standard_normal((n, width))
    return _on_device(eps, device)


def _on_device(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns float64 numbers as a tensor on the device; as float32 on MPS, which has no float64."""
    return torch.from_numpy(numbers).to(device, _widest(device))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def thought_dropout(model: Coconut, share: float, keys: list[tuple[int, ...]], rows: Rows) -> Iterator[None]:
    """Applies dropout to the outputs of attention and MLP at every position before a row's last latent, as if these
    passes were in training (LatentTTS, arXiv 2510.07745). share: the probability of a zero."""
    is_latent = rows.input_ids == model.latent_token_id
    ends = (rows.position_ids * is_latent).amax(dim=1, keepdim=True)  # (R, 1) position of the row's last latent
    branches = [module for block in model.backbone.blocks for module in block.children() if _has_matrix(module)]
    width = _width(model)
    kept = np.zeros((len(keys), max(int(ends.max()), 1), len(branches), width), dtype=bool)
    for row, (key, end) in enumerate(zip(keys, ends.flatten().tolist(), strict=True)):
        kept[row, :end] = _random(key, DROPOUT).random((end, *kept.shape[2:]), dtype=np.float32) >= share
    masks = torch.from_numpy(kept).to(ends.device)
    now = torch.zeros_like(ends)  # (R, t) positions of the current pass

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
    """Runs the first pass inside the context on every n-th row only, and repeats its cache and output n times."""

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


# --- Generating ---


@torch.no_grad()
def generate(
    model: Coconut,
    prompts: list[list[int]],
    keys: list[tuple[int, ...]],
    n_samples: int,
    policy: Policy,
    max_new_tokens: int,
) -> Samples:
    """Samples N answers to each of B prompts, in one batch of R rows.

    keys: one a prompt, of non-negative integers; (*key, j) seeds the random numbers of the prompt's sample j.
    A row ends with EOS, after max_new_tokens, or at the model's last position.

    Raises UserError if the policy asks for noise or dropout and the thoughts are not fed back one by one, and if the
    model's family decodes without a cache.
    """
    backbone, device = model.backbone, model.base_causallm.device
    prompts = model.shortened(prompts)
    batch = to_device(collate_prompts(prompts, model.eos_token_id), device)
    rows = model.lay_out(**batch, prompts=True)
    keys = [(*key, sample) for key in keys for sample in range(n_samples)]
    disturbed = bool(split_noise(policy.noise)[0] or policy.dropout)
    if disturbed and not (model.latent_token_id is not None and model.thinks and model.one_by_one):
        raise UserError.of_all("thought_noise and thought_dropout need thoughts that are fed back one after the other")
    if (cache := backbone.make_cache(1, keeps=True)) is None:
        family = model.base_causallm.config.model_type
        raise UserError.of_all(f"answers are sampled over a cache, and the model family {family} decodes without one")
    forks = can_fork(cache)
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
        once = forks and not policy.dropout and not model.thought.needs_layers  # these are recorded row by row
        how = first_pass_once(backbone, n_samples) if once else nullcontext()
        dropout = thought_dropout(model, policy.dropout, keys, rows) if policy.dropout else nullcontext()
        with how, dropout:
            hidden, embeds, cache = model._run(rows, max_new_tokens, edit)
    norms = embeds[:, rows.columns].norm(dim=-1)[is_latent].to(_widest(device))
    uniform = np.stack([_random(key, TOKENS).random(max_new_tokens) for key in keys])
    tokens, lengths, entropy = _decode(model, hidden, rows, cache, _on_device(uniform, device), policy.temperature)
    new = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return Samples(new, eps, (entropy, sum(lengths)), (norms.sum().item(), len(norms)))


def _repeated(rows: Rows, n: int) -> Rows:
    found = {name: value for name, value in rows._asdict().items() if isinstance(value, torch.Tensor)}
    return rows._replace(**{name: value.repeat_interleave(n, dim=0) for name, value in found.items()})


def _decode(
    model: Coconut, hidden: torch.Tensor, rows: Rows, cache: Cache, uniform: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, list[int], float]:
    """Decodes like `Coconut._decode`, but draws the tokens: `uniform` (R, max_new_tokens) has a random number for each.
    Returns the tokens (R, n), the number of new tokens in each row, and the sum of these tokens' entropies."""
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
        # a finished row goes on with tokens that do not count
        at = position if limit == math.inf else position.clamp(max=limit - 1)
        hidden = model.backbone.span(model.backbone.embed(token), attention_mask, at, rows.masks[1], cache)
    return torch.cat(tokens, dim=1), lengths.flatten().tolist(), float(entropy)


def sampled_from(logits: torch.Tensor, temperature: float, latent_token_id: int | None) -> torch.Tensor:
    """Returns the logits (..., V) of the sampling distribution. The latent token has probability 0, since in a sequence
    it would stand for a thought; at temperature 0 the likeliest token has probability 1."""
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits / temperature
    if latent_token_id is not None:
        logits[..., latent_token_id] = -math.inf
    return logits


def choose(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens (R, 1) from softmax(logits), logits (R, 1, V), by its inverse cumulative distribution at the uniform
    numbers (R, 1), in their dtype. Returns them with the entropies (R, 1) in nats."""
    probabilities = logits.to(uniform.dtype).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    below_one = uniform.clamp(max=1 - 2 * torch.finfo(uniform.dtype).eps)  # rounding must not reach the total
    token = (cumulative <= below_one[..., None] * cumulative[..., -1:]).sum(-1)
    return token, torch.special.entr(probabilities).sum(-1)
