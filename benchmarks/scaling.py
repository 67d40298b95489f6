"""Measures scaling over ranks: tokens per second, and bytes sent per step, compared with the minimum.

    python benchmarks/scaling.py                    # 1 and 2 ranks, DDP and FSDP, tiny model, a thread each

The number of rows per rank is constant. The minimum of data parallelism on n ranks is a ring all-reduce, which sends
2 (n - 1) / n of the gradients' bytes per rank, half to reduce and half to gather: DDP sends that, and so does FSDP,
which gathers weights instead of gradients. `exposed` is the share of a step that communication adds.
"""

import argparse
import sys
from pathlib import Path

from options import ROOT, Parser, not_negative

STRATEGIES = ("ddp", "fsdp")


def make_parser() -> Parser:
    parser = Parser(__doc__, "model", "bf16", "json", repeats=5)
    parser.add_count("--batch", 8, "rows per rank")
    parser.add_count("--stage", 3, "latents", kind=not_negative)
    parser.add_count("--ranks", [1, 2], "ranks of the runs")
    parser.add_count("--accumulation", 4, "micro-batches of the step whose bytes are counted second")
    parser.add_argument("--strategy", choices=STRATEGIES, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # answers --help and reports mistakes before the slow imports

import json
import os
import subprocess
import tempfile
import time
from statistics import median

import torch
import torch.distributed as dist
from common import MARKERS, as_loaded, machine, make_model, pick_device, print_table, prosqa_rows, write_json
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from config import Config
from dataset import collate_for_device, to_device
from trainer import parallel
from trainer.distributed import World, cleanup_distributed, exit_process, setup_distributed


class Sent:
    """Counts the bytes of the tensors that collectives gather or reduce, twice for an all-reduce, which does both."""

    def __init__(self):
        self.bytes = 0
        for name in ("all_gather_single", "reduce_scatter_single"):
            original = getattr(dist, name)

            def counting(*tensors, original=original, **keys):
                given = [value for value in (*tensors, *keys.values()) if isinstance(value, torch.Tensor)]
                self.bytes += max(tensor.nbytes for tensor in given)  # the unsharded tensor
                return original(*tensors, **keys)

            setattr(dist, name, counting)

    def watch(self, wrapped: torch.nn.Module) -> None:
        if isinstance(wrapped, DistributedDataParallel):

            def hook(group, bucket):
                self.bytes += 2 * bucket.buffer().nbytes
                return allreduce_hook(group, bucket)

            wrapped.register_comm_hook(None, hook)

    def per_rank(self, n_ranks: int) -> float:
        """Returns the bytes that each rank sends in ring collectives."""
        return (n_ranks - 1) / n_ranks * self.bytes


def make_step(wrapped: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict, world: World, bf16: bool):
    """Returns step(n_micro_batches, syncs=True): it trains on the batch n_micro_batches times in one step and returns
    (seconds, those of the update of the weights). Without `syncs` the ranks neither exchange gradients nor change the
    weights."""

    def now() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(n_micro_batches: int, syncs: bool = True) -> tuple[float, float]:
        dist.barrier()  # all ranks start together
        begin = now()
        for number in range(n_micro_batches):
            with parallel.sync_gradients(wrapped, now=syncs and number + 1 == n_micro_batches):
                with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                    loss = wrapped(**batch).loss
                loss.backward()
        computed = now()
        if syncs:
            optimizer.step()
        end = now()
        optimizer.zero_grad()
        return end - begin, end - computed

    return step


def exposed(seconds: float, update: float, quiet: float) -> float:
    """Returns the share of a step's seconds that communication adds. `quiet`: the seconds of a step without
    communication and without the update of the weights, which takes `update` seconds."""
    return max(0.0, 1 - (quiet + update) / seconds)


def measure(options: argparse.Namespace) -> None:
    """Runs one rank of a measurement; rank 0 writes the numbers to --worker's file."""
    world = setup_distributed()
    whole = make_model(options.shape, options.size, torch.device("cpu"))
    n_bytes = 4 * sum(parameter.numel() for parameter in whole.parameters())
    sent = Sent()
    model = as_loaded(whole, Config(strategy=options.strategy, bf16=options.bf16), world)
    wrapped = parallel.wrap(model, world)
    sent.watch(wrapped)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    # in the same step, higher ranks have fewer latents
    rows = prosqa_rows(options.batch, max(options.stage - world.rank, 0), 1, seed=world.rank)
    batch = to_device(collate_for_device(rows, MARKERS.eos, MARKERS.latent), world.device)
    n_tokens = int(batch["attention_mask"].sum()) * world.size
    step = make_step(wrapped, optimizer, batch, world, options.bf16)
    step(1), step(1)
    results = {"ranks": world.size, "strategy": options.strategy, "parameters_bytes": n_bytes}
    for n_micro_batches in (1, options.accumulation):
        sent.bytes = 0
        step(n_micro_batches)
        results[f"sent_{n_micro_batches}"] = sent.per_rank(world.size)
    results["least"] = 2 * n_bytes * (world.size - 1) / world.size
    seconds, update = map(median, zip(*(step(1) for _ in range(options.repeats)), strict=True))
    results |= {"seconds": seconds, "tokens_per_second": n_tokens / seconds}
    if world.size > 1:
        quiet = median(step(1, syncs=False)[0] for _ in range(options.repeats))
        results["exposed"] = exposed(seconds, update, quiet)
    if world.is_main:
        options.worker.write_text(json.dumps(results))
    cleanup_distributed()


def run(ranks: int, strategy: str, arguments: list[str], folder: Path) -> dict:
    file = folder / f"{ranks}-{strategy}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    command += [*arguments, "--strategy", strategy, "--worker", str(file)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(file.read_text())


def make_row(result: dict, alone: dict | None, accumulation: int) -> list:
    """Returns a row of the table; `alone` is the result on one rank."""
    speed = result["tokens_per_second"]
    sent = (f"{result[name] / 2**20:.1f}" for name in ("sent_1", f"sent_{accumulation}", "least"))
    row = [result["ranks"], result["strategy"], result["seconds"], f"{speed:,.0f}"]
    row += [speed / alone["tokens_per_second"] if alone else "-", *sent]
    return [*row, f"{result['exposed']:.0%}" if "exposed" in result else "-"]


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    if options.worker:
        measure(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = [run(n, strategy, arguments, Path(folder)) for n in options.ranks for strategy in STRATEGIES]
    where = machine(pick_device())
    print(f"{options.shape} {options.size}, {options.batch} rows a rank, stage {options.stage}: {where}")
    header = ["ranks", "strategy", "seconds", "tokens/s", "x of 1 rank", "MiB sent, 1 micro-batch"]
    header += [f"{options.accumulation} micro-batches", "minimum", "exposed"]
    one = {result["strategy"]: result for result in results if result["ranks"] == 1}
    print_table(header, [make_row(result, one.get(result["strategy"]), options.accumulation) for result in results])
    write_json(options, where, results, hidden=("worker", "strategy"))
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
