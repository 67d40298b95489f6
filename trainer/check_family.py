"""Checks whether a model's family can be trained here.

transformers has about two hundred families and adds more every year, so no list is kept. Instead, `check_family`
compares Coconut's forward on a few random tokens with the plain definition: the model's own forward, recomputed for
each thought without a cache. Unsupported families raise an error with the reason.

Legend: B rows, T columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from coconut import Coconut
from curriculum import IGNORE
from dataset import collate_for_device, collate_prompts, to_device
from definition import filled_embeddings
from methods import all_rules
from model.backbone import decoder_blocks, decoder_of
from model.checkpointing import checkpoint_blocks
from model.layout import column_of
from trainer.files import reason_of
from utils import UserError

TRIES = 3  # one must agree: near a tie, rounding can send a token to another expert of a mixture
HIGHEST = 50.0  # largest logit for which the head is compared: a soft cap does not show near 0
SMALL = 5_000_000  # a model with at most this many parameters gets larger weights during the comparison
GAIN = 0.5  # the least std * sqrt(columns) of its matrices
Row = tuple[list[int], list[int]]  # (input_ids, labels)


class Tolerance(NamedTuple):
    """Largest differences, as shares of the norm."""

    head: float  # of the logits of given hidden states, and of the loss
    logits: float
    gradients: float


EXACT = Tolerance(2e-5, 1e-4, 2e-4)  # small models in float32: a few times the rounding error
ORDINARY = Tolerance(1e-4, 1e-3, 1e-2)  # float32
COARSE = Tolerance(0.03, 0.1, 0.2)  # bfloat16 and float16


def check_family(model: Coconut, gradient_checkpointing: bool = False) -> None:
    """Raises UserError if Coconut's forward, with gradient checkpointing if asked for, differs from the definition.

    Compares logits, loss and gradients of the input embeddings on two rows, one of them padded: about twenty passes
    over eight columns, on any device except meta. Leaves the model and the random state unchanged and sets
    `backbone.leaves_parameters_out` (some parameters get no gradient) and `backbone.recomputes` (generation cannot use
    a cache).
    """
    base = model.base_causallm
    name = f"the model family {base.config.model_type} ({type(base).__name__})"
    small = sum(parameter.numel() for parameter in base.parameters()) <= SMALL
    tolerance = EXACT if small else COARSE if base.dtype.itemsize == 2 else ORDINARY
    sequential = model.latent_token_id is not None and model.thought.sequential
    with _restored_after(model), _with_larger_weights(model) if small else nullcontext():
        latent_problem = _tried(_problem_of_decoding, model, tolerance)
        model.backbone.recomputes = latent_problem is not None
        problem = _tried(_problem_without_latents, model, tolerance)
        if sequential and problem is None and latent_problem is None:
            latent_problem = _tried(_problem_with_latents, model, tolerance)
    if problem is None and not (sequential and latent_problem):
        with _restored_after(model, training=True):
            problem = _tried(_note_unused_parameters, model, tolerance)
    if problem is not None:
        raise UserError(f"{name} cannot be trained here, by any method: {problem}")
    if sequential and latent_problem is not None:
        *others, last = [method for method, rules in all_rules().items() if not rules.has_latents]
        raise UserError(
            f"{name} cannot be trained with latent thoughts here: {latent_problem}. The methods "
            f"{', '.join(others)} and {last} need no cache and work with it"
        )
    if gradient_checkpointing:
        with _restored_after(model), _with_larger_weights(model) if small else nullcontext(), _checkpointed(base):
            problem = _tried(_problem_with_latents if sequential else _problem_without_latents, model, tolerance)
        if problem is not None:
            raise UserError(f"{name} cannot be trained with gradient_checkpointing here: {problem}")


@contextmanager
def _with_larger_weights(model: Coconut) -> Iterator[None]:
    """Adds noise to the weights, in at least float32, inside the context: at initialisation many are so small, or 0,
    that an error in a layer would not show."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(part._buffers, dict(part._buffers)) for part in model.modules()]
    try:
        model.to(torch.promote_types(model.base_causallm.dtype, torch.float32))
        for parameter in model.base_causallm.parameters():
            weights = parameter.data.nan_to_num(0, 0, 0)
            columns, std = (weights.shape[-1], weights.std(correction=0)) if weights.ndim > 1 else (25, 0)
            noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(weights.numel()))
            parameter.data = weights + noise.to(weights) * max(GAIN * columns**-0.5 - std, 0)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for others, own in buffers:
            others.update(own)


def _tried(problem_of: Callable[..., str | None], model: Coconut, tolerance: Tolerance) -> str | None:
    """Returns the last problem if each of TRIES seeds has one, else None.

    problem_of: (model, tolerance, seed) -> the problem as a clause, or None.
    """
    problem = None
    for seed in range(TRIES):
        try:
            problem = problem_of(model, tolerance, seed)
        except (MemoryError, torch.OutOfMemoryError):  # not the family's fault
            raise
        except Exception as error:  # an unknown family may raise anything
            return f"its forward pass from embeddings fails ({type(error).__name__}: {reason_of(error)})"
        if problem is None:
            return None
    return problem


@contextmanager
def _checkpointed(base: PreTrainedModel) -> Iterator[None]:
    blocks = decoder_blocks(base)
    checkpoint_blocks(blocks)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own


@contextmanager
def _restored_after(model: Coconut, training: bool = False) -> Iterator[None]:
    """Sets evaluation mode without gradients of weights, or training mode with them; afterwards restores the modes,
    requires_grad and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = model.base_causallm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(training)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode


# --- Without latents ---


class _Probe(Coconut):
    """The model with the paper's thought, whose input embeddings are leaves that require gradients."""

    def __init__(self, model: Coconut):
        super().__init__(
            model.base_causallm, model.latent_token_id, model.start_latent_id, model.end_latent_id, model.eos_token_id
        )
        self.backbone.recomputes = model.backbone.recomputes
        self.embeds: torch.Tensor | None = None  # (B, T, D) the last batch's
        self.plain_embed, self.backbone.embed = self.backbone.embed, self._embed

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.embeds = self.plain_embed(input_ids).detach().requires_grad_()
        return self.embeds.clone()  # some families multiply in place


def _rows(model: Coconut, seed: int, shapes: list[tuple[int, int, int]]) -> list[Row]:
    """Returns random rows. shapes: for each row the numbers of tokens before the latents, of latents, and of tokens
    after them; the latter are supervised except for the first."""
    base = model.base_causallm
    n_words = min(len(base.get_input_embeddings().weight), len(base.get_output_embeddings().weight))
    marked = {model.latent_token_id, model.start_latent_id, model.end_latent_id, model.eos_token_id}
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        drawn = torch.randint(n_words, (count + 64,), generator=generator).tolist()
        return [word for word in drawn if word not in marked][:count]

    rows = []
    for before, latents, after in shapes:
        continuation = words(after)
        ids = [*words(before), *[model.latent_token_id] * latents, *continuation]
        rows.append((ids, [IGNORE] * (before + latents + 1) + continuation[1:]))
    return rows


def _problem_without_latents(model: Coconut, tolerance: Tolerance, seed: int) -> str | None:
    probe, base = _Probe(model), model.base_causallm
    rows = _rows(model, seed, [(1, 0, 7), (1, 0, 5)])
    with torch.no_grad():
        words = [_tensor(base, ids) for ids, _ in rows]
        wanted = [_upcast(base(input_ids=ids, use_cache=False).logits) for ids in words]
        if not all(logits.isfinite().all() for logits in wanted):
            return None  # weights that are not finite: the training reports them
        for ids, logits in zip(words, wanted, strict=True):
            embedded = base(inputs_embeds=probe.plain_embed(ids), use_cache=False).logits
            if _differs(_upcast(embedded), logits, tolerance.logits):
                return "its forward uses more of a token than its embedding, and a thought has no token"
            earlier = _upcast(base(input_ids=ids[:, :-1], use_cache=False).logits)
            if _differs(earlier, logits[:, :-1], tolerance.logits):
                return "its logits at a token depend on later tokens"
        if not _is_head_known(probe, seed, tolerance.head):
            return "its logits are not those of its LM head, scaled and capped as its configuration says"
    return _problem_of_steps(probe, rows, tolerance, "without latents")


def _is_head_known(probe: _Probe, seed: int, tolerance: float) -> bool:
    """Whether the model's forward and `Coconut.head` agree on the logits of random hidden states that are large enough
    to show a soft cap."""
    base, given = probe.base_causallm, []

    def replace(_, __, output):
        like = output[0]
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(like.shape, generator=generator).to(like)
        hidden = hidden * (HIGHEST / base.get_output_embeddings()(hidden).abs().max())
        given.append(hidden)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output["last_hidden_state"] = hidden
        return output

    handle = decoder_of(base).register_forward_hook(replace)
    try:
        theirs = base(input_ids=_tensor(base, [1, 2, 3]), use_cache=False).logits
    finally:
        handle.remove()
    if not given:
        raise RuntimeError("its decoder is not found")
    ours = probe.head(given[-1])
    return ours.shape == theirs.shape and not _differs(_upcast(ours), _upcast(theirs), tolerance)


@torch.no_grad()
def _problem_of_decoding(model: Coconut, tolerance: Tolerance, seed: int) -> str | None:
    """Compares the logits of two tokens that are decoded over a cache, as in `Coconut.generate`."""
    probe, rows = _Probe(model), _rows(model, seed, [(1, 0, 7), (1, 0, 5)])
    wanted = [_plain_logits(probe, ids)[0] for ids, _ in rows]
    if not all(logits.isfinite().all() for logits in wanted):
        return None
    prompts = [ids[:-2] for ids, _ in rows]
    batch = to_device(collate_prompts(prompts, prompts[0][0]), probe.base_causallm.device)
    laid_out = probe.lay_out(**batch, prompts=True)
    whole, _, cache = probe._run(laid_out, new_columns=2)
    hidden, mask = [column_of(whole, laid_out.before)], laid_out.attention_mask
    position = column_of(laid_out.position_ids, laid_out.before)
    for column in (-2, -1):
        position, mask = position + 1, torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = torch.cat([_tensor(probe.base_causallm, [ids[column]]) for ids, _ in rows])
        hidden.append(probe.backbone.span(probe.backbone.embed(token), mask, position, True, cache))
    logits = _upcast(probe.head(torch.cat(hidden, dim=1)))  # (B, 3, V)
    whole, padded = (
        _differs(ours, theirs[0, -3:], tolerance.logits) for ours, theirs in zip(logits, wanted, strict=True)
    )
    if whole:
        return "its logits over a cache, token by token, differ from those of one pass"
    return "padding before a row changes its logits" if padded else None


# --- With latents ---


def _problem_with_latents(model: Coconut, tolerance: Tolerance, seed: int) -> str | None:
    rows = _rows(model, seed, [(3, 2, 3), (1, 2, 2)])
    if model.thought.needs_layers:
        base = model.base_causallm
        embeds = model.backbone.embed(_tensor(base, rows[0][0]))  # (1, T, D)
        with model.backbone.recording(lambda state: state[:, -1:]) as states, torch.no_grad():
            decoder_of(base)(inputs_embeds=embeds, use_cache=False)
        if [state.shape for state in states] != [embeds[:, -1:].shape] * (len(model.backbone.blocks) + 1):
            return "thoughts from the layers need blocks that each run once, on one residual stream"
    return _problem_of_steps(_Probe(model), rows, tolerance, "over a cache")


def _problem_of_steps(probe: _Probe, rows: list[Row], tolerance: Tolerance, how: str) -> str | None:
    found, gradients = _step(probe, rows)
    loss, plain = _plain_step(probe, rows)
    if not loss.isfinite():
        return None
    if _differs(found, loss, tolerance.head):
        return f"{how} its loss is {found:.5g} instead of the definition's {loss:.5g}"
    differ = [_differs(ours, theirs, tolerance.gradients) for ours, theirs in zip(gradients, plain, strict=True)]
    return f"{how} its gradients differ from the definition's" if any(differ) else None


def _batch(model: Coconut, rows: list[Row]) -> dict:
    batch = collate_for_device(rows, pad_token_id=rows[0][0][0], latent_token_id=model.latent_token_id)
    return to_device(batch, model.base_causallm.device)


def _step(probe: _Probe, rows: list[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns a training step's loss and the gradients of each row's embeddings, (T, D)."""
    batch = _batch(probe, rows)
    loss = probe(**batch).loss
    (gradient,) = torch.autograd.grad(loss, [probe.embeds])
    layout = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    attended = probe.lay_out(**layout, latent_columns=batch["latent_columns"]).attention_mask.bool()
    return _upcast(loss.detach()), [_upcast(one[seen]) for one, seen in zip(gradient, attended, strict=True)]


def _plain_step(probe: Coconut, rows: list[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the same by definition: each row alone, without padding or cache, recomputed for each thought."""
    logits, leaves = zip(*(_plain_logits(probe, ids) for ids, _ in rows), strict=True)
    targets = torch.tensor([label for _, labels in rows for label in labels[1:]], device=logits[0].device)
    loss = F.cross_entropy(torch.cat([one[0, :-1] for one in logits]), targets, ignore_index=IGNORE)
    gradients = torch.autograd.grad(loss, leaves)
    return loss.detach(), [_upcast(gradient[0]) for gradient in gradients]


def _plain_logits(probe: _Probe, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (1, T, V) by definition, and the leaf of the input embeddings (1, T, D)."""
    base = probe.base_causallm
    embeds = probe.backbone.embed(_tensor(base, ids))  # (1, T, D)
    leaf = probe.embeds
    embeds = filled_embeddings(base, ids, probe.latent_token_id, embeds)
    return _upcast(base(inputs_embeds=embeds, use_cache=False).logits), leaf


def _note_unused_parameters(model: Coconut, tolerance: Tolerance, seed: int) -> None:
    """Sets `leaves_parameters_out`: whether the loss's graph lacks a parameter that requires a gradient."""
    loss = model(**_batch(model, _rows(model, seed, [(1, 0, 7)]))).loss
    reached, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(getattr(node, "variable", None))
            waiting += [following for following, _ in node.next_functions]
    left_out = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in reached]
    model.backbone.leaves_parameters_out = bool(left_out)


def _tensor(base: PreTrainedModel, input_ids: list[int]) -> torch.Tensor:
    return torch.tensor([input_ids], device=base.device)


def _upcast(values: torch.Tensor) -> torch.Tensor:
    """Converts to at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _differs(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    """Whether the difference's norm exceeds `tolerance` of the norm of `theirs`, or either holds NaN."""
    return not bool((ours - theirs).norm() <= tolerance * theirs.norm())
