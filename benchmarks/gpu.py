"""Runs all GPU measurements in fifteen minutes: pieces of at most two minutes, in order of importance.

    python benchmarks/gpu.py                        # all pieces, to results/gpu
    python benchmarks/gpu.py --budget 600           # stop after ten minutes
    python benchmarks/gpu.py --skip-done            # continue with the pieces that have not ended
    python benchmarks/gpu.py --only step_32 train   # some pieces
    python benchmarks/gpu.py --tiny                 # a rehearsal with tiny sizes on any machine, without a time limit

A piece prints to OUT/PIECE.part, which becomes OUT/PIECE.txt when the piece succeeds. Numbers go to OUT/PIECE.json. A
stopped piece keeps its .part; train and table1_mini resume when started again.

tests        the tests that need a GPU: a step does not synchronise, attention never takes its slow path
step_*       a step compared with plain fine-tuning: batch size, float32 or bfloat16, eager or compiled
launches     kernels of a latent pass; the modelled and the measured time (step_32) of a step
train        100 steps of each stage of the ProsQA run, GPT-2's size from scratch: estimates the hours of its 50 epochs
generate     evaluation compared with Hugging Face's generate
table1_mini  20 seeds of Coconut and its controls in parallel

Requires torch with CUDA and requirements.txt; `tests` pytest and hypothesis; compiled steps triton. Nothing is
downloaded: weights are random, and the data are generated in OUT/work.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from options import ROOT, Parser, positive

EXAMPLES = 17_886  # of ProsQA's training set
EPOCHS = [5, 5, 5, 5, 5, 5, 20]  # of each stage: 50 in all


class Piece(NamedTuple):
    name: str
    seconds: int  # limit
    commands: list[list]  # arguments of the Python interpreter


def make_pieces(out: Path, tiny: bool) -> list[Piece]:
    """Returns the pieces in their order."""
    size = ["--size", "tiny", "--repeats", 1] if tiny else ["--size", "small", "--repeats", 10]
    work = out / "work"

    def step(name: str, batch: int, *options) -> Piece:
        stages = [1] if tiny else [0, 3, 6]
        command = ["benchmarks/step.py", *size, "--batch", 2 if tiny else batch, "--stages", *stages, *options]
        command += ["--sides", "coconut", "--no-memory", "--sync-debug", "--json", out / f"{name}.json"]
        return Piece(name, 120, [command])

    data = ["preprocessing/prosqa.py", "--out", work, "--test", 10]
    data += ["--train", 8, "--valid", 2] if tiny else ["--train", 12_800, "--valid", 300]
    model = ["preprocessing/tiny_model.py", work / "prosqa_train.json", "--out", work / "model"]
    model += ["--width", 16, "--layers", 1, "--heads", 1] if tiny else ["--width", 768, "--layers", 12, "--heads", 12]
    train = [
        "run.py",
        "args/prosqa_coconut.yaml",
        f"model_id={work / 'model'}",
        "from_scratch=true",
        "epochs_per_stage=1",
        "num_epochs=7",
    ]
    train += [f"train_path={work / 'prosqa_train.json'}", f"val_path={work / 'prosqa_valid.json'}", "bf16=true"]
    train += [f"save_path={work}", "name=train", "wandb=disabled", "keep_checkpoints=1", "log_every_steps=20"]
    train += ["max_new_tokens=2", "batch_size_training=8"] if tiny else []
    training = [train, ["benchmarks/gpu.py", "--hours", work / "train" / "metrics.jsonl"]]
    launches = ["benchmarks/launches.py", "--measured", out / "step_32.json", "--json", out / "launches.json"]
    generate = ["benchmarks/generate.py", *size[:2], "--repeats", 1, "--json", out / "generate.json"]
    grid = ["experiments/grid.py", "experiments/table1_mini.yaml", "--out", out / "table1_mini", "--anew"]
    grid += ["--only", "coconut", "pause_as_thought", "no_thought", "--jobs", 2 if tiny else 20]
    grid += ["--seeds", *range(1 if tiny else 20), "--set", f"save_path={work / 'grid'}"]
    if tiny:
        launches += ["--shapes", "gpt2"]
        generate += ["--examples", 2, "--batches", 2, "--new-tokens", 2]
        grid += ["max_train_examples=64", "max_eval_examples=4"]
    return [
        Piece("tests", 60, [["-m", "pytest", "-q", "-o", "addopts=", "tests/test_parallel.py", "-k", "on_a_gpu"]]),
        step("step_32", 32, "--bf16"),
        Piece("launches", 120, [launches]),
        Piece("data", 60, [data, model]),
        Piece("train", 120, training),
        step("step_32_compiled", 32, "--bf16", "--compile"),
        step("step_32_float32", 32),
        step("step_128", 128, "--bf16"),
        Piece("train_on", 120, training),
        Piece("table1_mini", 120, [grid]),
        Piece("generate", 120, [generate]),
        step("step_128_compiled", 128, "--bf16", "--compile"),
        step("step_128_float32", 128),
    ]


def run(piece: Piece, out: Path, seconds: float) -> str:
    """Runs a piece for at most the given seconds; returns how it ended."""
    end, part = time.monotonic() + seconds, out / f"{piece.name}.part"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment["TEST_ON_GPU"] = "1"  # tests/conftest.py
    with part.open("w", encoding="utf-8") as log:
        for command in piece.commands:
            arguments = [sys.executable, *map(str, command)]
            # a session of its own, so that a signal reaches the command's children too
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)  # run.py saves
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                return f"stopped after {seconds:.0f} s"
            if code:
                return f"exit code {code}, see {part}"
    part.replace(out / f"{piece.name}.txt")
    return "done"


def hours(metrics: Path) -> str:
    """Returns the hours of ProsQA's 50 epochs, estimated from the log of a run with one epoch per stage."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    epochs = [record for record in records if record["event"] == "epoch"]
    if not epochs:
        return "no epoch has ended"
    ended = {record["stage"] for record in epochs}
    steps = {record["stage"]: record for record in records if record["event"] == "step" and record["stage"] in ended}
    n_examples = 128 * max(record["step"] for record in steps.values()) / len(ended)
    lines, total = [], 0.0
    for stage, n_epochs in enumerate(EPOCHS):
        epoch = min(epochs, key=lambda record: abs(record["stage"] - stage))  # the nearest finished stage
        seconds = epoch["train_seconds"] * EXAMPLES / n_examples + epoch["seconds"]
        total += n_epochs * seconds
        speed = {name: steps[epoch["stage"]].get(name) for name in ("tokens_per_second", "mfu")}
        lines.append(f"stage {stage}, as in stage {epoch['stage']}: {seconds:.1f} s an epoch, {speed}")
    return "\n".join([*lines, f"50 epochs: {total / 3600:.2f} hours"])


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder (default: results/gpu)")
    parser.add_argument("--budget", type=positive, default=900, help="seconds for all pieces (default: %(default)s)")
    parser.add_argument("--skip-done", action="store_true", help="skip the pieces that have a .txt")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="run only these pieces")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; needs no GPU")
    parser.add_argument("--hours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.hours:
        print(hours(options.hours))
        return 0
    import torch

    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --tiny rehearses without one")
    begin, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    pieces = make_pieces(out, options.tiny)
    if unknown := {*(options.only or ())} - {piece.name for piece in pieces}:
        parser.error(f"no piece {' or '.join(sorted(unknown))}: {', '.join(piece.name for piece in pieces)}")
    for piece in pieces:
        if options.only and piece.name not in options.only:
            continue
        left = options.budget - (time.monotonic() - begin)
        if options.skip_done and (out / f"{piece.name}.txt").exists():
            ended = "done before"
        elif left < 1:
            ended = "no time left"
        else:
            ended = run(piece, out, left if options.tiny else min(piece.seconds, left))
        print(f"{time.monotonic() - begin:6.0f} s  {piece.name}: {ended}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
