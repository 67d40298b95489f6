"""The table of a run, from its metrics.jsonl and its evaluation: each stage after its last epoch."""

from __future__ import annotations

import math
from pathlib import Path

from curriculum import stage_name
from trainer.logger import read_log
from trainer.run_folder import best, rating
from utils import UserError, read_object


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
