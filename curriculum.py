"""The curriculum and the token sequences of its stages (paper, Section 3 and Figure 2), as pure functions.

Legend: Q question, S_i written step i, A answer, n number of written steps.

Stages, learning rates, optimizer resets and sequences are functions of (config, epoch, step, steps per epoch, example)
alone: a restart does not change them. This module imports neither torch nor transformers.
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
START, END, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"  # the reference's marker tokens
NO_REASONING = 1 << 30  # a stage in which every reasoning token is removed


class Markers(NamedTuple):
    """Token ids. The first three are None for methods without latents."""

    start: int | None
    latent: int | None
    end: int | None
    eos: int


def replaceable(function: Callable) -> Callable:
    """Calls the function of the same name in the method's class `Method` (methods/__init__.py), if it defines one.

    `function.paper` is always the decorated function itself.
    """
    index = list(inspect.signature(function).parameters).index("config")

    @wraps(function)
    def chosen(*arguments, **named):
        config = named["config"] if "config" in named else arguments[index]
        return (getattr(config.rules, function.__name__, None) or function)(*arguments, **named)

    chosen.paper = function
    return chosen


# --- Stages ---


@replaceable
def stage_of(config: Config, epoch: int) -> int:
    """Returns the scheduled stage of an epoch, both counted from 0. config.last_stage drops all written steps."""
    if config.method in ("cot", "no_cot"):
        return 0
    if config.curriculum == "none" or not config.rules.has_stages:
        return config.last_stage
    if isinstance(config.epochs_per_stage, int):
        return min(epoch // config.epochs_per_stage, config.last_stage)
    ends = np.cumsum(config.epochs_per_stage)
    return min(int(np.searchsorted(ends, epoch, side="right")), len(ends) - 1)


def stage_name(stage: int) -> str:
    """Returns a stage as printed in tables."""
    return "all" if stage == NO_REASONING else str(stage)


@replaceable
def stage_of_step(config: Config, epoch: int, step: int, steps_per_epoch: int) -> int:
    """Returns the stage of an optimizer step, counted from 0 in its epoch: the epoch's, unless a method changes it
    within an epoch."""
    return stage_of(config, epoch)


@replaceable
def stage_of_example(config: Config, stage: int, epoch: int, index: int, n_steps: int) -> int:
    """Returns the stage of training example `index`: drawn from 0..n with probability uniform_prob, else `stage`."""
    if config.uniform_prob > 0:
        random = np.random.default_rng((config.seed, epoch, index))
        if random.random() < config.uniform_prob:
            return int(random.integers(n_steps + 1))
    return stage


@replaceable
def thoughts_and_dropped(n_steps: int, stage: int, config: Config) -> tuple[int, int]:
    """Returns (number of latent positions, number of dropped steps) of an example with n_steps steps at a stage."""
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
    """Returns the tokens of the steps that a stage keeps: the last ones."""
    _, dropped = thoughts_and_dropped(len(steps), stage, config)
    return [token for step in steps[dropped:] for token in step]


@replaceable
def kept_lengths(lengths: np.ndarray, stage: int, config: Config) -> np.ndarray:
    """Returns the lengths of `kept_reasoning`, given how many tokens the steps have that are not dropped."""
    return lengths


# --- Sequences ---


@replaceable
def prefix(question: Sequence[int], n_latents: int, config: Config, markers: Markers) -> list[int]:
    """Returns Q, followed for methods with latents by start latent* end (without start and end if latent_markers is
    none)."""
    if not config.has_latents:
        return list(question)
    if config.latent_markers == "none":
        return [*question, *[markers.latent] * n_latents]
    return [*question, markers.start, *[markers.latent] * n_latents, markers.end]


def prompt(
    question: Sequence[int], steps: Sequence[Sequence[int]], stage: int, config: Config, markers: Markers
) -> list[int]:
    """Returns the token ids that generation starts from: the unsupervised part of `training_sequence`.

    config.eval_latents sets the number of latents at any stage (paper, Section 5: forced switches to language).
    config.eval_latents_from_steps without pad_latent_to_max limits it to n * c_thought: the reference's rule, which
    leaks the number of gold steps.
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
    """Returns (input_ids, labels) of an example at a stage, equally long; labels are IGNORE in the prompt.

    cot:          Q S_1..S_n A
    no_cot:       Q A
    coconut:      Q start latent* end S_{s+1}..S_n A, without start and end if latent_markers is none
    no_thoughts:  Q S_{s+1}..S_n A

    EOS is appended unless `answer` ends with it.
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    before = prefix(question, n_latents, config, markers)
    after = kept_reasoning(steps, stage, config) + list(answer)
    if after[-1:] != [markers.eos]:
        after.append(markers.eos)
    return before + after, [IGNORE] * len(before) + after


# --- Schedules ---


def next_epoch(config: Config, epoch: int, accuracy: float, at_goal: int) -> tuple[int, int]:
    """Returns (next epoch, new at_goal) after an epoch with this validation accuracy.

    at_goal counts the consecutive epochs of the stage that reached advance_at. After advance_after of them training
    jumps to the first epoch of the next stage, or to num_epochs if there is none.
    """
    if config.advance_at is None:
        return epoch + 1, 0
    at_goal = at_goal + 1 if accuracy >= config.advance_at else 0
    stage, later = stage_of(config, epoch), range(epoch + 1, config.num_epochs)
    next_stage_begins = next((e for e in later if stage_of(config, e) != stage), config.num_epochs)
    if at_goal >= config.advance_after:
        return next_stage_begins, 0
    return epoch + 1, at_goal if epoch + 1 < next_stage_begins else 0


def optimizer_is_reset(config: Config, epoch: int) -> bool:
    """Returns whether AdamW is re-initialised before this epoch."""
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
    """Returns whether AdamW is re-initialised before this step, as reset_optimizer says.

    trained_on(epoch, step) returns (index, [S_1..S_n]) of each example of a step: a method whose stages end within an
    epoch asks whether they have reasoning left.
    """
    return step == 0 and optimizer_is_reset(config, epoch)


def lr_factor(config: Config, begun: int, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step divided by config.lr: linear warm-up from the first trained step (of epoch
    `begun`), then constant, or linear or cosine decay to 0."""
    step += (epoch - begun) * steps_per_epoch
    total_steps = (config.num_epochs - begun) * steps_per_epoch
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_scheduler]


@replaceable
def reasoning_left(stage: int, config: Config) -> str:
    """Describes, for `schedule`, how much of the written reasoning a stage keeps."""
    _, dropped = thoughts_and_dropped(config.max_latent_stage, stage, config)
    if config.method == "no_cot" or (config.method != "cot" and stage > config.max_latent_stage):
        return "none"
    return f"from step {dropped + 1} on" if dropped else "all"


def schedule(config: Config, world_size: int) -> str:
    """Returns the table of `run.py FILE --schedule`: one line per epoch, with the stage at its end."""
    accumulation, size = config.micro_batches(world_size)
    batch = accumulation * world_size * size
    lines = [f"{'epoch':>5} {'stage':>5} {'latents':>8} {'written reasoning':>20} {'optimizer':>10} {'batch':>6}"]
    for epoch in range(config.resume, config.num_epochs):
        stage = stage_of(config, epoch)
        latents, _ = thoughts_and_dropped(config.max_latent_stage, stage, config)
        optimizer = "new" if epoch == config.resume or optimizer_is_reset(config, epoch) else "kept"
        left = reasoning_left(stage, config)
        lines.append(f"{epoch:>5} {stage_name(stage):>5} {latents:>8} {left:>20} {optimizer:>10} {batch:>6}")
    if config.advance_at is not None:
        lines.append(f"a stage ends early after {config.advance_after} epochs in a row at >= {config.advance_at:.1%}")
    return "\n".join(lines)
