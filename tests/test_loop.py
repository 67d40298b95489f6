"""Pieces of run.py's loop: where a run begins, which epochs it keeps, what it logs."""

from types import SimpleNamespace

import torch

import run as run_module
from config import Config
from trainer.checkpoint import Progress
from trainer.distributed import World
from trainer.setup import Step
from trainer.step_log import log_steps


def resumed(rank: int = 0, step: int = 0, **keys) -> SimpleNamespace:
    world, config = World(rank, rank, 2, torch.device("cpu")), Config(**keys)
    this = SimpleNamespace(config=config, world=world, progress=Progress(step=step), steps_per_epoch=5)
    this.model = torch.nn.Linear(1, 1)
    run_module.resume(this, None)
    return this


def test_ranks_and_restarts_have_random_numbers_of_their_own():
    drawn = []
    for rank, step in ((0, 0), (1, 0), (0, 7)):
        resumed(rank, step)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 3


def test_a_run_that_begins_later_counts_the_steps_before():
    assert resumed(resume=2).progress.step == 10


def test_an_epoch_is_kept_if_it_is_the_best_of_its_stage(monkeypatch):
    """Later stages are harder: their accuracy is lower."""
    kept = []
    monkeypatch.setattr(run_module, "save_checkpoint", lambda run, stage, files=None: kept.append(files is not None))
    progress = Progress(seen=8, losses=1.0, lost=3, seconds=2.0)
    run = SimpleNamespace(config=Config(num_epochs=9, save_only_improve=True), progress=progress)
    for epoch, (stage, accuracy) in enumerate(((0, 0.9), (0, 0.3), (0, 0.4), (1, 0.2), (1, 0.2), (1, 0.25))):
        run_module.save_epoch(run, epoch, stage, {"accuracy": accuracy}, [])
    assert kept == [True, False, False, True, False, True]
    assert (progress.best, progress.epoch) == ({0: 0.9, 1: 0.25}, 6)
    assert (progress.seen, progress.losses, progress.lost, progress.seconds) == (0, 0, 0, 0)


def test_the_training_loss_of_an_epoch_leaves_out_the_auxiliary_loss(world):
    run = SimpleNamespace(world=world, progress=Progress(step=1), measured={})
    run.throughput = SimpleNamespace(report=lambda _: {})
    run.logger = SimpleNamespace(log=lambda *_, **__: None)
    run.unlogged = [Step(torch.tensor([1.0, 5.0]), None, 0.1, 0, [3, 4])]
    assert log_steps(run, 0) == 1
    assert run.progress.losses == 2
