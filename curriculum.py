"""The curriculum and the sequences of its stages (paper, Section 3 and Figure 2), as pure functions.

Legend: Q question, S_i written step i, A answer, n number of written steps.

The stage of a training step, its learning rate, whether AdamW is re-initialised, and an example's sequence at a stage
are functions of (configuration, epoch, step, example): no number of ranks or restarts changes them. Neither torch nor
transformers is imported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from config import Config

IGNORE = -100  # the label of a position that is not supervised, torch's default ignore_index
START, END, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"  # the reference's markers
NO_REASONING = 1 << 30  # a stage that leaves no token of any reasoning


class Markers(NamedTuple):
    """Token ids. The first three are None for methods whose sequences hold no latents."""

    start: int | None
    latent: int | None
    end: int | None
    eos: int


def replaceable(function: Callable) -> Callable:
    """Lets a method have a function of this name of its own, in its class Method (see methods/__init__.py); what is
    written here is then `function.paper`."""
    index = list(inspect.signature(function).parameters).index("config")

    @wraps(function)
    def chosen(*arguments, **named):
        config = named["config"] if "config" in named else arguments[index]
        return (getattr(config.rules, function.__name__, None) or function)(*arguments, **named)

    chosen.paper = function
    return chosen


# ---------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------


@replaceable
def stage_of(config: Config, epoch: int) -> int:
    """The scheduled stage of an epoch (both from 0); at most config.last_stage, in which every written step is gone."""
    if config.method in ("cot", "no_cot"):
        return 0
    if config.curriculum == "none" or not config.rules.has_stages:
        return config.last_stage
    if isinstance(config.epochs_per_stage, int):
        return min(epoch // config.epochs_per_stage, config.last_stage)
    ends = np.cumsum(config.epochs_per_stage)
    return min(int(np.searchsorted(ends, epoch, side="right")), len(ends) - 1)


def stage_name(stage: int) -> str:
    """A stage as people read it."""
    return "all" if stage == NO_REASONING else str(stage)


@replaceable
def stage_of_step(config: Config, epoch: int, step: int, steps_per_epoch: int) -> int:
    """The stage of one optimizer step (from 0 in its epoch): that of its epoch."""
    return stage_of(config, epoch)


@replaceable
def stage_of_example(config: Config, stage: int, epoch: int, index: int, n_steps: int) -> int:
    """The stage at which training example `index` is seen: the scheduled one, or with uniform_prob one of 0..n."""
    if config.uniform_prob > 0:
        random = np.random.default_rng((config.seed, epoch, index))
        if random.random() < config.uniform_prob:
            return int(random.integers(n_steps + 1))
    return stage


@replaceable
def thoughts_and_dropped(n_steps: int, stage: int, config: Config) -> tuple[int, int]:
    """(latent positions, written steps left out) of an example with n_steps steps at a stage."""
    if config.method == "cot":
        return 0, 0
    if config.method == "no_cot":
        return 0, n_steps
    if stage > config.max_latent_stage:
        replaced = config.max_latent_stage if config.pad_latent_to_max else min(n_steps, config.max_latent_stage)
        dropped = n_steps
    else:
        replaced, dropped = stage, min(stage, n_steps)
    return (replaced * config.c_thought if config.has_latents else 0), dropped


@replaceable
def kept_reasoning(steps: Sequence[Sequence[int]], stage: int, config: Config) -> list[int]:
    """The tokens of the written reasoning that a stage leaves: the last steps."""
    _, dropped = thoughts_and_dropped(len(steps), stage, config)
    return [token for step in steps[dropped:] for token in step]


@replaceable
def kept_lengths(lengths: np.ndarray, stage: int, config: Config) -> np.ndarray:
    """How many tokens `kept_reasoning` returns where the steps that are not left out have so many."""
    return lengths


# ---------------------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------------------


@replaceable
def prefix(question: Sequence[int], n_latents: int, config: Config, markers: Markers) -> list[int]:
    """What is given: Q, and for methods with latents start latent* end, with latent_markers none latent* alone."""
    if not config.has_latents:
        return list(question)
    if config.latent_markers == "none":
        return [*question, *[markers.latent] * n_latents]
    return [*question, markers.start, *[markers.latent] * n_latents, markers.end]


def prompt(
    question: Sequence[int], steps: Sequence[Sequence[int]], stage: int, config: Config, markers: Markers
) -> list[int]:
    """The token ids that generation starts from: what `training_sequence` puts before the supervised tokens.

    With config.eval_latents_from_steps and no padding to max_latent_stage, at most n steps of thought: the
    reference's rule, which tells the model how many steps the gold solution has. config.eval_latents sets the number of
    thoughts, whatever the stage (paper, Section 5: forced switches to language).
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    if config.eval_latents is not None:
        n_latents = config.eval_latents
    elif config.eval_latents_from_steps and not config.pad_latent_to_max:
        n_latents = min(n_latents, len(steps) * config.c_thought)
    return prefix(question, n_latents, config, markers)


@replaceable
def training_sequence(
    question: Sequence[int],
    steps: Sequence[Sequence[int]],
    answer: Sequence[int],
    stage: int,
    config: Config,
    markers: Markers,
) -> tuple[list[int], list[int]]:
    """One example at one stage as (input_ids, labels), equally long; labels are IGNORE up to the end of the prompt.

    Q S_1..S_n A for cot, Q A for no_cot, and for coconut Q start latent* end S_{s+1}..S_n A, with latent_markers none
    without start and end; no_thoughts is coconut without markers and latents. A ends with EOS, which is added where
    `answer` has none.
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    before = prefix(question, n_latents, config, markers)
    after = kept_reasoning(steps, stage, config) + list(answer)
    if after[-1:] != [markers.eos]:
        after.append(markers.eos)
    return before + after, [IGNORE] * len(before) + after


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


def next_epoch(config: Config, epoch: int, accuracy: float, at_goal: int) -> tuple[int, int]:
    """(the epoch after one with this accuracy, epochs of its stage in a row at advance_at, at_goal of them before it):
    the next; or the first of the next stage, num_epochs where there is none, after advance_after such epochs."""
    at_goal = at_goal + 1 if config.advance_at is not None and accuracy >= config.advance_at else 0
    later = range(epoch + 1, config.num_epochs)
    begins = next((e for e in later if stage_of(config, e) != stage_of(config, epoch)), config.num_epochs)
    return (begins, 0) if at_goal >= config.advance_after else (epoch + 1, at_goal if epoch + 1 < begins else 0)


def optimizer_is_reset(config: Config, epoch: int) -> bool:
    """Whether AdamW is re-initialised before this epoch."""
    if config.reset_optimizer == "stage":
        return epoch > 0 and stage_of(config, epoch) != stage_of(config, epoch - 1)
    return config.reset_optimizer == "epoch"


@replaceable
def should_reset_optimizer(
    config: Config,
    epoch: int,
    step: int,
    steps_per_epoch: int,
    trained_on: Callable[[int, int], Iterable[tuple[int, Sequence[Sequence[int]]]]],
) -> bool:
    """Whether AdamW is re-initialised before this step: with the epoch or the stage, as reset_optimizer says.

    trained_on(epoch, step) gives the examples of a step, (index, [S_1..S_n]) each, to methods whose stages end within
    an epoch."""
    return step == 0 and optimizer_is_reset(config, epoch)


def lr_factor(config: Config, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step of an epoch as a share of config.lr: linear warm-up from the first step that is
    trained, then constant, linear or cosine to 0."""
    step += (epoch - config.resume) * steps_per_epoch
    total_steps = (config.num_epochs - config.resume) * steps_per_epoch
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_scheduler]


@replaceable
def reasoning_left(stage: int, config: Config) -> str:
    """In words, what a stage leaves of the written reasoning."""
    _, dropped = thoughts_and_dropped(config.max_latent_stage, stage, config)
    if config.method == "no_cot" or (config.method != "cot" and stage > config.max_latent_stage):
        return "none"
    return f"all but {dropped} steps" if dropped else "all"


def schedule(config: Config, world_size: int) -> str:
    """The whole plan as a table, a line an epoch, of its end: what `run.py FILE --schedule` prints."""
    accumulation, size = config.passes(world_size)
    batch = accumulation * world_size * size
    lines = [f"{'epoch':>5} {'stage':>5} {'latents':>8} {'written reasoning':>20} {'optimizer':>10} {'batch':>6}"]
    for epoch in range(config.resume, config.num_epochs):
        stage = stage_of(config, epoch)
        latents, _ = thoughts_and_dropped(config.max_latent_stage, stage, config)
        optimizer = "new" if epoch == config.resume or optimizer_is_reset(config, epoch) else "kept"
        left = reasoning_left(stage, config)
        lines.append(f"{epoch:>5} {stage_name(stage):>5} {latents:>8} {left:>20} {optimizer:>10} {batch:>6}")
    if config.advance_at is not None:
        lines.append(f"at most: {config.advance_after} in a row with an accuracy of {config.advance_at:g} end a stage")
    return "\n".join(lines)
