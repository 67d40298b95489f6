"""Evaluation by generation, against Hugging Face's own batched, cached generate without latents.

    python benchmarks/generate.py                   # tiny model, batches of 1, 8, 32, 128
    torchrun --nproc_per_node 2 benchmarks/generate.py --strategy fsdp

Both sides start from the same prompts of ProsQA's lengths, sorted by length, and generate as many new tokens; neither
stops at EOS. Examples a second of a rank, medians of alternate runs. Under torchrun every rank has as many prompts, and
Hugging Face's side a whole model on each.
"""

import argparse
import sys

from options import Parser


def make_parser() -> Parser:
    parser = Parser(__doc__, "model", "threads", "json", repeats=3)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="(default: %(default)s)")
    parser.add_count("--examples", 128, "prompts of each side")
    parser.add_count("--batches", [1, 8, 32, 128], "prompts at once")
    parser.add_count("--new-tokens", 64, "tokens to generate")
    parser.add_count("--stage", 6, "latents of a prompt", at_least=0)
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the slow imports below

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import MARKERS, alternate, as_loaded, machine, make_model, print_table, prosqa_rows, to_device, write_json

from coconut import Coconut
from config import Config
from curriculum import IGNORE
from dataset import collate_prompts
from trainer import parallel
from trainer.distributed import World, cleanup_distributed, exit_process, setup_distributed


def make_prompts(n: int, stage: int) -> list[list[int]]:
    """The part before the supervised tokens of ProsQA-like rows, shortest first."""
    rows = prosqa_rows(n, stage, c_thought=1)
    return sorted(([token for token, label in zip(*row, strict=True) if label == IGNORE] for row in rows), key=len)


def make_models(options: argparse.Namespace, world: World) -> tuple[Coconut, Coconut]:
    """(Hugging Face's side, ours): the same weights, ours under --strategy."""
    theirs = make_model(options.shape, options.size, world.device).eval()
    with torch.no_grad():  # no row generates EOS: its logit is 0
        theirs.base_causallm.get_output_embeddings().weight[MARKERS.end] = 0
    ours = theirs
    if options.strategy == "fsdp":
        whole = make_model(options.shape, options.size, torch.device("cpu"))
        whole.load_state_dict(theirs.state_dict())
        ours = as_loaded(whole, Config(strategy="fsdp"), world).eval()
        parallel.gather_weights(ours)  # all ranks
    ours.eos_token_id = MARKERS.end
    return theirs, ours


Side = Callable[[int], None]  # generates from all prompts, in batches of a size


def make_sides(theirs: Coconut, ours: Coconut, prompts: list[list[int]], n_new: int) -> dict[str, Side]:
    """The sides, which generate n_new tokens after each prompt."""

    def hugging_face(batch: dict) -> torch.Tensor:
        width = batch["input_ids"].shape[1]
        del batch["position_ids"]
        eos = {"pad_token_id": MARKERS.eos, "eos_token_id": MARKERS.eos}
        limits = {"max_new_tokens": n_new, "min_new_tokens": n_new}
        return theirs.base_causallm.generate(**batch, **limits, **eos, do_sample=False)[:, width:]

    def coconut(batch: dict) -> torch.Tensor:
        return ours.generate(**batch, max_new_tokens=n_new)

    def run(generate: Callable[[dict], torch.Tensor], size: int) -> None:
        for begin in range(0, len(prompts), size):
            batch = collate_prompts(prompts[begin : begin + size], MARKERS.eos)
            new = generate(to_device(batch, theirs.base_causallm.device))
            if new.shape[1] != n_new:
                raise RuntimeError(f"a side stopped after {new.shape[1]} tokens")

    return {"hugging face": partial(run, hugging_face), "coconut": partial(run, coconut)}


def make_rows(results: list[dict]) -> list[list]:
    """The table: a row for each size of batch."""
    rows = []
    for theirs, ours in zip(results[::2], results[1::2], strict=True):
        ratio = ours["examples_per_second"] / theirs["examples_per_second"]
        cpu_ratio = theirs["cpu_seconds"] / ours["cpu_seconds"]
        rows.append([ours["batch"], theirs["examples_per_second"], ours["examples_per_second"], ratio, cpu_ratio])
    return rows


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    world = setup_distributed()
    prompts = make_prompts(options.examples, options.stage)
    sides = make_sides(*make_models(options, world), prompts, options.new_tokens)
    results = []
    for size in options.batches:
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
