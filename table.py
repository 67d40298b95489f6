"""The table of a run, from its metrics.jsonl and its evaluation: each stage after its last epoch.

python evaluate.py checkpoints/NAME                              # prints it, and names the best checkpoint
python evaluate.py checkpoints/NAME --all data/gsm_test.json     # evaluates every checkpoint that is kept
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from curriculum import stage_name
from load_path import best, checkpoints, is_of_finished_epoch, rating
from utils import UserError, progress_bar, read_log, read_object, report, why_unreachable


def summary(run_dir: Path, evaluation: dict | None = None) -> str:
    """The table of a run: each stage after its last epoch, then the results of an evaluation where there are any, those
    that are given or those in the run's folder; of several sets in a table of their own.

    Raises UserError where the folder holds no finished epoch and no evaluation, or something damaged.
    """
    try:
        return _summary(run_dir, evaluation)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"metrics.jsonl or eval/metrics.json in {run_dir} is damaged: {error!r}") from None


def _summary(run_dir: Path, evaluation: dict | None) -> str:
    rows, stages, last_of_stage = [], {}, {}
    evaluation_file = run_dir / "eval" / "metrics.json"
    # a restarted run repeats the epochs that it had lost: what was written last counts
    epochs = {record["epoch"]: record for record in read_log(run_dir / "metrics.jsonl") if record["event"] == "epoch"}
    for _, record in sorted(epochs.items()):
        n_epochs, seconds = stages.get(record["stage"], (0, 0.0))
        stages[record["stage"]] = (n_epochs + 1, seconds + record["train_seconds"] + record["seconds"])
        last_of_stage[record["stage"]] = record
    for stage, record in last_of_stage.items():
        n_epochs, seconds = stages[stage]
        rows.append((f"validation, stage {stage_name(stage)}", n_epochs, record, f"{seconds:.0f}"))
    if evaluation is None and evaluation_file.exists():
        evaluation = read_object(evaluation_file)
    sets = (evaluation or {}).get("sets")
    if evaluation is not None and not sets:
        title = f"{Path(evaluation['file']).stem}, stage {stage_name(evaluation['stage'])}"
        rows.append((title, "", evaluation, f"{evaluation['seconds']:.1f}"))
    if not rows and not sets:
        raise UserError(f"{run_dir} holds neither a finished epoch nor an evaluation")
    tables = [[HEADER, *(row_of(*row) for row in rows)]] if rows else []
    if sets:
        tables.append([SETS_HEADER, *(row_of_set(*found) for found in sets.items())])
    return "\n\n".join("\n".join(lines) for lines in tables)


HEADER = f"{'':32}{'epochs':>7}{'accuracy':>10}{'tokens':>8}{'loss':>8}{'seconds':>9}"


def row_of(title: str, n_epochs: int | str, record: dict, seconds: str) -> str:
    """A line of the table: `record` holds the metrics of an evaluation."""
    return (
        f"{title:32}{n_epochs:>7}{record['accuracy']:>10.1%}{record['generated_tokens']:>8.1f}"
        f"{record['loss']:>8.3f}{seconds:>9}"
    )


SETS_HEADER = f"{'':32}{'n':>7}{'accuracy':>10}{'95 %':>16}{'tokens':>8}{'loss':>8}{'seconds':>9}"


def row_of_set(name: str, record: dict) -> str:
    """A line of the table of an evaluation on several sets: `record` holds the metrics of one."""
    title = f"{name}, stage {stage_name(record['stage'])}"
    low, high = record["accuracy_95"]
    return (
        f"{title:32}{record['examples']:>7,}{record['accuracy']:>10.1%}{f'{low:.1%} to {high:.1%}':>16}"
        f"{record['generated_tokens']:>8.1f}{record['loss']:>8.3f}{record['seconds']:>9.1f}"
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n questions (Wilson's score interval): what a set of so few of them leaves open,
    at 0 and 100 % too."""
    z = 1.959964  # the normal distribution's 97.5 % point
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def named_best(run_dir: Path) -> str | None:
    """A line on the checkpoint that RUN@best stands for; None where there is none."""
    found = best(run_dir)
    if found is None:
        return None
    stage, accuracy = rating(found)
    return (
        f"best in validation: {found.name}, stage {stage_name(stage)}, {accuracy:.1%} (load_model_path={run_dir}@best)"
    )


def evaluate_all(run_dir: Path, file: str) -> tuple[str, list[str]]:
    """Evaluates every checkpoint of a finished epoch by run.py, one after the other. Results go to
    RUN/evaluations/FILE/CHECKPOINT/eval.

    Returns a table, the best in validation marked, and what went wrong, a sentence for each checkpoint that could not
    be evaluated; what run.py warns of is passed on, once. Raises UserError where there is none.
    """
    paths = [path for path in checkpoints(run_dir) if is_of_finished_epoch(path)]
    if not paths:
        raise UserError(f"{run_dir} holds no checkpoint of a finished epoch")
    rows, failed, folder, chosen = [HEADER], [], run_dir / "evaluations" / Path(file).stem, best(run_dir)
    said: set[str] = set()
    for path in progress_bar(paths, "evaluating", "checkpoint", shown=True):
        keys = {"only_eval": True, "from_scratch": False, "load_model_path": str(path), "val_path": file, "resume": 0}
        keys |= {"max_eval_examples": None}  # the run's is of its validation
        keys |= {"save_path": str(folder), "name": path.name, "wandb": "disabled"}
        overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        command = [sys.executable, Path(__file__).with_name("run.py"), run_dir / "config.yaml", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        for warning in [line for line in lines if line.startswith("warning: ")]:
            general = warning.replace(str(path), "a checkpoint")  # the same of each
            if general not in said:
                print(general, file=sys.stderr, flush=True)
            said.add(general)
        if done.returncode:
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            failed.append(f"{path} could not be evaluated: {[*errors, *lines[-1:], 'no reason given'][0]}")
            continue
        metrics = read_object(folder / path.name / "eval" / "metrics.json")
        mark = ", best" if path == chosen else ""
        rows.append(
            row_of(f"{path.name}, stage {stage_name(metrics['stage'])}{mark}", "", metrics, f"{metrics['seconds']:.1f}")
        )
    return "\n".join(rows), failed


def main(description: str, arguments: list[str] | None = None) -> int:
    """`python evaluate.py RUN`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run: save_path/name")
    parser.add_argument("--all", metavar="FILE", help="evaluate all of its checkpoints on this data file")
    options = parser.parse_args(arguments)
    try:
        if reason := why_unreachable(options.run):
            raise UserError(f"{options.run} cannot be reached: {reason}")
        if options.all is not None:
            found, failed = evaluate_all(options.run, options.all)
        else:
            found, failed = summary(options.run), []
        print(*filter(None, (found, named_best(options.run))), sep="\n")
        if failed:
            raise UserError("; ".join(failed))
    except UserError as error:
        return report(error)
    return 0
