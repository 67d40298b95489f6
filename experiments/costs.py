"""What a grid will cost: epochs, tokens and FLOPs of each job, counted; the time, from the jobs that are finished."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from functools import cache
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
from trainer.throughput import FlopCounter

if TYPE_CHECKING:
    from jobs import Job

SAMPLE = 200  # examples whose sequences are counted; the others are taken to be like them


class Cost(NamedTuple):
    epochs: int
    tokens: float
    flops: float  # forward and backward


@cache
def _data(path: str, model: _Model, separator: str) -> tuple[int, object, object]:
    examples = load_examples(path)
    tokenizer = load_tokenizer(model)
    return len(examples), tokenizer, tokenize(examples[:SAMPLE], tokenizer, step_separator=separator)


class _Model(NamedTuple):
    model_id: str
    trust_remote_code: bool


def cost_of(job: Job, epochs: Sequence[int] | None = None) -> Cost:
    """What a job costs in these epochs, by default in all from its beginning, without validation, and without what
    a method adds to Coconut."""
    config = job.config
    epochs = range(config.resume, config.num_epochs) if epochs is None else epochs
    model = _Model(config.model_id, config.trust_remote_code)
    n_examples, tokenizer, tokens = _data(config.train_path, model, config.step_separator)
    markers = mark(tokenizer, config.method)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape_of(config, None), trust_remote_code=model.trust_remote_code)
        counter = FlopCounter.of(Coconut(base, markers.latent, markers.start, markers.end, markers.eos, config.thought))
    n_tokens, flops = 0.0, 0.0
    share = min(n_examples, config.max_train_examples or n_examples) / len(tokens)
    for epoch in epochs:
        rows = StageDataset(tokens, config, markers, epoch)
        pairs = [rows[index, stage_of(config, epoch)] for index in range(len(tokens))]
        lengths = [len(ids) for ids, _ in pairs]
        supervised = sum(label != IGNORE for _, labels in pairs for label in labels)
        n_tokens += share * sum(lengths)
        flops += share * counter.training(lengths, supervised)
    return Cost(len(epochs), n_tokens, flops)


def print_plan(jobs: list[Job], waiting: list[Job], flops_per_second: float) -> None:
    """A line for each job that is left, with its commands, and the sum; hours of a GPU that does so many FLOP/s."""
    logging.set_verbosity_error()
    speeds = [speed for job in jobs if job.is_trained and (speed := _tokens_per_second(job)) is not None]
    left = [(job, cost_of(job)) for job in waiting]
    for job, cost in left:
        most = "at most " if job.config.advance_at is not None else ""
        more = ", and what it adds to Coconut" if is_counted_in_part(job) else ""
        print(f"\n# {job.name}: {most}{cost.epochs} epochs, {cost.tokens:,.0f} tokens, {cost.flops:.2e} FLOPs{more}")
        for command in job.commands():
            print(shlex.join(command))
    tokens, flops = (sum(getattr(cost, name) for _, cost in left) for name in ("tokens", "flops"))
    print(f"\n{len(left)} of {len(jobs)} runs are left: {tokens:,.0f} tokens, {flops:.2e} FLOPs")
    if speeds:
        speed = statistics.median(speeds)
        print(
            f"about {tokens / speed / 60:.0f} minutes of a core, at the {speed:,.0f} tokens a second of finished runs"
        )
    else:
        print("the time to expect of this machine is known once a run is finished")
    print(f"{flops / flops_per_second / 3600:.3g} hours of a GPU that does {flops_per_second:.3g} FLOP/s of it")


def is_counted_in_part(job: Job) -> bool:
    """Whether its method does more than is counted here."""
    return job.config.has_latents and job.config.method != "coconut"


def _tokens_per_second(job: Job) -> float | None:
    seconds = sum(record["train_seconds"] + record["seconds"] for record in job.epochs())
    epochs = [record["epoch"] for record in job.epochs()]  # fewer than all where advance_at has passed over some
    return cost_of(job, epochs).tokens / seconds if seconds else None
