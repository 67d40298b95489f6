"""Measures the data's costs: tokenizing, cached start, an epoch's first batch, memory, padding, waiting for a batch.

    python benchmarks/data.py                       # generated ProsQA, and 385,620 generated rows of GSM8K's lengths
    python benchmarks/data.py --quick               # with a tenth of the examples

The tokenizer is --model's, or a byte-level BPE trained on the data.
"""

import argparse
import sys

from options import Parser


def make_parser() -> Parser:
    parser = Parser(__doc__, "json", repeats=3)
    parser.add_argument("--model", help="model whose tokenizer is used (default: one trained on the data)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the examples")
    parser.add_count("--steps", 20, "training steps per order of the examples")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # data file, tokenizer, cache
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # answers --help and reports mistakes before the slow imports

import gc
import json
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import mean

import numpy as np
import prosqa
import torch
from common import MARKERS, alternate, machine, make_model, pick_device, print_table, resident, write_json
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from config import Config
from dataset import EpochPlan, StageDataset, batches_of, example_order, to_device
from preprocessing.examples import load_examples
from preprocessing.tokens import Tokens, cache_tokens, tokenize
from trainer.commands import command
from trainer.data import sequence_lengths
from trainer.pretrained import load_tokenizer

GSM8K_EXAMPLES, PROSQA_EXAMPLES = 385_620, 17_886  # of the training sets
STAGE = 3  # of padding and training steps


def gsm_like(n: int) -> list[dict]:
    """Returns examples of about GSM8K's lengths: questions of 45 words on average, 1 to 6 steps."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in random.integers(2, 9, 4000)]
    examples = []
    for length, n_steps in zip(random.integers(20, 71, n), random.integers(1, 7, n), strict=True):
        a, b = random.integers(1, 900, (2, n_steps)).tolist()
        steps = [f"<<{x}*{y}={x * y}>>" for x, y in zip(a, b, strict=True)]
        question = " ".join(words[i] for i in random.integers(0, len(words), length))
        examples.append({"question": question, "steps": steps, "answer": str(a[-1] * b[-1])})
    return examples


def make_tokenizer(path: Path, folder: Path) -> Path:
    """Writes a byte-level BPE trained on the file's texts to the folder, and returns the folder."""
    bpe = ByteLevelBPETokenizer()
    texts = (text for e in load_examples(path, 5000) for text in (e["question"], *e["steps"]))
    bpe.train_from_iterator(texts, vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def tokenizing(path: Path, tokenizer, cache: Path, repeats: int) -> dict:
    """Returns the seconds to tokenize a file, with `tokenize` and in one call of the tokenizer, and to start again."""
    examples = load_examples(path)
    texts = [t for e in examples for t in (e["question"] + "\n", *(s + "\n" for s in e["steps"]), "### " + e["answer"])]
    sides = {"tokenizer": lambda: tokenizer(texts), "tokenize": lambda: tokenize(examples, tokenizer)}
    one_call, own = (medians["seconds"] for medians in alternate(sides, repeats, torch.device("cpu")).values())
    cache_tokens(str(path), tokenizer, cache, show_progress=False)
    begin = time.perf_counter()
    Tokens.open(cache_tokens(str(path), tokenizer, cache, show_progress=False))
    again = time.perf_counter() - begin
    seconds = {"one call of the tokenizer, s": one_call, "tokenize(), s": own, "  ratio": own / one_call}
    return {"examples": len(examples), **seconds, "second start, s": again}


def batches(tokens: Tokens, config: Config, stage: int, order: np.ndarray) -> AbstractContextManager:
    """Returns the context manager of an epoch's batches, as run.py uses it, for a single rank."""
    plan = EpochPlan(order, config, 0, 1)
    return batches_of(StageDataset(tokens, config, MARKERS, epoch=0), plan, [stage] * len(plan))


def first_batch(cache: Path) -> float:
    """Returns the seconds from open tokens to an epoch's first batch, the maximum over some stages."""
    tokens, config, seconds = Tokens.open(cache), Config(uniform_prob=0.3), []
    for stage in (0, 3, 7):
        gc.collect()  # now: a full collection within the measurement would take longer than the batch
        begin = time.perf_counter()
        with batches(tokens, config, stage, example_order(len(tokens), config, 0)) as loader:
            next(loader)
            seconds.append(time.perf_counter() - begin)
    return max(seconds)


def print_memory(path: str, tokenizer: str, cache: str) -> None:
    """Prints the MiB of this process before it has the tokens of a file, with them, and at the peak."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer(["warm"] * 1000)
    before = resident("VmRSS")
    tokens = Tokens.open(cache_tokens(path, tokenizer, Path(cache), show_progress=False))
    order = example_order(len(tokens), Config(), 0)
    plan = EpochPlan(order, Config(), 0, 1)
    for index in order[:5000]:
        tokens[index]
    print(json.dumps([before, resident("VmRSS"), resident("VmHWM"), len(plan)]))  # len(plan) keeps the plan in memory


def memory(*files: Path) -> dict[str, float]:
    """Returns MiB, measured in separate processes: the peak of the rank that tokenizes; then what the tokens add to a
    process with torch and a tokenizer, on that rank and on one that finds them cached."""
    command = [sys.executable, __file__, "--memory-of", *map(str, files)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    (before, after, peak, _), (other_before, other_after, *_) = map(json.loads, runs)
    return {
        "tokenizing: peak of the process, MiB": peak,
        "tokens in memory: MiB, the rank that tokenized": after - before,
        "  another rank": other_after - other_before,
    }


def padding(tokens: Tokens, grouped: bool) -> float:
    """Returns the share of padding in an epoch's micro-batches of 32 rows."""
    config = Config(batch_size_training=32, global_batch_size=128)
    lengths = sequence_lengths(tokens, config, STAGE)
    order = example_order(len(tokens), config, 0, lengths if grouped else None)
    plan = EpochPlan(order, config, 0, 1)
    micro_batches = [lengths[one.indices] for step in plan for one in step.micro_batches]
    return 1 - sum(one.sum() for one in micro_batches) / sum(one.max() * len(one) for one in micro_batches)


def steps_per_order(tokens: Tokens, n_steps: int, device: torch.device) -> dict:
    """Returns the seconds of a tiny model's step in random order and grouped by length, measured alternately, and the
    share of a step spent waiting for a batch."""
    config = Config(batch_size_training=16, gradient_accumulation_steps=1)
    model = make_model("gpt2", "tiny", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    taken: list[list[tuple[float, float]]] = []  # per step and order: (seconds until the batch, seconds of the step)
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(batches(tokens, config, STAGE, example_order(len(tokens), config, 0, lengths)))
            for lengths in (None, sequence_lengths(tokens, config, STAGE))
        ]
        for _ in range(n_steps + 1):
            taken.append([])
            for loader in loaders:
                begin = time.perf_counter()
                batch = next(loader)
                waited = time.perf_counter() - begin
                batch.pop("weight")
                model(**to_device(batch, device)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                taken[-1].append((waited, time.perf_counter() - begin))
    random, grouped = (mean(seconds for _, seconds in of) for of in zip(*taken[1:], strict=True))  # [0] warms up
    waits = sum(waited for step in taken[1:] for waited, _ in step)
    seconds = {"step, random order, s": random, "step, group_by_length, s": grouped, "  step ratio": grouped / random}
    return {**seconds, "share of a step waiting for the loader": waits / n_steps / (random + grouped)}


def write_files(folder: Path, share: float) -> dict[str, Path]:
    """Writes the data files with a share of the examples; returns name -> file."""
    files = {"ProsQA": folder / "prosqa.json", "GSM8K-like": folder / "gsm.json"}
    splits = prosqa.make_splits({"train": int(PROSQA_EXAMPLES * share)}, prosqa.Settings(), 0)
    files["ProsQA"].write_text(json.dumps(splits["train"]))
    files["GSM8K-like"].write_text(json.dumps(gsm_like(int(GSM8K_EXAMPLES * share))))
    return files


def measure(path: Path, options: argparse.Namespace, repeats: int, device: torch.device) -> dict:
    """Returns all measurements of one data file, description -> number."""
    folder = path.parent
    source = options.model or make_tokenizer(path, folder / f"{path.stem}_tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source)
    found = memory(path, source, folder / "one") | tokenizing(path, tokenizer, folder / "cache", repeats)
    cache = cache_tokens(str(path), tokenizer, folder / "cache", show_progress=False)
    tokens = Tokens.open(cache)
    found["first batch, s"] = first_batch(cache)
    found |= {f"padding, {name}": padding(tokens, n) for n, name in enumerate(("random order", "group_by_length"))}
    return found | steps_per_order(tokens, options.steps, device)


@command
def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.memory_of:
        print_memory(*options.memory_of)
        return
    if options.model:
        load_tokenizer(Config(model_id=options.model))  # fails before the data are made
    where = machine(device := pick_device())
    print(where, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), 0.1 if options.quick else 1.0)
        results = {
            name: measure(path, options, options.repeats if name == "ProsQA" else 1, device)
            for name, path in files.items()
        }
    print_table(["", *results], [[name, *(of[name] for of in results.values())] for name in results["ProsQA"]])
    write_json(options, where, results, hidden=("memory_of",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
