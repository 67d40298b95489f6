"""Counts the training FLOPs of each run of a grid: torch counts the forward and backward passes of a few batches.

    python experiments/flops.py experiments/ladder_machine.yaml

Unlike `grid.py --dry-run`, which counts the tokens of Coconut's sequences, this includes a method's further passes,
sequences and models, and padding. The last column is the max_train_examples at which a run costs as much as the first.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from grid import make_data
from grid_file import read_grid
from jobs import Job, jobs_of

from curriculum import stage_of_step
from preprocessing.examples import load_examples
from trainer.commands import command, make_parser
from utils import UserError, print_result

STEPS = 40  # optimizer steps of an epoch, of which only the stages count
SAMPLE = 64  # examples that are counted at each stage, as a sample of all


def training_flops(job: Job, sample: int = SAMPLE) -> float:
    """Returns the FLOPs of all epochs of a job, without validation; they do not depend on its initial weights. Raises
    UserError for a method that generates answers in training."""
    import torch  # takes seconds: after the check of the grid
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from dataset import MicroBatch
    from trainer.data import load_data
    from trainer.distributed import World
    from trainer.pretrained import load_model, parts_of

    if job.config.rules.generates:
        raise UserError(f"run {job.run!r}: the FLOPs of {job.config.method} depend on the answers that it samples")
    config = replace(job.config, load_model_path=None, from_scratch=True)
    model, tokenizer, markers = load_model(config, None)
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    data = load_data(replace(config, max_eval_examples=1), world, tokenizer)
    examples = parts_of(config).dataset(data.train, config, markers, config.resume)
    sample = min(sample, len(data.train))
    size, total = min(config.batch_size_training, sample), 0
    epochs = range(config.resume, config.num_epochs)
    # a method's stages may change within an epoch
    stages = Counter(stage_of_step(config, epoch, step, STEPS) for epoch in epochs for step in range(STEPS))
    for stage, n_steps in stages.items():
        for begin in range(0, sample, size):
            batch = examples.micro_batch(MicroBatch(list(range(begin, min(begin + size, sample))), 1.0), stage)
            arguments = {name: value for name, value in batch.items() if name not in ("weight", "loss_counts")}
            # the math backend: torch does not count the FLOPs of the CPU's fused attention kernel
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                output = model(**arguments)
                (output.loss + (0 if output.auxiliary is None else output.auxiliary)).backward()
            total += n_steps / STEPS * counter.get_total_flops()
    return total * len(data.train) / sample


def as_text(jobs: list[Job], flops: list[float]) -> str:
    """Returns a line per run: FLOPs, their ratio to the first run's, and the examples for the first run's FLOPs."""
    lines = [f"{'run':20} {'FLOPs':>9} {'ratio':>6} {'epochs':>6} {'examples':>9} {'equal at':>9}"]
    for job, found in zip(jobs, flops, strict=True):
        epochs = job.config.num_epochs - job.config.resume
        n = len(load_examples(job.config.train_path, job.config.max_train_examples))
        ratio = found / flops[0]
        lines.append(f"{job.run:20} {found:9.3g} {ratio:6.2f} {epochs:6} {n:9} {n / ratio:9.0f}")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("grid", type=Path, help="a YAML file of experiments/")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these runs, compared with the first")
    options = parser.parse_args(arguments)
    grid = read_grid(options.grid)
    make_data(grid)
    jobs = [job for job in jobs_of(grid, options.only, [0], ()) if job.run in grid.runs]
    print_result(as_text(jobs, [training_flops(job) for job in jobs]))


if __name__ == "__main__":
    sys.exit(main())
