"""The curriculum and the sequences of its stages (paper, Section 3 and Figure 2), as pure functions.

Legend: Q question, S_i written step i, A answer, n number of written steps.

What a step of the training does, its stage, its learning rate, whether AdamW is made anew, and what an example is at a
stage, is a function of (configuration, epoch, step, example): no number of ranks, workers or restarts changes it.
Neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from config import Config

IGNORE = -100  # the label of a position that is not supervised, torch's default ignore_index
START, END, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"  # the reference's markers
MODES = ("direct", "written", "latent")  # of multi_mode: Q end A; Q start S_1..S_n end A; Q start latent* S.. end A
NO_REASONING = 1 << 30  # a stage of iCoT that leaves no token of any reasoning


class Markers(NamedTuple):
    """Token ids. The first three are None for methods whose sequences hold no latents."""

    start: int | None
    latent: int | None
    end: int | None
    eos: int


# ---------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------


def stage_of(config: Config, epoch: int) -> int:
    """The scheduled stage of an epoch (both from 0); at most config.last_stage, in which every written step is gone.

    Method codi has the last stage only. For icot the stage is the number of removed tokens, which grows within an epoch
    (see `stage_of_step`): here what it has come to in the last step of the epoch.
    """
    if config.method in ("cot", "no_cot"):
        return 0
    if config.method == "icot":
        return stage_of_step(config, epoch, config.icot_tokens_per_epoch - 1, config.icot_tokens_per_epoch)
    if config.curriculum == "none" or not config.rules.has_stages:
        return config.last_stage
    if isinstance(config.epochs_per_stage, int):
        return min(epoch // config.epochs_per_stage, config.last_stage)
    ends = np.cumsum(config.epochs_per_stage)
    return min(int(np.searchsorted(ends, epoch, side="right")), len(ends) - 1)


def stage_name(stage: int) -> str:
    """A stage as people read it."""
    return "all" if stage == NO_REASONING else str(stage)


def stage_of_step(config: Config, epoch: int, step: int, steps_per_epoch: int) -> int:
    """The stage of one optimizer step (from 0 in its epoch): that of its epoch, but for icot it grows by one token
    every 1/icot_tokens_per_epoch of an epoch (arXiv 2405.14838)."""
    if config.method != "icot":
        return stage_of(config, epoch)
    steps_per_token = max(1, round(steps_per_epoch / config.icot_tokens_per_epoch))
    removed = (epoch * steps_per_epoch + step) // steps_per_token
    everything = config.icot_remove_all_after is not None and removed >= config.icot_remove_all_after
    return NO_REASONING if everything else removed


def stage_of_example(config: Config, stage: int, epoch: int, index: int, n_steps: int) -> int:
    """The stage at which training example `index` is seen: the scheduled one, or with uniform_prob one of 0..n.

    icot's removal smoothing: o more tokens, with P(o) = (1 - e^-l) e^(-l o) and l = icot_smoothing.
    """
    if config.method == "icot":
        if not config.icot_smoothing:
            return stage
        random = np.random.default_rng((config.seed, epoch, index))
        return stage + int(random.geometric(1 - np.exp(-config.icot_smoothing))) - 1
    if config.uniform_prob > 0:
        random = np.random.default_rng((config.seed, epoch, index))
        if random.random() < config.uniform_prob:
            return int(random.integers(n_steps + 1))
    return stage


def thoughts_and_dropped(n_steps: int, stage: int, config: Config) -> tuple[int, int]:
    """(latent positions, written steps left out) of an example with n_steps steps at a stage."""
    if config.method in ("cot", "icot"):  # icot leaves out tokens, not steps: see `kept_reasoning`
        return 0, 0
    if config.method == "no_cot":
        return 0, n_steps
    if config.method == "multi_mode":  # in which no stage drops steps that no thoughts stand for
        groups = min(stage, config.max_latent_stage)
        if stage > config.max_latent_stage and not config.pad_latent_to_max:
            groups = min(groups, n_steps)
        by_mode = {"direct": (0, n_steps), "written": (0, 0)}
        return by_mode.get(config.mode, (groups * config.c_thought, min(groups, n_steps)))
    if stage > config.max_latent_stage:
        replaced = config.max_latent_stage if config.pad_latent_to_max else min(n_steps, config.max_latent_stage)
        dropped = n_steps
    else:
        replaced, dropped = stage, min(stage, n_steps)
    return (0 if config.method == "no_thoughts" else replaced * config.c_thought), dropped


def kept_reasoning(steps: Sequence[Sequence[int]], stage: int, config: Config) -> list[int]:
    """The tokens of the written reasoning that a stage leaves: the last steps, or for icot the last tokens."""
    _, dropped = thoughts_and_dropped(len(steps), stage, config)
    tokens = [token for step in steps[dropped:] for token in step]
    return tokens[stage:] if config.method == "icot" else tokens


# ---------------------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------------------


def _prefix(question: Sequence[int], n_latents: int, config: Config, markers: Markers) -> list[int]:
    if not config.has_latents:
        return list(question)
    if config.method == "multi_mode":  # what is given of the reasoning; the end marker ends it, and is predicted
        return [
            *question,
            *([markers.end] if config.mode == "direct" else [markers.start, *[markers.latent] * n_latents]),
        ]
    if config.latent_markers == "none":
        return [*question, *[markers.latent] * n_latents]
    return [*question, markers.start, *[markers.latent] * n_latents, markers.end]


def prompt(
    question: Sequence[int], steps: Sequence[Sequence[int]], stage: int, config: Config, markers: Markers
) -> list[int]:
    """The token ids that generation starts from: what `training_sequence` puts before the supervised tokens.

    With config.eval_latents_from_steps and no padding to max_latent_stage, at most n steps of thought: the
    reference's rule, which tells the model how many steps the gold solution has. config.eval_latents says how many
    thoughts, whatever the stage (paper, Section 5: forced switches to language).
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    if config.eval_latents is not None:
        n_latents = config.eval_latents
    elif config.eval_latents_from_steps and not config.pad_latent_to_max:
        n_latents = min(n_latents, len(steps) * config.c_thought)
    return _prefix(question, n_latents, config, markers)


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
    without start and end; no_thoughts is coconut without markers and latents; icot is cot without the first `stage`
    tokens of the steps; the modes of multi_mode are in MODES. A ends with EOS; it is added where `answer` has none yet.
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    before = _prefix(question, n_latents, config, markers)
    ends = config.method == "multi_mode" and config.mode != "direct"
    after = kept_reasoning(steps, stage, config) + [markers.end] * ends + list(answer)
    if after[-1:] != [markers.eos]:
        after.append(markers.eos)
    return before + after, [IGNORE] * len(before) + after


class AuxiliaryTexts(NamedTuple):
    """What a method tells its model of an example beside the sequence of the stage: other texts in place of the steps,
    and under which name their tokens are kept."""

    name: dict
    steps: Callable[[Sequence[str]], list[str]]


def auxiliary_texts(config: Config) -> AuxiliaryTexts | None:
    if config.step_decoder != "none":
        n_groups = config.max_latent_stage
        return AuxiliaryTexts({"explained": n_groups}, lambda steps: step_targets(steps, n_groups))
    if config.method in ("codi", "pccot"):
        return AuxiliaryTexts({"teacher": "all steps but the last, blanks between them"}, teacher_steps)
    return None


def teacher_steps(steps: Sequence[str]) -> list[str]:
    """The reasoning of CODI's teacher as one text: all steps but the last, joined by blanks."""
    return [" ".join(steps[:-1])] if len(steps) > 1 else []


def step_targets(steps: Sequence[str], max_latent_stage: int) -> list[str]:
    """What the groups of thoughts stand for, the first for the first step and so on; the group of max_latent_stage for
    all further steps too, a newline between them (SIM-CoT, arXiv 2509.20317)."""
    if len(steps) <= max_latent_stage:
        return list(steps)
    return [*steps[: max_latent_stage - 1], "\n".join(steps[max_latent_stage - 1 :])] if max_latent_stage else []


def explanations(
    texts: Sequence[Sequence[int]], answer: Sequence[int], n_latents: int, config: Config
) -> list[Sequence[int] | None]:
    """Of each group of a row's latents the tokens that it stands for, without EOS, or None; `texts` are those of
    `step_targets`."""
    surplus = answer if config.step_decoder_surplus == "answer" else None
    return [texts[group] if group < len(texts) else surplus for group in range(n_latents // config.c_thought)]


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


def next_epoch(config: Config, epoch: int, accuracy: float) -> int:
    """The epoch that follows one with this validation accuracy: the next, or, where advance_at has been reached, the
    first of the next stage, num_epochs where there is none. Data order and learning rate are those of that epoch."""
    if config.advance_at is None or accuracy < config.advance_at:
        return epoch + 1
    later = range(epoch + 1, config.num_epochs)
    return next((e for e in later if stage_of(config, e) != stage_of(config, epoch)), config.num_epochs)


def optimizer_is_reset(config: Config, epoch: int) -> bool:
    """Whether AdamW is made anew before this epoch. icot resets it within an epoch too."""
    if config.reset_optimizer == "stage":
        return epoch > 0 and stage_of(config, epoch) != stage_of(config, epoch - 1)
    return config.reset_optimizer == "epoch"


def should_reset_optimizer(
    config: Config,
    epoch: int,
    step: int,
    steps_per_epoch: int,
    trained_on: Callable[[int, int], Iterable[tuple[int, Sequence[Sequence[int]]]]],
) -> bool:
    """Whether AdamW is made anew before this step: with the epoch or the stage, as reset_optimizer says.

    icot's stage grows within an epoch; there it is made anew as long as the step before had reasoning tokens left:
    `trained_on(epoch, step)` gives the examples of that step, (index, [S_1..S_n]) each.
    """
    if config.method != "icot" or config.reset_optimizer != "stage":
        return step == 0 and optimizer_is_reset(config, epoch)
    before = (epoch, step - 1) if step else (epoch - 1, steps_per_epoch - 1)
    if before[0] < 0:
        return False
    last_stage = stage_of_step(config, *before, steps_per_epoch)
    if stage_of_step(config, epoch, step, steps_per_epoch) == last_stage:
        return False
    return any(
        kept_reasoning(steps, stage_of_example(config, last_stage, before[0], index, len(steps)), config)
        for index, steps in trained_on(*before)
    )


def lr_factor(config: Config, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step of an epoch as a share of config.lr: linear warm-up from the first step that is
    trained, then constant, linear or cosine to 0."""
    step += (epoch - config.resume) * steps_per_epoch
    total_steps = (config.num_epochs - config.resume) * steps_per_epoch
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_scheduler]


# ---------------------------------------------------------------------------------------------------------------
# The whole plan
# ---------------------------------------------------------------------------------------------------------------


def schedule(config: Config, world_size: int) -> str:
    """The whole plan as a table, a line an epoch: what `run.py FILE --schedule` prints.

    For icot the removed tokens are those at the end of the epoch, to within the rounding of an epoch's steps.
    """
    accumulation, size = config.passes(world_size)
    batch = accumulation * world_size * size
    lines = [f"{'epoch':>5} {'stage':>5} {'latents':>8} {'written reasoning':>20} {'optimizer':>10} {'batch':>6}"]
    for epoch in range(config.resume, config.num_epochs):
        stage = stage_of(config, epoch)
        fresh = epoch == config.resume or optimizer_is_reset(config, epoch)
        latents, dropped = thoughts_and_dropped(config.max_latent_stage, stage, config)
        if config.method == "icot":
            kept = "none" if stage == NO_REASONING else f"all but {stage} tokens"
        elif config.method == "no_cot" or (
            config.method not in ("cot", "multi_mode") and stage > config.max_latent_stage
        ):
            kept = "none"
        else:
            kept = f"all but {dropped} steps" if dropped else "all"
        optimizer = "new" if fresh else "kept"
        lines.append(f"{epoch:>5} {stage_name(stage):>5} {latents:>8} {kept:>20} {optimizer:>10} {batch:>6}")
    if config.advance_at is not None:
        lines.append(
            f"a stage has at most these epochs: it ends where validation accuracy reaches {config.advance_at:g}"
        )
    return "\n".join(lines)
