"""Compares generation of Coconut with Hugging Face's own batched, cached generate without latents.

    python benchmarks/generate.py                   # tiny model, batches of 1, 8, 32, 128
    torchrun --nproc_per_node 2 benchmarks/generate.py --strategy fsdp

Both sides start from the same prompts with ProsQA's lengths, sorted by length, generate the same number of tokens, and
ignore EOS. The table has examples per second and rank, medians of alternate runs. Under torchrun each rank generates
from all prompts, and Hugging Face's side has a full model on each.
"""

import argparse
import sys

from options import Parser, not_negative


def make_parser() -> Parser:
    parser = Parser(__doc__, "model", "threads", "json", repeats=3)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="(default: %(default)s)")
    parser.add_count("--examples", 128, "prompts per side")
    parser.add_count("--batches", [1, 8, 32, 128], "prompts per batch")
    parser.add_count("--new-tokens", 64, "tokens to generate")
    parser.add_count("--stage", 6, "latents per prompt", kind=not_negative)
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # answers --help and reports mistakes before the slow imports

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import MARKERS, alternate, as_loaded, machine, make_model, print_table, prosqa_rows, write_json

from coconut import Coconut
from config import Config
from curriculum import IGNORE
from dataset import collate_prompts, to_device
from trainer import parallel
from trainer.distributed import World, cleanup_distributed, exit_process, setup_distributed


def make_prompts(n: int, stage: int) -> list[list[int]]:
    """Returns the unsupervised beginnings of n rows with ProsQA's lengths, shortest first."""
    rows = prosqa_rows(n, stage, c_thought=1)
    return sorted(([token for token, label in zip(*row, strict=True) if label == IGNORE] for row in rows), key=len)


def make_models(options: argparse.Namespace, world: World) -> tuple[Coconut, Coconut]:
    """Returns two models with the same weights: a full one for Hugging Face's side, one under --strategy for ours."""
    full = make_model(options.shape, options.size, world.device).eval()
    with torch.no_grad():  # no row generates the token that stands for EOS here: its logit is 0
        full.base_causallm.get_output_embeddings().weight[MARKERS.end] = 0
    model = full
    if options.strategy == "fsdp":
        model = make_model(options.shape, options.size, torch.device("cpu"))
        model.load_state_dict(full.state_dict())
        model = as_loaded(model, Config(strategy="fsdp"), world).eval()
        parallel.gather_weights(model)  # all ranks
    model.eos_token_id = MARKERS.end
    return full, model


def make_sides(full: Coconut, model: Coconut, prompts: list[list[int]], n_new: int) -> dict[str, Callable[[int], None]]:
    """Returns the sides: functions that generate n_new tokens from all prompts, in batches of the given size."""

    def hugging_face(batch: dict) -> torch.Tensor:
        width = batch["input_ids"].shape[1]
        del batch["position_ids"]
        eos = {"pad_token_id": MARKERS.eos, "eos_token_id": MARKERS.eos}
        limits = {"max_new_tokens": n_new, "min_new_tokens": n_new}
        return full.base_causallm.generate(**batch, **limits, **eos, do_sample=False)[:, width:]

    def coconut(batch: dict) -> torch.Tensor:
        return model.generate(**batch, max_new_tokens=n_new)

    def run(generate: Callable[[dict], torch.Tensor], size: int) -> None:
        for begin in range(0, len(prompts), size):
            batch = collate_prompts(prompts[begin : begin + size], MARKERS.eos)
            new = generate(to_device(batch, full.base_causallm.device))
            if new.shape[1] != n_new:
                raise RuntimeError(f"a side stopped after {new.shape[1]} tokens")

    return {"hugging face": partial(run, hugging_face), "coconut": partial(run, coconut)}


def make_rows(results: list[dict]) -> list[list]:
    """Returns the rows of the table, one per batch size."""
    rows = []
    for hugging_face, coconut in zip(results[::2], results[1::2], strict=True):
        speeds = [side["examples_per_second"] for side in (hugging_face, coconut)]
        cpu_ratio = hugging_face["cpu_seconds"] / coconut["cpu_seconds"]
        rows.append([coconut["batch"], *speeds, speeds[1] / speeds[0], cpu_ratio])
    return rows


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    world = setup_distributed()
    prompts = make_prompts(options.examples, options.stage)
    sides = make_sides(*make_models(options, world), prompts, options.new_tokens)
    results = []
    for size in sorted({min(size, options.examples) for size in options.batches}):
        runs = {name: partial(side, size) for name, side in sides.items()}
        for name, medians in alternate(runs, options.repeats, world.device).items():
            speed = options.examples / medians["seconds"]
            results.append({"batch": size, "side": name, **medians, "examples_per_second": speed})
    cleanup_distributed()
    if not world.is_main:
        return 0
    padding = 1 - np.mean([len(prompt) for prompt in prompts]) / max(map(len, prompts))
    where = machine(world.device)
    print(
        f"{options.shape} {options.size}, {options.new_tokens} new tokens, {padding:.1%} padding: "
        f"{world.size} x {options.strategy}, {where}"
    )
    print_table(["batch", "hugging face /s", "coconut /s", "ratio", "ratio of CPU time"], make_rows(results))
    write_json(options, where, results)
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
