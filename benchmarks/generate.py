"""Evaluation by generation, against Hugging Face's own batched, cached generate without latents.

    python benchmarks/generate.py                   # tiny model, batches of 1, 8, 32, 128
    torchrun --nproc_per_node 2 benchmarks/generate.py --strategy fsdp

Both sides start from the same prompts of ProsQA's lengths, sorted by length, and write as many new tokens; EOS is kept
from coming, so that neither stops early. Examples a second of a rank, medians of alternate runs. Under torchrun every
rank has as many prompts, and Hugging Face's side a whole model on each.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from common import MARKERS, alternate, machine, make_model, print_table, prosqa_rows, write_json

import parallel
from config import Config
from curriculum import IGNORE
from dataset import collate_prompts
from ranks import cleanup_distributed, leave, setup_distributed


def make_prompts(n: int, stage: int) -> list[list[int]]:
    """The part before the supervised tokens of ProsQA-like rows, shortest first."""
    rows = prosqa_rows(n, stage, c_thought=1)
    return sorted(([token for token, label in zip(*row, strict=True) if label == IGNORE] for row in rows), key=len)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["gpt2", "llama", "qwen2"], default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--size", choices=["tiny", "small"], default="tiny", help="(default: %(default)s)")
    parser.add_argument("--examples", type=int, default=128, help="prompts of each side (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="(default: %(default)s)")
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to write (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=6, help="latents of a prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    world = setup_distributed()
    device = world.device
    theirs = make_model(options.shape, options.size, device).eval()
    with torch.no_grad():  # no row says EOS: its embedding, and with tied weights its logit, points away
        theirs.base_causallm.get_output_embeddings().weight[MARKERS.end] = 0
    model = theirs
    if options.strategy == "fsdp":
        whole = make_model(options.shape, options.size, torch.device("cpu"))
        whole.load_state_dict(theirs.state_dict())
        parallel.load_model = lambda *_: (whole, None, MARKERS)
        model = parallel.load(Config(strategy="fsdp"), world, None)[0].eval()
        parallel.gather_weights(model)  # all ranks
    model.eos_token_id = MARKERS.end
    prompts = make_prompts(options.examples, options.stage)

    def run(size: int, latent: bool) -> None:
        for begin in range(0, len(prompts), size):
            batch = collate_prompts(prompts[begin : begin + size], MARKERS.eos)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            if latent:
                new = model.generate(**batch, max_new_tokens=options.new_tokens)
            else:
                del batch["position_ids"]
                new = theirs.base_causallm.generate(
                    **batch,
                    max_new_tokens=options.new_tokens,
                    min_new_tokens=options.new_tokens,
                    do_sample=False,
                    pad_token_id=MARKERS.eos,
                    eos_token_id=MARKERS.eos,
                )[:, batch["input_ids"].shape[1] :]
            if new.shape[1] != options.new_tokens:
                raise RuntimeError(f"a side stopped after {new.shape[1]} tokens: the comparison would not be fair")

    results = []
    for size in options.batches:
        sides = {"hugging face": lambda size=size: run(size, False), "coconut": lambda size=size: run(size, True)}
        for name, medians in alternate(sides, options.repeats, device).items():
            results.append(
                {"batch": size, "side": name, **medians, "examples_per_second": options.examples / medians["seconds"]}
            )
    padding = 1 - np.mean([len(prompt) for prompt in prompts]) / max(map(len, prompts))
    cleanup_distributed()
    if not world.is_main:
        return 0
    where = f"{world.size} x {options.strategy}, {machine(device)}"
    print(f"{options.shape} {options.size}, {options.new_tokens} new tokens, {padding:.1%} padding: {where}")
    rows = []
    for theirs, ours in zip(results[::2], results[1::2], strict=True):
        ratio = ours["examples_per_second"] / theirs["examples_per_second"]
        cpu_ratio = theirs["cpu_seconds"] / ours["cpu_seconds"]
        rows.append([ours["batch"], theirs["examples_per_second"], ours["examples_per_second"], ratio, cpu_ratio])
    print_table(["batch", "hugging face /s", "coconut /s", "ratio", "ratio of CPU time"], rows)
    chosen = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"options": chosen, "machine": machine(device), "results": results})
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
