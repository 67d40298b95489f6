"""Logs training steps: losses over all ranks, and steps whose loss is not finite."""

from __future__ import annotations

import json
import math

import torch

from trainer import distributed as ranks
from trainer.files import writing
from trainer.parallel import whole_norm
from trainer.setup import Run, Step
from utils import UserError, log


def log_steps(run: Run, epoch: int) -> float:
    """Logs the steps since the last call, each with the mean loss of its examples on all ranks; returns the last loss.
    Checks losses for NaN here rather than at every step, to avoid a device sync each time. Raises UserError on every
    rank if one is not finite, unless skip_nonfinite is set. Collective."""
    losses = torch.stack([step.losses for step in run.unlogged])  # (steps, 1), or (steps, 2) with an auxiliary loss
    ranks.all_reduce(losses)  # all ranks: each holds its share of every step's loss
    losses = (losses / run.world.size).tolist()
    norms = [whole_norm(step.grad_norm).item() for step in run.unlogged if step.grad_norm is not None]  # all ranks
    speed = run.throughput.report(run.world.size) | _means(run)  # all ranks
    if run.world.device.type == "cuda":
        speed["peak_memory_gib"] = torch.cuda.max_memory_allocated(run.world.device) / 2**30
    first = run.progress.step - len(losses) + 1
    numbered = list(enumerate(zip(losses, run.unlogged, strict=True), start=first))
    with ranks.agree(run.world):  # all ranks
        for number, ((loss, *auxiliary), step) in numbered:  # writes on rank 0 only
            added = {"auxiliary_loss": auxiliary[0]} if auxiliary else {}
            added |= {"grad_norm": norms[number - first]} if norms else {}
            run.logger.log("step", step=number, epoch=epoch, stage=step.stage, loss=loss, **added, lr=step.lr, **speed)
    for number, (both, step) in numbered:
        if math.isfinite(sum(both)):
            run.progress.losses += both[0] * len(step.examples)
        else:
            run.progress.lost += len(step.examples)
            report_nonfinite(run, epoch, number, sum(both), step)
    run.unlogged.clear()
    return losses[-1][0]


def _means(run: Run) -> dict[str, float]:
    """Returns the means of `Run.measure` since the last call, over all ranks. Collective."""
    sums: dict[str, tuple[float, float]] = {}
    for measured in ranks.on_every_rank(run.world, lambda: run.measured):  # all ranks, each with names of its own
        for name, (total, number) in measured.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + number
    run.measured = {}
    return {name: total / number for name, (total, number) in sums.items() if number}


def report_nonfinite(run: Run, epoch: int, number: int, loss: float, step: Step) -> None:
    """Appends the examples of a step with a NaN or infinite loss to nonfinite.jsonl. Raises UserError on every rank,
    unless skip_nonfinite is set. Collective: every rank must call it."""
    file, records = run.config.run_dir / "nonfinite.jsonl", sorted(map(run.data.train.record, step.examples))
    record = {"epoch": epoch, "step": number, "loss": str(loss), "examples": records}
    with ranks.agree(run.world):  # all ranks
        if run.world.is_main:
            with writing(file), file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
    if not run.config.skip_nonfinite:
        raise UserError.of_all(
            f"the loss of step {number}, in epoch {epoch}, is {loss}; its examples are in {file}; "
            f"the last good checkpoint is {run.saved or 'none'}; try a lower lr, max_grad_norm, or skip_nonfinite=true"
        )
    log.warning(f"the loss of step {number} is {loss}: skipped, its examples are in {file}")
