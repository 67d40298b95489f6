"""What a grid will cost: epochs, tokens and FLOPs of each job, counted; the time, from the jobs that are finished."""

from __future__ import annotations

import shlex
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from coconut import Coconut
from curriculum import IGNORE, stage_of
from dataset import StageDataset
from preprocessing.examples import load_examples
from preprocessing.tokens import tokenize
from trainer.pretrained import load_tokenizer, mark, shape_of
from trainer.setup import checkpoint_bytes
from trainer.throughput import FlopCounter, peak_flops

if TYPE_CHECKING:
    from jobs import Job

    from config import Config

SAMPLE = 200  # examples whose sequences are counted; the others are taken to be like them


class Cost(NamedTuple):
    epochs: int
    tokens: float  # trained on
    flops: float  # of training and evaluation
    disk: int  # bytes of checkpoints


@cache
def _data(path: str, model: _Model, separator: str) -> tuple[int, object, object]:
    examples = load_examples(path)
    tokenizer = load_tokenizer(model)
    return len(examples), tokenizer, tokenize(examples[:SAMPLE], tokenizer, step_separator=separator)


class _Model(NamedTuple):
    model_id: str
    trust_remote_code: bool


def cost_of(job: Job, epochs: Sequence[int] | None = None) -> Cost:
    """What a job costs in these epochs, by default in all from its beginning, with their validations and the test, and
    without what a method adds to Coconut.

    An evaluation has a forward pass for the loss, and another's FLOPs for a generation as long as the gold answer.
    """
    config = job.config
    epochs = range(config.resume, config.num_epochs) if epochs is None else epochs
    model = _Model(config.model_id, config.trust_remote_code)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape_of(config, None), trust_remote_code=model.trust_remote_code)
    markers = mark(_data(config.train_path, model, config.step_separator)[1], config.method)
    counter = FlopCounter.of(Coconut(base, markers.latent, markers.start, markers.end, markers.eos, config.thought))

    def count(path: str, most: int | None, config: Config, epoch: int) -> tuple[float, float]:
        """(tokens, FLOPs) of training once on a file as in this epoch."""
        n_examples, _, tokens = _data(path, model, config.step_separator)
        rows, share = StageDataset(tokens, config, markers, epoch), min(n_examples, most or n_examples) / len(tokens)
        pairs = [rows[index, stage_of(config, epoch)] for index in range(len(tokens))]
        lengths = [len(ids) for ids, _ in pairs]
        supervised = sum(label != IGNORE for _, labels in pairs for label in labels)
        return share * sum(lengths), share * counter.training(lengths, supervised)

    trained = [count(config.train_path, config.max_train_examples, config, epoch) for epoch in epochs]
    at_stage = replace(config, uniform_prob=0.0)
    evaluated = [count(config.val_path, config.max_eval_examples, at_stage, epoch) for epoch in epochs]
    if job.run in job.grid.runs:
        evaluated.append(count(job.grid.test_path, config.max_eval_examples, at_stage, config.num_epochs - 1))
    flops = sum(flops for _, flops in trained) + sum(flops for _, flops in evaluated) * 2 / 3
    weights = sum(parameter.numel() for parameter in base.parameters()) * (2 if config.bf16_weights else 4)
    disk = checkpoint_bytes(config, weights, 0 if config.lora_rank else weights)
    return Cost(len(epochs), sum(tokens for tokens, _ in trained), flops, disk)


def plan_of(jobs: list[Job], waiting: list[Job], peak: float | None, utilisation: float, at_once: int) -> str:
    """A line for each job that is left, with its commands; their sum; the hours of so many jobs at once on GPUs that
    reach this share of a peak, by default an H100's for the job's arithmetic."""
    logging.set_verbosity_error()
    speeds = [speed for job in jobs if job.is_trained and (speed := _tokens_per_second(job)) is not None]
    left, lines = [(job, cost_of(job)) for job in waiting], []
    for job, cost in left:
        most = "at most " if job.config.advance_at is not None else ""
        more = ", and what it adds to Coconut" if is_counted_in_part(job) else ""
        lines.append(
            f"\n# {job.name}: {most}{cost.epochs} epochs, {cost.tokens:,.0f} tokens, {cost.flops:.2e} FLOPs, "
            f"{cost.disk / 1e9:.3g} GB of checkpoints{more}"
        )
        lines += [shlex.join(command) for command in job.commands()]
    tokens, flops, disk = (sum(getattr(cost, name) for _, cost in left) for name in ("tokens", "flops", "disk"))
    lines.append(
        f"\n{len(left)} of {len(jobs)} runs are left: {tokens:,.0f} tokens, {flops:.2e} FLOPs, {disk / 1e9:.3g} GB"
    )
    save_path = Path(jobs[0].config.save_path).absolute()
    free = shutil.disk_usage(next(path for path in (save_path, *save_path.parents) if path.exists())).free
    if disk > free:
        lines.append(f"warning: {save_path} has {free / 1e9:.3g} GB free: see keep_checkpoints")
    if speeds:
        speed = statistics.median(speeds)
        minutes = tokens / speed / 60
        lines.append(f"about {minutes:.0f} minutes of a core, at the {speed:,.0f} tokens a second of finished runs")
    else:
        lines.append("the time to expect of this machine is known once a run is finished")
    if left:
        peaks = {job.config.arithmetic: peak or peak_flops("H100", job.config.arithmetic) for job in waiting}
        hours = sum(cost.flops / peaks[job.config.arithmetic] for job, cost in left) / utilisation / 3600
        n_gpus = at_once * waiting[0].n_gpus
        lines.append(
            f"{hours:.3g} GPU hours, {hours / n_gpus:.3g} hours on {n_gpus} GPUs, at {utilisation:.0%} of "
            + " and ".join(f"{flops:.3g} FLOP/s ({arithmetic})" for arithmetic, flops in peaks.items())
        )
    return "\n".join(lines)


def is_counted_in_part(job: Job) -> bool:
    """Whether its method does more than is counted here."""
    return job.config.has_latents and job.config.method != "coconut"


def _tokens_per_second(job: Job) -> float | None:
    seconds = sum(record["train_seconds"] + record["seconds"] for record in job.epochs())
    epochs = [record["epoch"] for record in job.epochs()]  # fewer than all where advance_at has passed over some
    return cost_of(job, epochs).tokens / seconds if seconds else None
