"""Shared parts of the benchmarks: models, batches with ProsQA's lengths, timing, tables, JSON.

Machines are shared and noisy: the sides of a comparison run alternately in one process, and their medians are compared.
CPU seconds (of all threads of the process) are measured too, since other jobs distort wall-clock seconds.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from options import SIZES
from tiny_model import RandomModel

from coconut import Coconut
from config import Config
from curriculum import Markers, training_sequence
from trainer import parallel
from trainer.distributed import World
from trainer.files import write_whole
from trainer.pretrained import Pretrained
from utils import UserError, as_json, print_error

GPT2_VOCABULARY = 50257
MARKERS = Markers(GPT2_VOCABULARY, GPT2_VOCABULARY + 2, GPT2_VOCABULARY + 1, GPT2_VOCABULARY - 1)


def make_model(shape: str, size: str, device: torch.device, thought: str = "last") -> Coconut:
    """Returns a model of a family's shape and a size, with GPT-2's vocabulary and the markers."""
    layers, width, heads = SIZES[size]
    base = RandomModel(shape, width, layers, heads, tied=True, mlp=4).build(GPT2_VOCABULARY + 3, MARKERS.eos)
    return Coconut(base, MARKERS.latent, MARKERS.start, MARKERS.end, MARKERS.eos, thought).to(device)


def as_loaded(whole: Coconut, config: Config, world: World) -> Coconut:
    """Returns the model as run.py would load it from a checkpoint under the configuration's strategy."""
    with mock.patch.object(parallel, "load_model", return_value=Pretrained(whole, None, MARKERS)):
        return parallel.load(config, world, None).model


def prosqa_rows(n: int, stage: int, c_thought: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Returns (input_ids, labels) of n training rows of random tokens, with ProsQA's lengths under GPT-2's tokenizer:
    questions of 390 to 470 tokens, 3 to 5 steps of about 11, answers of 9."""
    random = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return random.integers(0, GPT2_VOCABULARY - 1, count).tolist()

    config = Config(c_thought=c_thought, max_latent_stage=6)
    rows = []
    for _ in range(n):
        steps = [words(random.integers(9, 14)) for _ in range(random.integers(3, 6))]
        rows.append(training_sequence(words(random.integers(390, 471)), steps, words(9), stage, config, MARKERS))
    return rows


def alternate(sides: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Runs the sides alternately, once to warm up and then `repeats` times; returns the median wall-clock and CPU
    seconds of each side."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, side in sides.items():
            clock, cpu = time.perf_counter(), time.process_time()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                samples[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {
        name: {
            "seconds": statistics.median(clock for clock, _ in taken),
            "cpu_seconds": statistics.median(cpu for _, cpu in taken),
        }
        for name, taken in samples.items()
    }


def machine(device: torch.device) -> dict:
    """Returns a description of the machine."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def peak_memory(device: torch.device) -> float:
    """Returns the peak memory of this process in GiB: on the GPU, or in main memory without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident("VmHWM") / 1024  # not getrusage, whose peak includes the parent process before exec


def resident(name: str) -> float:
    """Returns the main memory of this process in MiB: VmRSS, now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def print_table(header: list[str], rows: list[list]) -> None:
    """Prints right-aligned columns; floats have three decimals."""
    cells = [header] + [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


def write_json(options: argparse.Namespace, where: dict, results, hidden: tuple[str, ...] = ()) -> None:
    """Writes the file of --json, if given: the options except the hidden ones, the machine, the results."""
    if options.json is None:
        return
    chosen = {name: value for name, value in vars(options).items() if name not in ("json", *hidden)}
    content = {"options": chosen, "machine": where, "results": results}
    try:
        write_whole(options.json, as_json(content))
    except UserError as error:  # the table has been printed already
        sys.exit(print_error(error))


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
