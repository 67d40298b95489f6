"""Kills and restarts a small job until it is done, many times: does it always end with the same weights?

    python tests/torture.py                 # 25 runs: `make torture`
    python tests/torture.py --runs 4 --ranks 2

All processes of a run get SIGKILL at random moments, every other time while it writes a checkpoint, and it is restarted
until it ends by itself. Its weights must have the hash of an undisturbed run's; the model has dropout and AdamW is
never re-initialised, so that any lost state changes them. Exits with 1 if a hash differs, or if a kill has cost more
than the steps since the last save.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "preprocessing"))
SAVE_EVERY = 4  # steps
EPOCHS, EXAMPLES, BATCH = 3, 160, 16
MOST_KILLS = 4  # of a run


def prepare(folder: Path) -> Path:
    """Writes data, a model with dropout, and the configuration of the job; returns the latter's path."""
    import arithmetic
    import tiny_model
    from transformers import AutoModelForCausalLM

    for name, examples in arithmetic.make_splits({"train": EXAMPLES, "valid": 8}, base=5).items():
        (folder / f"{name}.json").write_text(json.dumps(examples))
    model = folder / "model"
    tiny_model.write_model([folder / "train.json"], model, "char", "gpt2", 32, 1, 2, 128)
    AutoModelForCausalLM.from_pretrained(model, resid_pdrop=0.1, embd_pdrop=0.1).save_pretrained(model)
    keys = {
        **{"save_path": str(folder / "runs"), "model_id": str(model), "wandb": "disabled"},
        **{"train_path": str(folder / "train.json"), "val_path": str(folder / "valid.json")},
        **{"method": "coconut", "epochs_per_stage": 1, "max_latent_stage": 2, "uniform_prob": 0.3},
        **{"num_epochs": EPOCHS, "global_batch_size": BATCH, "batch_size_training": 8, "lr": 1e-3},
        **{"max_new_tokens": 4, "reset_optimizer": "never", "num_workers": 0},
        **{"save_every_steps": SAVE_EVERY, "log_every_steps": 1, "keep_checkpoints": 1},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(keys))
    return folder / "job.yaml"


def start(job: Path, name: str, ranks: int, log: Path) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "run.py"), str(job), f"name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def digest(run: Path) -> str:
    return hashlib.sha256((run / f"checkpoint_{EPOCHS}" / "model.safetensors").read_bytes()).hexdigest()


def last_step(run: Path) -> int:
    """Returns the last step in the log."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return max((record["step"] for record in records if record["event"] == "step"), default=0)


@dataclass
class Kill:
    """One kill of one run, and what its restart found."""

    moment: str
    reached: int  # the last step in the log
    found: str = "killed before that"  # the checkpoint that the restart continued from
    lost: int | None = None  # steps


def kill_in(process: subprocess.Popen, run: Path, seconds: float, in_save: bool) -> str | None:
    """Kills the job after this time, or in the first save after it. Returns the moment; None if the job has ended."""
    begin, started = time.monotonic(), time.time()
    while process.poll() is None:
        elapsed, saving = time.monotonic() - begin, False
        with suppress(FileNotFoundError):  # the job renames such folders
            saving = any(path.stat().st_mtime > started for path in run.glob(".writing-*"))
        if elapsed > seconds and (saving or not in_save):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"{elapsed:.1f} s" + (", in a save" if saving else "")
        time.sleep(0.0005)
    return None


def torture(job: Path, name: str, ranks: int, dice: random.Random, duration: float) -> tuple[list[Kill], str]:
    """Runs and kills the job until it is done; returns the kills, and the hash of the weights."""
    run, log = job.parent / "runs" / name, job.parent / f"{name}.log"
    kills: list[Kill] = []
    while True:
        process, moment = start(job, name, ranks, log), None
        if len(kills) < MOST_KILLS:
            # from 0.3 on: a kill during the imports tests nothing
            moment = kill_in(process, run, dice.uniform(0.3, 1.0) * duration, in_save=len(kills) % 2 == 1)
        process.wait()
        text = log.read_text()
        found = re.search(r"continuing from \S+/(checkpoint_\S+),", text)
        if kills and (found or "global batch" in text):
            kills[-1].found = found[1] if found else "nothing"
            kills[-1].lost = kills[-1].reached - step_of(kills[-1].found)
        if moment is None:
            if process.returncode:
                raise SystemExit(f"{name} ended with {process.returncode}:\n{text[-3000:]}")
            return kills, digest(run)
        kills.append(Kill(moment, last_step(run)))


def step_of(checkpoint: str) -> int:
    """Returns the steps finished in a checkpoint, from its name."""
    numbers = re.fullmatch(r"checkpoint_(\d+)(?:_step_(\d+))?", checkpoint)
    return int(numbers[2] or int(numbers[1]) * EXAMPLES // BATCH) if numbers else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--runs", 25), ("--ranks", 1)):
        parser.add_argument(name, type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments of kills (default: from the clock)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() % 10**6
    folder = Path(tempfile.mkdtemp())
    job, log = prepare(folder), folder / "undisturbed.log"
    begin = time.monotonic()
    if start(job, "undisturbed", options.ranks, log).wait():
        raise SystemExit(log.read_text()[-3000:])
    duration, wanted = time.monotonic() - begin, digest(folder / "runs" / "undisturbed")
    print(f"undisturbed: {duration:.1f} s, {wanted[:12]}; seed {seed}", flush=True)
    print(f"{'run':>8}  {'killed after':<20} {'restart found':<24} {'steps lost':>10}", flush=True)
    dice, failures, everything = random.Random(seed), 0, []
    for number in range(1, options.runs + 1):
        name = f"run-{number}"
        kills, found = torture(job, name, options.ranks, dice, duration)
        for kill in kills:
            # the log may be a step ahead of the save, or behind it
            too_many = kill.lost is not None and kill.lost > SAVE_EVERY
            failures += too_many
            lost = "" if kill.lost is None else max(kill.lost, 0)
            print(f"{name:>8}  {kill.moment:<20} {kill.found:<24} {lost:>10}{'  TOO MANY' if too_many else ''}")
        everything += kills
        failures += found != wanted
        print(
            f"{'':>8}  done: {found[:12]} {'as undisturbed' if found == wanted else 'NOT AS UNDISTURBED'}", flush=True
        )
        shutil.rmtree(folder / "runs" / name)
    in_saves = sum("save" in kill.moment for kill in everything)
    print(f"{options.runs} runs, {len(everything)} kills, {in_saves} of them in a save, {failures} failures")
    shutil.rmtree(folder)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
