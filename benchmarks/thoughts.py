"""Measures the costs of each kind of thought: seconds and peak memory of training and generation, at GPT-2's size.

    python benchmarks/thoughts.py                            # ten minutes of one core; results/thoughts_costs.md, .json
    python benchmarks/thoughts.py --only last realigned --size tiny --out /tmp

experiments/thoughts.yaml measures their accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from options import ROOT, SIZES, Parser

from trainer.files import write_whole
from utils import as_json

# the other thoughts combine these
THOUGHTS = ("last", "layer:-2", "suppressed", "normalised", "projected", "realigned", "pause")


def measure(thought: str, generates: bool, size: str) -> dict[str, float]:
    """Returns the CPU seconds of a forward and backward pass, or of a generation, and this process's peak memory."""
    import torch
    from common import MARKERS, alternate, make_model, peak_memory, prosqa_rows

    from dataset import collate_for_device, collate_prompts

    model = make_model("gpt2", size, torch.device("cpu"), thought)
    rows = prosqa_rows(2, stage=6, c_thought=1)
    batch = collate_for_device(rows, MARKERS.eos, MARKERS.latent)
    prompts = collate_prompts([ids[: ids.index(MARKERS.end) + 1] for ids, _ in rows], MARKERS.eos)

    def train_pass() -> None:
        model(**batch).loss.backward()

    def generation() -> None:
        model.generate(**prompts, max_new_tokens=8)

    medians = alternate({"side": generation if generates else train_pass}, 2, torch.device("cpu"))["side"]
    return {"seconds": medians["cpu_seconds"], "peak_gib": peak_memory(torch.device("cpu"))}


def measure_all(thoughts: list[str], size: str) -> dict[str, dict[str, float]]:
    """Returns thought -> costs; a process per measurement, so that peak memory is its own."""
    costs: dict[str, dict[str, float]] = {}
    for thought in thoughts:
        costs[thought] = {}
        for prefix, flags in (("", []), ("generation_", ["--generation"])):
            command = [sys.executable, __file__, "--cost-of", thought, "--size", size, *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            costs[thought] |= {prefix + name: value for name, value in found.items()}
        print(thought, costs[thought], flush=True)
    return costs


def as_text(costs: dict[str, dict[str, float]], size: str) -> str:
    """Returns the text of results/thoughts_costs.md."""
    layers, width, _ = SIZES[size]
    lines = [
        "# What thoughts cost",
        "",
        "    python benchmarks/thoughts.py" + (f" --size {size}" if size != "small" else ""),
        "",
        f"CPU seconds, and the peak memory of the process in GiB, of a forward and backward pass of a model of GPT-2's "
        f"shape ({layers} layers, width {width}) and of a generation of 8 tokens: 2 rows of about 470 tokens with six "
        f"latents, one core, float32.",
        "",
        "| thought | training | memory | generation | memory |",
        "|---|---|---|---|---|",
    ]
    for thought, cost in costs.items():
        names = ("seconds", "peak_gib", "generation_seconds", "generation_peak_gib")
        lines.append(f"| `{thought}` | {' | '.join(f'{cost[name]:.2f}' for name in names)} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {packages}, {platform.machine()}, CPU.", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=THOUGHTS, default=list(THOUGHTS), help="(default: all)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the table (default: results/)")
    parser.add_argument("--cost-of", metavar="THOUGHT", help=argparse.SUPPRESS)
    parser.add_argument("--generation", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cost_of:
        print(json.dumps(measure(options.cost_of, options.generation, options.size)))
        return 0
    costs = measure_all(options.only, options.size)
    write_whole(options.out / "thoughts_costs.json", as_json(costs))
    write_whole(options.out / "thoughts_costs.md", as_text(costs, options.size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
