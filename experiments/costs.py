"""Estimates the cost of a grid: epochs, tokens and FLOPs of each job; time from the speed of its finished jobs."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from trainer.files import free_bytes
from trainer.plan import Cost, cost_of, is_counted_in_part
from trainer.throughput import peak_flops

if TYPE_CHECKING:
    from jobs import Job


def plan_of(jobs: list[Job], left: list[Job], peak: float | None, utilisation: float, n_parallel: int) -> str:
    """Returns the text of --dry-run: cost and commands of each job that is left, their sum, and the hours of n_parallel
    jobs on GPUs at this utilisation of `peak` FLOP/s (default: an H100's peak in the job's arithmetic)."""
    logging.set_verbosity_error()
    speeds = [speed for job in jobs if job.is_trained and (speed := _tokens_per_second(job)) is not None]
    costs, lines = [job_cost(job) for job in left], []
    for job, cost in zip(left, costs, strict=True):
        at_most = "at most " if job.config.advance_at is not None else ""
        more = ", and what it adds to Coconut" if is_counted_in_part(job.config) else ""
        lines.append(
            f"\n# {job.name}: {at_most}{cost.epochs} epochs, {cost.tokens:,.0f} tokens, {cost.flops:.2e} FLOPs, "
            f"{cost.disk / 1e9:.3g} GB of checkpoints{more}"
        )
        lines += [shlex.join(command) for command in job.commands()]
    tokens, flops, disk = (sum(getattr(cost, name) for cost in costs) for name in ("tokens", "flops", "disk"))
    lines.append(
        f"\n{len(left)} of {len(jobs)} runs are left: {tokens:,.0f} tokens, {flops:.2e} FLOPs, {disk / 1e9:.3g} GB"
    )
    save_path = Path(jobs[0].config.save_path).absolute()
    if disk > (free := free_bytes(save_path)):
        lines.append(f"warning: {save_path} has {free / 1e9:.3g} GB free: see keep_checkpoints")
    if speeds:
        speed = statistics.median(speeds)
        minutes = tokens / speed / 60
        lines.append(f"about {minutes:.0f} minutes of a core, at {speed:,.0f} tokens a second, as in finished runs")
    elif left:
        lines.append("no run is finished on this machine: the time is unknown")
    if left:
        peaks = {job.config.arithmetic: peak or peak_flops("H100", job.config.arithmetic) for job in left}
        seconds = sum(cost.flops / peaks[job.config.arithmetic] for job, cost in zip(left, costs, strict=True))
        hours, n_gpus = seconds / utilisation / 3600, n_parallel * left[0].n_gpus
        lines.append(
            f"{hours:.3g} GPU hours, {hours / n_gpus:.3g} hours on {n_gpus} GPUs, at {utilisation:.0%} of "
            + " and ".join(f"{flops:.3g} FLOP/s ({arithmetic})" for arithmetic, flops in peaks.items())
        )
    return "\n".join(lines)


def job_cost(job: Job, epochs: Sequence[int] | None = None) -> Cost:
    """Returns the cost of some epochs (default: all) of a job; of a run of the grid, its test is included."""
    return cost_of(job.config, epochs, job.grid.test_path if job.run in job.grid.runs else None)


def _tokens_per_second(job: Job) -> float | None:
    seconds = sum(record["train_seconds"] + record["seconds"] for record in job.epochs())
    epochs = [record["epoch"] for record in job.epochs()]  # not all, if advance_at has skipped some
    return job_cost(job, epochs).tokens / seconds if seconds else None
