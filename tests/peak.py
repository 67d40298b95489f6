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
    """Bytes at the peak of the second step, and of a validation after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        pretrained = parallel.load(config, world, None)
        gc.collect()  # under FSDP, rank 0's whole model
        data = load_data(config, world, pretrained.tokenizer)
        run = Run(config, world, pretrained, {"": data}, None, Progress())
        run.throughput = Throughput(FlopCounter.of(run.model), None)
        run.wrapped = parallel.wrap(run.model, world)
        run.optimizer = program.make_optimizer(run)
        accumulation, size = config.passes(world.size)
        batch = Batches(config, data, pretrained.markers).training(stage, size) | {"weight": 1.0}
        if run.parts.dataset.counts_loss_terms:
            batch["loss_counts"] = {"auxiliary": size}
        planned = PlannedStep([MicroBatch([0], 1.0)] * accumulation, size)
        run.wrapped.train()
        for step in range(2):
            batches = (dict(batch) for _ in range(accumulation))
            with record_function(f"train {step}"):
                program.train_step(run, planned, batches, config.lr)
        parallel.gather_weights(run.model)
        with record_function("validate"):
            evaluate.evaluate(pretrained, data, stage, config, world)
        with record_function("end"):
            pass
    return peaks(profiler.profiler.kineto_results.events())


def peaks(events: list) -> dict[str, int]:
    """The most bytes that are alive in the second step and in the validation."""
    marks = {event.name(): event.start_ns() for event in events if not event.name().startswith("[")}
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    found, now = {"train 1": 0, "validate": 0}, 0
    for time, n_bytes in records:
        before, now = now, now + n_bytes
        part = "train 1" if marks["train 1"] <= time < marks["validate"] else "validate"
        if marks["train 1"] <= time < marks["end"]:
            found[part] = max(found[part], before, now)
    return {"training": found["train 1"], "validation": found["validate"]}


def main(path: Path) -> int:
    world = setup_distributed()
    found = measure(Config.from_file(path), json.loads(path.with_suffix(".stage").read_text()), world)
    path.with_name(f"{path.stem}-{world.rank}.json").write_text(json.dumps(found))
    cleanup_distributed()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    exit_process(main(Path(sys.argv[1])))
