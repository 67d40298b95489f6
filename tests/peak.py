"""The most memory that tensors take in a training step and a validation of run.py, as torch's profiler records it.

    forked.run(2, peak.py, FOLDER/NAME.yaml)        # a configuration, with NAME.stage beside it; writes NAME-RANK.json

The profiler hears of every allocation from the allocator itself, whatever asks for it. A process measures one
configuration: what another had left would be counted where it is freed.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import run as program
from config import Config
from dataset import MicroBatch, PlannedStep
from trainer import evaluate, parallel
from trainer.checkpoint import Progress
from trainer.data import load_data
from trainer.distributed import cleanup_distributed, exit_process, setup_distributed
from trainer.plan import Batches
from trainer.setup import Run
from trainer.throughput import FlopCounter, Throughput


def measure(config: Config, stage: int, world) -> dict[str, int]:
    """Bytes at the peak of a step, and of a validation."""
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
        for step in range(5):
            batches = (dict(batch) for _ in range(accumulation))
            with record_function(f"train {step}"):
                program.train_step(run, planned, batches, config.lr)
        parallel.gather_weights(run.model)
        for time in range(3):
            with record_function(f"validate {time}"):
                evaluate.evaluate(pretrained, data, stage, config, world)
        with record_function("end"):
            pass
    return peaks(profiler.profiler.kineto_results.events())


def peaks(events: list) -> dict[str, int]:
    """The most bytes that are alive in a step after the first, and in a validation, of several the least."""
    marks = sorted(
        (e.start_ns(), e.name()) for e in events if e.name().partition(" ")[0] in ("train", "validate", "end")
    )
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    found, now, place = {name: 0 for _, name in marks}, 0, -1
    for time, n_bytes in records:
        while place + 1 < len(marks) and marks[place + 1][0] <= time:
            place += 1
        before, now = now, now + n_bytes
        if place >= 0:
            found[marks[place][1]] = max(found[marks[place][1]], before, now)
    training, validation = (range(1, 5), "train"), (range(3), "validate")
    least = (min(found[f"{name} {number}"] for number in numbers) for numbers, name in (training, validation))
    return dict(zip(("training", "validation"), least, strict=True))


def main(path: Path) -> int:
    world = setup_distributed()
    found = measure(Config.from_file(path), json.loads(path.with_suffix(".stage").read_text()), world)
    path.with_name(f"{path.stem}-{world.rank}.json").write_text(json.dumps(found))
    cleanup_distributed()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    exit_process(main(Path(sys.argv[1])))
