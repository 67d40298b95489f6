"""Compares a training step of Coconut with plain fine-tuning on the same batch, LM head on supervised positions.

    python benchmarks/step.py                       # tiny model, batch 16
    python benchmarks/step.py --size small --batch 8 --repeats 3 --threads 1

Sides, each forward + backward + AdamW:
    baseline     one pass over the sequence, latents as ordinary tokens, LM head on supervised positions
    coconut      this project's step
    in parallel  Coconut with all latents in parallel, in --latent-passes passes after the first
    all logits   baseline with the LM head on all positions, as in an ordinary fine-tuning script
    no cache     the plain definition, which recomputes everything for each thought (only with --sides)
"""

import argparse
import sys

from options import Parser, not_negative

SIDES = ("baseline", "coconut", "in parallel", "all logits", "no cache")
DEFAULT_SIDES = ("baseline", "coconut", "all logits")


def make_parser() -> Parser:
    parser = Parser(__doc__, "model", "threads", "bf16", "json", repeats=7)
    parser.add_count("--batch", 16, "rows")
    parser.add_count("--stages", [0, 3, 6], "stages", kind=not_negative)
    parser.add_count("--c-thought", 1, "latents per stage")
    parser.add_count("--latent-passes", 3, "of the side 'in parallel'")
    parser.add_argument("--compile", action="store_true", help="compile the decoder blocks of all sides")
    text = "sides beside the baseline (default: coconut and all logits)"
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES, help=text)
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, which needs a process per side")
    parser.add_argument("--sync-debug", action="store_true", help="fail if a step synchronises with the GPU")
    parser.add_argument("--memory-of", choices=SIDES, default=None, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # answers --help and reports mistakes before the slow imports

import subprocess
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import (
    MARKERS,
    alternate,
    machine,
    make_model,
    peak_memory,
    pick_device,
    print_table,
    prosqa_rows,
    write_json,
)

from coconut import Coconut
from config import Config
from dataset import collate_for_device, to_device
from methods.parallel_latents import ParallelLatents
from model.layout import column_of, last_attended
from trainer import parallel


def baseline_loss(model: Coconut, batch: dict) -> torch.Tensor:
    hidden = model.backbone.span(
        model.backbone.embed(batch["input_ids"]), batch["attention_mask"], batch["position_ids"], False, None
    )
    return model._loss(hidden, batch["labels"], batch["supervised"])


def all_logits_loss(model: Coconut, batch: dict) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "position_ids")
    logits = model.base_causallm(**{name: batch[name] for name in names}, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def no_cache_loss(model: Coconut, batch: dict) -> torch.Tensor:
    embeds = model.backbone.embed(batch["input_ids"])
    mask, positions = batch["attention_mask"], batch["position_ids"]
    for column in batch["latent_columns"]:
        hidden = model.backbone.span(embeds[:, :column], mask[:, :column], positions[:, :column], True, None)
        is_latent = batch["input_ids"][:, column, None, None] == MARKERS.latent
        thought = column_of(hidden, last_attended(mask[:, :column]))
        filled = torch.where(is_latent, thought, embeds[:, column : column + 1])
        embeds = torch.cat([embeds[:, :column], filled, embeds[:, column + 1 :]], dim=1)
    return model._loss(model.backbone.span(embeds, mask, positions, True, None), batch["labels"], batch["supervised"])


def passes_of(side: str, n_latents: int, latent_passes: int) -> int:
    """Returns the number of sequential forward passes."""
    passes = {"coconut": n_latents, "no cache": n_latents, "in parallel": latent_passes * bool(n_latents)}
    return 1 + passes.get(side, 0)


def make_sides(options: argparse.Namespace, stage: int, names: list[str]) -> dict[str, Callable[[], None]]:
    """Returns the sides: functions that make one step each, with a shared model and optimizer."""
    device = pick_device()
    model = make_model(options.shape, options.size, device)
    parallel.wrap_blocks(model, Config(compile=options.compile))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    ids = (MARKERS.latent, MARKERS.start, MARKERS.end, MARKERS.eos)
    in_parallel = ParallelLatents(model.base_causallm, *ids, latent_passes=options.latent_passes)
    rows = prosqa_rows(options.batch, stage, options.c_thought)
    batch = to_device(collate_for_device(rows, MARKERS.eos, MARKERS.latent), device)
    unaligned = to_device(collate_for_device(rows, MARKERS.eos, None), device)  # right-padded only
    losses = {
        "baseline": lambda: baseline_loss(model, unaligned),
        "coconut": lambda: model(**batch).loss,
        "in parallel": lambda: in_parallel(**batch).loss,
        "all logits": lambda: all_logits_loss(model, unaligned),
        "no cache": lambda: no_cache_loss(model, batch),
    }

    def step(loss: Callable[[], torch.Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {name: lambda loss=losses[name]: step(loss) for name in names}


def memory_of(arguments: list[str], stage: int, side: str) -> float:
    """Returns the peak GiB of a process that makes two steps of one side only."""
    command = [sys.executable, __file__, *arguments, "--stages", str(stage), "--memory-of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check_synchronisation(side: Callable[[], None]) -> None:
    """Raises RuntimeError if a step after the first synchronises with the GPU."""
    side()
    torch.cuda.set_sync_debug_mode("error")
    side()
    torch.cuda.set_sync_debug_mode("default")


def report_memory(options: argparse.Namespace) -> None:
    (step,) = make_sides(options, options.stages[0], [options.memory_of]).values()
    for _ in range(2):
        step()
    print(peak_memory(pick_device()))


def add_ratios(results: list[dict]) -> list[list]:
    """Adds to each result its ratios to the baseline of its stage; returns the rows of the table."""
    baselines = {result["stage"]: result for result in results if result["side"] == "baseline"}
    rows = []
    for result in results:
        cells = [result["stage"], result["side"], result["passes"]]
        for name in ("seconds", "cpu_seconds", "peak_gib"):
            known = result[name] is not None
            result[f"{name}_ratio"] = result[name] / baselines[result["stage"]][name] if known else None
            cells += [result[name], result[f"{name}_ratio"]] if known else ["-", "-"]
        rows.append(cells)
    return rows


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(options)
        return 0
    names = [name for name in SIDES if name == "baseline" or name in options.sides]
    results = []
    for stage in options.stages:
        sides = make_sides(options, stage, names)
        if options.sync_debug and torch.cuda.is_available():
            check_synchronisation(sides["coconut"])
        medians = alternate(sides, options.repeats, pick_device())
        for name in names:
            memory = None if options.no_memory else memory_of(arguments, stage, name)
            passes = passes_of(name, stage * options.c_thought, options.latent_passes)
            results.append({"stage": stage, "side": name, "passes": passes, "peak_gib": memory, **medians[name]})
    rows, where = add_ratios(results), machine(pick_device())
    print(f"{options.shape} {options.size}, batch {options.batch}, c_thought {options.c_thought}: {where}")
    print_table(["stage", "side", "passes", "seconds", "ratio", "CPU s", "ratio", "peak GiB", "ratio"], rows)
    write_json(options, where, results, hidden=("memory_of",))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
