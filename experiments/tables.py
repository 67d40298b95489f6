"""Writes the report of a grid: the table NAME.md, its numbers NAME.json and the learning curves NAME.png."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shortcuts
from intervals import LARGEST_GAP, clopper_pearson, difference, has_one_mode, mean_interval
from jobs import by_digest
from recipes import LEARNT, markdown, of_recipes

from preprocessing.examples import load_examples
from trainer.files import replaced, write_whole
from trainer.run_folder import notes_of
from utils import as_json, log, read_object

if TYPE_CHECKING:
    from grid_file import Grid
    from jobs import Job

MADE_BY = ("python", "torch", "transformers", "hardware")


def write_report(
    grid: Grid, jobs: list[Job], before: dict[str, list[dict]], shown: set[str], out: Path, arguments: str
) -> str:
    """Writes the report of the finished jobs; returns its table and the paths. Raises UserError.

    NAME.json holds the rows of all finished jobs and the older rows `before` of other keys. Table and figure hold the
    jobs named in `shown`; `arguments` are the command's options that have chosen them.
    """
    everything = collect(grid, jobs, before)
    results = {run: [row for row in rows if f"{run}-{row['seed']}" in shown] for run, rows in everything.items()}
    results = {run: rows for run, rows in results.items() if rows}
    if not results:
        return f"no run of {grid.name} is finished"
    write_whole(out / f"{grid.name}.json", as_json(with_older(everything, before)))
    write_whole(out / f"{grid.name}.md", as_text(grid, results, arguments))
    drawn = ""
    if find_spec("matplotlib") is None:
        log.warning("no figure, which needs matplotlib: pip install -r requirements-dev.txt, then --report")
    else:
        with replaced(out / f"{grid.name}.png") as figure:
            draw(grid, results, {job.run for job in jobs if not hasattr(job.config.rules, "stage_of_step")}, figure)
        drawn = f"; its figure: {out / grid.name}.png"
    rows = table(grid, results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [*of_recipes(grid, results), "", f"the report: {out / grid.name}.md{drawn}"]
    return "\n".join(lines)


def with_older(results: dict[str, list[dict]], before: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Returns the rows of each run, followed by its older rows with other keys."""
    digests = by_digest(results)
    return {
        run: results.get(run, []) + [row for row in before.get(run, []) if row["digest"] not in digests]
        for run in dict.fromkeys([*results, *before])
    }


def collect(grid: Grid, jobs: list[Job], before: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Returns run -> a row per finished seed, read from its folder or, by its digest, from the rows `before`.

    A row holds "seed" and "digest"; from the test split "accuracy", "by_steps" (number of steps -> accuracy), "tokens",
    "seconds_per_example" (generation in batches), "correct" (0 or 1 per question) and "steps" (number of steps per
    question); "seconds" of training and validation; "epochs" for the learning curves; "made_by" (commit, versions,
    hardware); in a grid with recipes "flops" of training and evaluation.
    """
    recorded = by_digest(before)
    results: dict[str, list[dict]] = {}
    for job in jobs:
        if job.run not in grid.runs:
            continue
        if not job.is_done or job.conflicts:  # a conflict is an error only for the jobs that --only has chosen
            if job.digest in recorded:
                results.setdefault(job.run, []).append(recorded[job.digest])
            continue
        n_steps = [len(example["steps"]) for example in job.test_examples()]
        correct = [int(prediction["correct"]) for prediction in job.predictions()]
        metrics = read_object(job.folder / "eval" / "metrics.json")
        earlier = job.begin.epochs() if job.begin else []
        epochs = [*earlier, *job.epochs()] if job.shares_curriculum else job.epochs()
        row = {
            "seed": job.seed,
            "digest": job.digest,
            "accuracy": metrics["accuracy"],
            "by_steps": {
                str(n): statistics.mean(right for right, steps in zip(correct, n_steps, strict=True) if steps == n)
                for n in sorted(set(n_steps))
            },
            "tokens": metrics["generated_tokens"],
            "seconds_per_example": metrics["seconds_per_example"],
            "seconds": sum(record["train_seconds"] + record["seconds"] for record in [*earlier, *job.epochs()]),
            "epochs": [
                {"epoch": epoch, "stage": record["stage"], "accuracy": record["accuracy"]}
                for epoch, record in enumerate(epochs)
            ],
            "correct": "".join(map(str, correct)),
            "steps": " ".join(map(str, n_steps)),
            "made_by": made_by(job),
        }
        if grid.recipes:
            from costs import job_cost  # imports transformers

            row = {"flops": job_cost(job).flops, **row}
        results.setdefault(job.run, []).append(row)
    return {run: results[run] for run in grid.runs if run in results}


def made_by(job: Job) -> dict[str, str]:
    """Returns the commit, versions and hardware of a job's training; {} if its folder does not record them."""
    try:
        notes = notes_of((job.folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return {}
    commit, *changed = notes.pop("git commit", "unknown").split(maxsplit=1)
    commit = " ".join([commit[:7], *changed])
    return {"commit": commit} | {name: notes[name] for name in MADE_BY if name in notes}


def answers(row: dict, untrained: tuple[int, ...] = ()) -> np.ndarray:
    """Returns (questions,) int64: 1 for a right answer, over the questions whose number of steps training had."""
    right = np.array([int(digit) for digit in row["correct"]])
    return right[~np.isin(np.array(row["steps"].split(), dtype=int), untrained)] if untrained else right


def accuracies(grid: Grid, rows: list[dict]) -> list[float]:
    """Returns the accuracy of each seed over the questions whose number of steps training had."""
    return [float(answers(row, grid.untrained).mean()) for row in rows]


def as_text(grid: Grid, results: dict[str, list[dict]], arguments: str) -> str:
    """Returns the text of NAME.md."""
    one = next(iter(results.values()))[0]
    chance = f" Chance is {grid.chance:.1%}." if grid.chance is not None else ""
    lines = [f"# {grid.title}", "", f"    python experiments/grid.py experiments/{grid.name}.yaml{arguments}", ""]
    if grid.about:
        lines += [grid.about.strip(), ""]
    restriction = f" of {' or '.join(trained_steps(grid, one))} steps, as in training" if grid.untrained else ""
    sentences = [
        f"Accuracy: percent of {len(answers(one, grid.untrained))} test questions{restriction}; mean over the seeds "
        f"with its 95 % confidence interval (Student's t over seeds, for these questions), then each seed.",
        f"There is no interval for one seed, for seeds that are equal in this table, or if two neighbouring seeds are "
        f"more than {100 * LARGEST_GAP:.0f} points apart (two modes).{chance}",
        f"Learnt: seeds that reach {LEARNT:.0%}, with the 95 % interval of their share (Clopper-Pearson).",
        "By steps: mean over the seeds, by the number of steps of a question.",
        "Minus a control: difference over the seeds that both have, with a 95 % bootstrap interval over seeds, then "
        "questions, the same for both; with few seeds it is too narrow.",
        "Tokens: counted as in Table 1 of the paper, thoughts included; a generation takes one sequential forward pass "
        "more.",
        "ms: generation per question, in batches.",
        "Minutes: training and validation, with those of the run that it begins with.",
    ]
    lines += [
        " ".join(sentences),
        "",
        *shortcut_accuracies(grid),
    ]
    head, *rows = table(grid, results)
    lines += [*markdown(head, rows), *of_recipes(grid, results)]
    if grid.prediction:
        lines += ["", "## Predicted before the runs", "", grid.prediction.strip()]
    lines += ["", f"![accuracy by epoch]({grid.name}.png)", ""]
    lines += origins(row for rows in results.values() for row in rows)
    return "\n".join(lines) + "\n"


def origins(rows: Iterable[dict]) -> list[str]:
    """Returns a line with all commits, versions and hardware; no line if no row has them, as in old results."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.get("made_by", {}).items():
            found.setdefault(name, set()).add(value)
    text = "; ".join(f"{name} {', '.join(sorted(values))}" for name, values in found.items())
    return [f"Made by {text}."] if found else []


def trained_steps(grid: Grid, row: dict) -> list[str]:
    return [n for n in row["by_steps"] if int(n) not in grid.untrained]


def table(grid: Grid, results: dict[str, list[dict]]) -> list[list[str]]:
    """Returns the cells of the report's table, the head first, without empty columns."""
    steps = " / ".join(trained_steps(grid, next(iter(results.values()))[0]))
    head = ["run", "paper", "accuracy (95 %)", "seeds", "learnt (95 %)", f"by steps: {steps}"]
    head += [f"{n} steps, untrained" for n in grid.untrained] + ["tokens", "ms", "minutes"]
    head += [f"minus {grid.runs[control].label or control} (95 %)" for control in grid.controls]
    rows = [head, *(cells_of(grid, run, results) for run in results)]
    filled = [column for column in range(len(head)) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in filled] for row in rows]


def cells_of(grid: Grid, run: str, results: dict[str, list[dict]]) -> list[str]:
    spec, rows = grid.runs[run], results[run]
    accuracy = accuracies(grid, rows)
    learnt = sum(value >= LEARNT for value in accuracy)
    share = clopper_pearson(learnt, len(rows))

    def mean_of(name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    def of_steps(n: str) -> float:
        return 100 * statistics.mean(row["by_steps"][n] for row in rows)

    return [
        spec.label or run,
        spec.paper or "",
        interval_cell(accuracy),
        " ".join(f"{100 * value:.1f}" for value in accuracy) if len(accuracy) > 1 else "",
        f"{learnt} of {len(rows)} ({100 * share[0]:.0f} to {100 * share[1]:.0f} %)",
        " / ".join(f"{of_steps(n):.0f}" for n in trained_steps(grid, rows[0])),
        *(interval_cell([row["by_steps"][str(n)] for row in rows]) for n in grid.untrained),
        f"{mean_of('tokens'):.1f}",
        f"{1000 * mean_of('seconds_per_example'):.2f}",
        f"{mean_of('seconds') / 60:.1f}",
        *("" if run == control else difference_cell(grid, rows, results.get(control, [])) for control in grid.controls),
    ]


def interval_cell(accuracy: list[float]) -> str:
    """Returns the mean in percent, with its interval over the seeds or the reason why there is none."""
    text = f"{100 * statistics.mean(accuracy):.1f}"
    if not has_one_mode(accuracy):
        return f"{text} (two modes)"
    interval = mean_interval(accuracy)
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def difference_cell(grid: Grid, rows: list[dict], control: list[dict]) -> str:
    """Returns the difference to a control in points, with its interval if both have several seeds."""
    found = difference(*({row["seed"]: answers(row, grid.untrained) for row in of} for of in (rows, control)))
    if found is None:
        return ""
    mean, *interval = (f"{100 * value:+.1f}" for value in found)
    return f"{mean} ({' to '.join(interval)})" if interval else mean


def shortcut_accuracies(grid: Grid) -> list[str]:
    """Returns a line with the accuracy of shortcuts on the test questions, by number of steps; [] without graphs."""
    examples = load_examples(grid.test_path)
    if not shortcuts.has_graph(examples[0]):
        return []
    steps = sorted({len(example["steps"]) for example in examples})
    groups = [[example for example in examples if len(example["steps"]) == n] for n in steps]
    right = [shortcuts.measure(group, grid.test_path) for group in groups]
    shares = (f"{name} {' / '.join(f'{of_group[name]:.0f}' for of_group in right)}" for name in right[0])
    return [f"Accuracy of shortcuts for {' / '.join(map(str, steps))} steps: {', '.join(shares)}.", ""]


def draw(grid: Grid, results: dict[str, list[dict]], staged: set[str], path: Path) -> None:
    """Draws validation accuracy by epoch: a line per seed, a colour and marker per run, a dotted line where a stage of
    the `staged` runs begins (runs whose stages count tokens, such as iCoT's, are not staged)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 4.5))
    for number, (run, rows) in enumerate(results.items()):
        style = {"color": f"C{number % 10}", "marker": "osv^Dx+*"[number % 8], "markersize": 4, "linewidth": 1}
        for index, row in enumerate(rows):
            epochs = [record["epoch"] + 1 for record in row["epochs"]]
            accuracy = [100 * record["accuracy"] for record in row["epochs"]]
            panel.plot(epochs, accuracy, label=(grid.runs[run].label or run) if index == 0 else None, **style)
    curves = [row["epochs"] for run, rows in results.items() if run in staged for row in rows]
    # the curve with the most stages: some runs have one stage throughout
    curve = max(curves, key=lambda curve: len({record["stage"] for record in curve}), default=[])
    for before, record in pairwise(curve):
        if record["stage"] != before["stage"]:
            panel.axvline(record["epoch"] + 0.5, color="0.7", linestyle=":")
            where = {"x": record["epoch"] + 0.55, "y": 1.01, "transform": panel.get_xaxis_transform()}
            panel.text(**where, s=f"stage {record['stage']}", fontsize=7, color="0.4")
    if grid.chance is not None:
        panel.axhline(100 * grid.chance, color="0.5", linestyle="--", linewidth=1)
        where = {"x": 0.995, "y": 100 * grid.chance + 0.7, "transform": panel.get_yaxis_transform()}
        panel.text(**where, s="chance", fontsize=7, color="0.4", ha="right")
    panel.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 105))
    panel.set_title(grid.title, y=1.05)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
