"""Measures the peak memory of tensors in training steps and validations of run.py with torch's profiler.

    forked.run(2, peak.py, FOLDER/NAME.yaml, ...)    # configurations, NAME.stage beside each; writes NAME-RANK.json

The profiler gets every allocation and free from the allocator itself. Threads that load weights, and gloo's, may drop a
tensor a little after its last use: loading is without threads here, and of several steps the least counts.
"""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import run as program
from config import Config
from dataset import MicroBatch, PlannedStep
from trainer import evaluate, parallel
from trainer.checkpoint import Progress
from trainer.data import load_data
from trainer.distributed import barrier, cleanup_distributed, exit_process, setup_distributed
from trainer.plan import Batches
from trainer.setup import Run
from trainer.throughput import FlopCounter, Throughput

STEPS, VALIDATIONS = 8, 4


def measure(config: Config, stage: int, world) -> dict[str, int]:
    """Returns the bytes at the peak of a training step, and of a validation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        pretrained = parallel.load(config, world, None)
        gc.collect()  # under FSDP, rank 0's whole model
        data = load_data(config, world, pretrained.tokenizer)
        run = Run(config, world, pretrained, {"": data}, None, Progress())
        run.throughput = Throughput(FlopCounter.of(run.model), None)
        run.wrapped = parallel.wrap(run.model, world)
        run.optimizer = program.make_optimizer(run)
        accumulation, size = config.micro_batches(world.size)
        batch = Batches(config, data, pretrained.markers).training(stage, size) | {"weight": 1.0}
        if run.parts.dataset.counts_loss_terms:
            batch["loss_counts"] = {"auxiliary": size}
        planned = PlannedStep([MicroBatch([0], 1.0)] * accumulation, size)
        run.wrapped.train()
        for step in range(STEPS):
            barrier(world)
            with record_function(f"training {step}"):
                program.train_step(run, planned, (dict(batch) for _ in range(accumulation)), config.lr)
        parallel.gather_weights(run.model)
        for number in range(VALIDATIONS):
            barrier(world)
            with record_function(f"validation {number}"):
                evaluate.evaluate(pretrained, data, stage, config, world)
    return peaks(profiler.profiler.kineto_results.events())


def peaks(events: list) -> dict[str, int]:
    """Returns the least of the peaks of all training steps after the first, which makes AdamW's state, and of all
    validations."""
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, sizes = np.array(records).T
    live = np.concatenate([[0], sizes.cumsum()])  # (records + 1,) bytes before the first record and after each
    found = {"training": [], "validation": []}
    for event in events:
        kind, _, number = event.name().partition(" ")
        if kind in found and (kind, number) != ("training", "0"):
            first, last = np.searchsorted(times, (event.start_ns(), event.end_ns()))
            found[kind].append(int(live[first : last + 1].max()))
    return {kind: min(values) for kind, values in found.items()}


def main(paths: list[Path]) -> int:
    world = setup_distributed()
    for path in paths:
        found = measure(Config.from_file(path), json.loads(path.with_suffix(".stage").read_text()), world)
        path.with_name(f"{path.stem}-{world.rank}.json").write_text(json.dumps(found))
        gc.collect()  # a later free of these tensors would be counted in the next profile
        barrier(world)
    cleanup_distributed()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    exit_process(main([*map(Path, sys.argv[1:])]))
