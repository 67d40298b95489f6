"""Costs of the data: tokenizing, a second start, the first batch of an epoch, memory, padding, waiting for the loader.

    python benchmarks/data.py                       # generated ProsQA, and 385,620 generated rows of GSM8K's lengths
    python benchmarks/data.py --quick               # a tenth of it

The tokenizer is a byte-level BPE trained on the data, or that of --model.
"""

import argparse
import sys

from options import ROOT, Parser


def make_parser() -> Parser:
    parser = Parser(__doc__, "json", repeats=3)
    parser.add_argument("--model", help="whose tokenizer (default: one trained on the data)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the examples")
    parser.add_count("--steps", 20, "training steps of each order")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the slow imports below

import gc
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import prosqa
import torch
from common import MARKERS, alternate, machine, make_model, pick_device, print_table, to_device, write_json
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from config import Config
from dataset import EpochPlan, StageDataset, batches_of, example_order
from preprocessing.examples import load_examples
from preprocessing.tokens import Tokens, cache_tokens, tokenize
from trainer.data import sequence_lengths

GSM8K_EXAMPLES, PROSQA_EXAMPLES = 385_620, 17_886  # of the training sets
MEASURE_MEMORY = """
import re, sys
from pathlib import Path
import torch, transformers
def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
import dataset
from preprocessing.tokens import Tokens, cache_tokens
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
tokenizer(["warm"] * 1000)
before = resident("VmRSS")
folder = cache_tokens(sys.argv[1], tokenizer, Path(sys.argv[3]), show_progress=False)
tokens = Tokens.open(folder)
order = dataset.example_order(len(tokens), dataset.Config(), 0)
plan = dataset.EpochPlan(order, dataset.Config(), 0, 1)
for index in order[:5000]:
    tokens[index]
print(before, resident("VmRSS"), resident("VmHWM"))
"""


def gsm_like(n: int, seed: int = 0) -> list[dict]:
    """Examples of about GSM8K's lengths: questions of 45 words, 1 to 6 steps."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in random.integers(2, 9, 4000)]
    examples = []
    for length, n_steps in zip(random.integers(20, 71, n), random.integers(1, 7, n), strict=True):
        a, b = random.integers(1, 900, (2, n_steps)).tolist()
        steps = [f"<<{x}*{y}={x * y}>>" for x, y in zip(a, b, strict=True)]
        question = " ".join(words[i] for i in random.integers(0, len(words), length))
        examples.append({"question": question, "steps": steps, "answer": str(a[-1] * b[-1])})
    return examples


def make_tokenizer(path: Path, folder: Path) -> Path:
    """A folder with a byte-level BPE of the file's texts."""
    bpe = ByteLevelBPETokenizer()
    texts = (text for e in load_examples(path, 5000) for text in (e["question"], *e["steps"]))
    bpe.train_from_iterator(texts, vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def tokenizing(path: Path, tokenizer, cache: Path, repeats: int) -> dict:
    """Seconds to tokenize a file beside the tokenizer's own for the same texts in one batch, and to start again."""
    examples = load_examples(path)
    texts = [t for e in examples for t in (e["question"] + "\n", *(s + "\n" for s in e["steps"]), "### " + e["answer"])]
    sides = {"tokenizer": lambda: tokenizer(texts), "ours": lambda: tokenize(examples, tokenizer)}
    medians = alternate(sides, repeats, torch.device("cpu"))
    cache_tokens(str(path), tokenizer, cache, show_progress=False)
    begin = time.perf_counter()
    Tokens.open(cache_tokens(str(path), tokenizer, cache, show_progress=False))
    again = time.perf_counter() - begin
    return {
        "examples": len(examples),
        "tokenizer_seconds": medians["tokenizer"]["seconds"],
        "our_seconds": medians["ours"]["seconds"],
        "ratio": medians["ours"]["seconds"] / medians["tokenizer"]["seconds"],
        "second_start_seconds": again,
    }


def batches(tokens: Tokens, config: Config, stage: int, order: np.ndarray) -> AbstractContextManager[Iterator[dict]]:
    """A rank's batches of an epoch, as run.py has them."""
    plan = EpochPlan(order, config, 0, 1)
    return batches_of(StageDataset(tokens, config, MARKERS, epoch=0), plan, [stage] * len(plan))


def first_batch(cache: Path) -> float:
    """Seconds from open tokens to an epoch's first batch, the longest of some stages."""
    tokens, config, seconds = Tokens.open(cache), Config(uniform_prob=0.3), []
    for stage in (0, 3, 7):
        gc.collect()  # a full collection, by chance in here, would take longer than the batch
        begin = time.perf_counter()
        with batches(tokens, config, stage, example_order(len(tokens), config, 0)) as loader:
            next(loader)
            seconds.append(time.perf_counter() - begin)
    return max(seconds)


def batch_seconds(tokens: Tokens, stage: int = 3, n_batches: int = 50) -> float:
    """Median seconds in which a batch of 32 rows is made, by nobody but the thread that makes it."""
    config = Config(uniform_prob=0.3)
    dataset, plan = StageDataset(tokens, config, MARKERS, epoch=0), EpochPlan(np.arange(len(tokens)), config, 0, 1)
    seconds = []
    for step in range(min(n_batches, len(plan) - 1)):
        begin = time.perf_counter()
        dataset.micro_batch(plan[step].micro_batches[0], stage)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def memory(path: Path, tokenizer_folder: Path, cache: Path) -> dict[str, float]:
    """MiB in processes of their own: above an interpreter with torch and a tokenizer, that of the rank that tokenizes
    and that of one that finds the tokens; and at most while tokenizing, all in all."""
    command = [sys.executable, "-c", MEASURE_MEMORY, str(path), str(tokenizer_folder), str(cache)]

    def run() -> list[float]:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        return [float(number) for number in done.stdout.split()]

    (before, after, peak), (other_before, other_after, _) = run(), run()
    return {"mib_tokenizing_rank": after - before, "mib_other_rank": other_after - other_before, "mib_peak": peak}


def padding(tokens: Tokens, grouped: bool, stage: int = 3) -> float:
    """Share of padding in the passes of an epoch, 32 rows each."""
    config = Config(batch_size_training=32, global_batch_size=128)
    lengths = sequence_lengths(tokens, config, stage)
    order = example_order(len(tokens), config, 0, lengths if grouped else None)
    passes = [lengths[m.indices] for step in EpochPlan(order, config, 0, 1) for m in step.micro_batches]
    return 1 - sum(p.sum() for p in passes) / sum(p.max() * len(p) for p in passes)


def steps_per_order(tokens: Tokens, n_steps: int, device: torch.device) -> dict:
    """Seconds of a step of a tiny model, random order and grouped by length, alternately; and the share of it spent
    waiting for a batch."""
    config = Config(batch_size_training=16, gradient_accumulation_steps=1)
    lengths, stage = sequence_lengths(tokens, config, 3), 3
    model = make_model("gpt2", "tiny", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: dict) -> None:
        batch.pop("weight")
        model(**to_device(batch, device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    orders = {
        "random": example_order(len(tokens), config, 0),
        "grouped": example_order(len(tokens), config, 0, lengths),
    }
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    waits: list[float] = []
    with ExitStack() as stack:
        loaders = {n: stack.enter_context(batches(tokens, config, stage, order)) for n, order in orders.items()}
        for loader in loaders.values():
            step(next(loader))
        for _ in range(n_steps):
            for name, loader in loaders.items():
                begin = time.perf_counter()
                batch = next(loader)
                waits.append(time.perf_counter() - begin)
                step(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begin)
    total = sum(map(sum, seconds.values()))
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    return {**means, "ratio": means["grouped"] / means["random"], "loader_wait": sum(waits) / total}


def write_files(folder: Path, share: float) -> dict[str, Path]:
    """Name -> data file, of that share of the examples."""
    files = {"ProsQA": folder / "prosqa.json", "GSM8K-like": folder / "gsm.json"}
    splits = prosqa.make_splits({"train": int(PROSQA_EXAMPLES * share)}, prosqa.Settings(), 0)
    files["ProsQA"].write_text(json.dumps(splits["train"]))
    files["GSM8K-like"].write_text(json.dumps(gsm_like(int(GSM8K_EXAMPLES * share))))
    return files


def measure(path: Path, options: argparse.Namespace, repeats: int, device: torch.device) -> dict:
    """All that is measured on one data file."""
    folder = path.parent
    where = options.model or make_tokenizer(path, folder / f"{path.stem}_tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(where)
    row = memory(path, where, folder / "one")
    row |= tokenizing(path, tokenizer, folder / "cache", repeats)
    cache = cache_tokens(str(path), tokenizer, folder / "cache", show_progress=False)
    tokens = Tokens.open(cache)
    row |= {"first_batch": first_batch(cache), "batch_ms": 1000 * batch_seconds(tokens)}
    row |= {"padding_random": padding(tokens, False), "padding_grouped": padding(tokens, True)}
    row["step"] = steps_per_order(tokens, options.steps, device)
    return row


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    device = pick_device()
    where = machine(device)
    print(where, flush=True)
    with tempfile.TemporaryDirectory() as place:
        files = write_files(Path(place), 0.1 if options.quick else 1.0)
        results = {
            name: measure(path, options, options.repeats if name == "ProsQA" else 1, device)
            for name, path in files.items()
        }
    print_results(results)
    write_json(options, where, results)
    return 0


def print_results(results: dict) -> None:
    names = {
        "examples": "examples",
        "tokenizer_seconds": "the tokenizer's own batch, s",
        "our_seconds": "tokenize(), s",
        "ratio": "  ratio",
        "second_start_seconds": "second start, s",
        "first_batch": "first batch, s",
        "batch_ms": "a batch of 32 rows, ms",
        "mib_peak": "tokenizing: most MiB, all in all",
        "mib_tokenizing_rank": "afterwards: MiB more, the rank that tokenized",
        "mib_other_rank": "  another rank",
        "padding_random": "padding, random order",
        "padding_grouped": "padding, group_by_length",
    }
    steps = {
        "random": "step, random order, s",
        "grouped": "step, group_by_length, s",
        "ratio": "  ratio",
        "loader_wait": "share of a step waiting for the loader",
    }
    rows = [[title, *(row[name] for row in results.values())] for name, title in names.items()]
    rows += [[title, *(row["step"][name] for row in results.values())] for name, title in steps.items()]
    print_table(["", *results], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
