"""Compares one process, DDP and FSDP on the same batches: losses, final weights and generations.

    torchrun --nproc_per_node 2 benchmarks/agreement.py

Tiny models of each family train for a few steps of two micro-batches per rank. In the same step the ranks have rows
with different numbers of latents, and they generate different numbers of tokens. The single process trains on the
micro-batches of all ranks. The exit code is 1 if a difference is larger than the last column allows.
"""

import shutil
import string
import sys
import tempfile
from pathlib import Path

from options import Parser


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_count("--steps", 4, "optimizer steps per run")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # answers --help and reports mistakes before the slow imports

import numpy as np
import torch
from common import print_table
from tiny_model import RandomModel, make_tokenizer

from config import Config
from curriculum import Markers
from dataset import collate_for_device, collate_prompts, to_device
from trainer.distributed import World, cleanup_distributed, exit_process, setup_distributed
from trainer.evaluate import autocast
from trainer.parallel import gather_weights, load, sync_gradients, whole_weights, wrap

VOCABULARY = 40
TOLERANCE = {"float32": 1e-5, "bf16": 2e-2}
LATENTS = ([0, 1, 2], [3, 3, 3], [0, 0, 0], [4, 1, 0])  # of the rows of a micro-batch


def write_model(family: str, tied: bool, folder: Path) -> None:
    """Writes a Hugging Face model with large random weights: small ones make it nearly linear, which hides errors."""
    model = RandomModel(family, 32, 2, 4, positions=64, tied=tied, mlp=2, kv_heads=2).build(VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    make_tokenizer([string.ascii_letters[: VOCABULARY - 2]], "char").save_pretrained(folder)


def rows(n_latents: list[int], seed: int, markers: Markers) -> list[tuple[list[int], list[int]]]:
    """Returns an (input_ids, labels) pair per number of latents."""
    random = np.random.default_rng(seed)
    pairs = []
    for index, count in enumerate(n_latents):
        question = random.integers(1, VOCABULARY, 3 + 2 * index).tolist()
        before = [*question, markers.start, *[markers.latent] * count, markers.end]
        after = [*random.integers(1, VOCABULARY, 7 - index).tolist(), markers.eos]
        pairs.append((before + after, [-100] * len(before) + after))
    return pairs


def micro_batch(step: int, number: int, rank: int, markers: Markers) -> dict:
    n_latents = LATENTS[(step + number + rank) % len(LATENTS)]
    return collate_for_device(rows(n_latents, 100 * step + 10 * number + rank, markers), markers.eos, markers.latent)


def train(config: Config, world: World, n_steps: int, ranks: list[int]) -> tuple[list[float], dict, list]:
    """Trains on the micro-batches of `ranks`; returns (loss per step, full weights on rank 0, generations)."""
    torch.manual_seed(0)
    model, _, markers = load(config, world, None)
    wrapped = wrap(model, world)
    # not AdamW, which amplifies rounding errors of gradients near 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(n_steps):
        batches = [micro_batch(step, number, rank, markers) for number in range(2) for rank in ranks]
        total = 0.0
        for number, batch in enumerate(batches):
            batch = to_device(batch, world.device)
            with sync_gradients(wrapped, now=number + 1 == len(batches)):
                with autocast(config, world):
                    loss = wrapped(**batch).loss / len(batches)
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    gather_weights(model)  # all ranks
    model.eval()
    generations = []
    for rank in ranks:  # the number of generations depends on the rank
        for number in range(1 + 2 * rank):
            prompts = [ids[: ids.index(markers.end) + 1] for ids, _ in rows(LATENTS[number % 4], rank, markers)]
            batch = to_device(collate_prompts(prompts, markers.eos), world.device)
            with autocast(config, world):
                generations.append(model.generate(**batch, max_new_tokens=3 + 4 * rank).tolist())
    weights = whole_weights(model)  # all ranks
    return losses, {name: value.detach().cpu().clone() for name, value in weights.items()}, generations


def compare(family: str, tied: bool, precision: str, n_steps: int, world: World, folder: Path) -> list | None:
    """Returns a row of the table on rank 0, None on the others."""
    if world.is_main:
        write_model(family, tied, folder)
    torch.distributed.barrier()  # all ranks wait for rank 0's model
    base = {"model_id": str(folder), "bf16": precision == "bf16"}
    runs = {s: train(Config(strategy=s, **base), world, n_steps, [world.rank]) for s in ("ddp", "fsdp")}
    losses = torch.tensor([runs[s][0] for s in runs])
    torch.distributed.all_reduce(losses)  # all ranks
    generations: list = [None] * world.size
    torch.distributed.all_gather_object(generations, (runs["ddp"][2], runs["fsdp"][2]))  # all ranks
    if not world.is_main:
        return None
    alone = World(0, 0, 1, world.device)
    runs["one"] = train(Config(strategy="ddp", **base), alone, n_steps, list(range(world.size)))
    mean_losses = {"ddp": losses[0] / world.size, "fsdp": losses[1] / world.size, "one": torch.tensor(runs["one"][0])}

    def difference(a: str, b: str) -> float:
        """Returns the largest difference of a loss or a weight between two runs."""
        first, second = runs[a][1], runs[b][1]
        pairs = [(first[name].float(), second[name].float()) for name in first.keys() & second]
        return max((x - y).abs().max().item() for x, y in [(mean_losses[a], mean_losses[b]), *pairs])

    same = all(ddp == fsdp for ddp, fsdp in generations)
    same = same and [tokens for ddp, _ in generations for tokens in ddp] == runs["one"][2]
    largest = [difference("ddp", "one"), difference("fsdp", "one"), difference("fsdp", "ddp")]
    return [family, "tied" if tied else "untied", precision, *largest, same, TOLERANCE[precision]]


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    world = setup_distributed()
    table = []
    folder = [tempfile.mkdtemp() if world.is_main else None]
    torch.distributed.broadcast_object_list(folder)  # all ranks get rank 0's
    for family, tied in (("gpt2", True), ("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)):
        for precision in ("float32", "bf16"):
            where = Path(folder[0], f"{family}-{tied}-{precision}")
            table.append(compare(family, tied, precision, options.steps, world, where))
    cleanup_distributed()
    if not world.is_main:
        return 0
    shutil.rmtree(folder[0])
    print(f"largest difference of a loss or a weight after {options.steps} steps on {world.size} ranks")
    header = ["model", "embeddings", "precision", "ddp - one", "fsdp - one", "fsdp - ddp", "generations", "allowed"]
    cells = ([*map("{:.1e}".format, row[3:6]), "same" if row[6] else "differ", f"{row[7]:g}"] for row in table)
    print_table(header, [[*row[:3], *others] for row, others in zip(table, cells, strict=True)])
    return int(any(max(row[3:6]) > row[7] or (row[2] == "float32" and not row[6]) for row in table))


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
