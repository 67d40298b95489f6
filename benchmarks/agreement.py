"""One process, DDP and FSDP on the same batches: losses, final weights and generations beside each other.

    torchrun --nproc_per_node 2 benchmarks/agreement.py

Tiny models of each family train for some steps of two micro-batches a rank. The ranks' rows have different numbers of
latents in the same step, and their generations end after different numbers of tokens. One process has the micro-batches
of all ranks. Exits with 1 where a difference is larger than the last column allows.
"""

import sys
import tempfile
from pathlib import Path

from options import Parser


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_count("--steps", 4, "optimizer steps of each run")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the slow imports below

import numpy as np
import torch
from common import print_table, to_device
from random_model import RandomModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from config import Config
from curriculum import Markers
from dataset import collate_for_device, collate_prompts
from trainer.distributed import World, cleanup_distributed, exit_process, on_main_rank, setup_distributed
from trainer.evaluate import autocast
from trainer.parallel import gather_weights, load, sync_gradients, whole_weights, wrap

VOCABULARY = 40
TOLERANCE = {"float32": 1e-5, "bf16": 2e-2}
LATENTS = ([0, 1, 2], [3, 3, 3], [0, 0, 0], [4, 1, 0])  # of the rows of a micro-batch


def write_model(family: str, tied: bool, folder: Path) -> None:
    """A Hugging Face folder with large random weights: small ones make a nearly linear model, which hides mistakes."""
    model = RandomModel(family, 32, 2, 4, positions=64, tied=tied, mlp=2, kv_heads=2).build(VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    words = {"<eos>": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def rows(n_latents: list[int], seed: int, markers: Markers) -> list[tuple[list[int], list[int]]]:
    """One (input_ids, labels) pair for each number of latents."""
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
    """(losses of the steps, whole weights on rank 0, generations) of training on the micro-batches of `ranks`."""
    torch.manual_seed(0)
    model, _, markers = load(config, world, None)
    wrapped = wrap(model, world)
    # AdamW would amplify rounding where a gradient is nearly 0
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
    for rank in ranks:  # ranks make different numbers of passes
        for number in range(1 + 2 * rank):
            prompts = [ids[: ids.index(markers.end) + 1] for ids, _ in rows(LATENTS[number % 4], rank, markers)]
            batch = to_device(collate_prompts(prompts, markers.eos), world.device)
            with autocast(config, world):
                generations.append(model.generate(**batch, max_new_tokens=3 + 4 * rank).tolist())
    weights = whole_weights(model)  # all ranks
    return losses, {name: value.detach().cpu().clone() for name, value in weights.items()}, generations


def compare(family: str, tied: bool, precision: str, n_steps: int, world: World, folder: Path) -> list:
    """A row of the table, the same on every rank."""
    if world.is_main:
        write_model(family, tied, folder)
    on_main_rank(world, lambda: None)  # all ranks: the model is there
    base = {"model_id": str(folder), "bf16": precision == "bf16"}
    runs = {s: train(Config(strategy=s, **base), world, n_steps, [world.rank]) for s in ("ddp", "fsdp")}
    alone = World(0, 0, 1, world.device)
    everyone = list(range(world.size))
    one = train(Config(strategy="ddp", **base), alone, n_steps, everyone) if world.is_main else None

    def difference(a: tuple, b: tuple) -> float:
        return max((a[1][name].float() - b[1][name].float()).abs().max().item() for name in a[1].keys() & b[1].keys())

    torch.distributed.all_reduce(shares := torch.tensor([runs[s][0] for s in ("ddp", "fsdp")]))  # all ranks
    theirs: list = [None] * world.size
    torch.distributed.all_gather_object(theirs, (runs["ddp"][2], runs["fsdp"][2]))  # all ranks

    def make_row() -> list:
        losses = {"ddp": shares[0] / world.size, "fsdp": shares[1] / world.size, "one": torch.tensor(one[0])}
        same = all(ddp == fsdp for ddp, fsdp in theirs) and [g for ddp, _ in theirs for g in ddp] == one[2]
        each = {**runs, "one": one}
        largest = [
            max((losses[a] - losses[b]).abs().max().item(), difference(each[a], each[b]))
            for a, b in (("ddp", "one"), ("fsdp", "one"), ("fsdp", "ddp"))
        ]
        tied_name = "tied" if tied else "untied"
        return [family, tied_name, precision, *largest, "same" if same else "differ", TOLERANCE[precision]]

    return on_main_rank(world, make_row)


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    world = setup_distributed()
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for family, tied in (("gpt2", True), ("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)):
            for precision in ("float32", "bf16"):
                folder = Path(on_main_rank(world, lambda: temporary)) / f"{family}-{tied}-{precision}"
                table.append(compare(family, tied, precision, options.steps, world, folder))
    failed = world.is_main and any(
        max(row[3:6]) > row[-1] or (row[2] == "float32" and row[6] != "same") for row in table
    )
    if world.is_main:
        print(f"largest difference of a loss or a weight after {options.steps} steps on {world.size} ranks")
        header = ["model", "embeddings", "precision", "ddp - one", "fsdp - one", "fsdp - ddp", "generations", "allowed"]
        print_table(header, [[*row[:3], *(f"{v:.1e}" for v in row[3:6]), row[6], f"{row[7]:g}"] for row in table])
    cleanup_distributed()
    return int(failed)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
