"""Writes a page about runs: losses, accuracy, speed and the keys in which the runs differ.

    python -m tools.report checkpoints/breadth/last-0    # writes report.html into the run's folder
    python -m tools.report checkpoints/gsm-coconut checkpoints/gsm-pause --out pages/gsm.html    # compares two runs

The page is one self-contained HTML file. The command also works while a run is training.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from analysis.page import Figure, Section, page
from curriculum import stage_name
from tools.model_card import ways
from trainer.commands import command, make_parser
from trainer.files import parsing, write_whole
from trainer.logger import latest, read_log
from trainer.run_folder import evaluations_in, read_config
from utils import UserError, print_result, read_object

POINTS = 500  # at most, of a line over steps
ROWS = 12  # at most, of the table under it
SPAN = 100  # if the largest loss is more than SPAN times the smallest, the axis is logarithmic
STEP_COLUMNS = {  # key of a step's record -> name, format; only runs that clip, or sample answers, record them
    "grad_norm": ("norm of the gradient, before clipping", "{:.3g}"),
    "reward": ("mean reward", "{:.3f}"),
    "reward_std": ("standard deviation of rewards in a group", "{:.3f}"),
    "groups_without_signal": ("share of groups without signal", "{:.3f}"),
    "entropy": ("entropy, nats a token", "{:.3f}"),
    "thought_norm": ("norm of the thoughts", "{:.3g}"),
    "rollout_share": ("rollouts' share of the time", "{:.3f}"),
}
EPOCH_COLUMNS = {  # name -> key of an epoch's record, format
    "training loss": ("train_loss", "{:.4f}"),
    "validation loss": ("loss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "CoT match": ("cot_match", "{:.1%}"),
    "tokens": ("generated_tokens", "{:.1f}"),
    "seconds": ("train_seconds", "{:.0f}"),
    "steps skipped so far": ("skipped", "{}"),
}

# --- Reading runs ---


@dataclass(frozen=True)
class Run:
    """A run's log, configuration and evaluations."""

    name: str
    steps: dict[int, dict]  # optimizer step, from 1 -> record
    epochs: dict[int, dict]  # epoch, from 1 -> record
    config: dict  # of config.yaml; {} without that file
    evaluations: list[list[str]]  # checkpoint, data file, number of examples, accuracy


def read_runs(folders: list[Path]) -> list[Run]:
    """Reads runs from their folders. Raises UserError for a folder without a run, and for one given twice."""
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{folder} is given more than once")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    path = folder / "metrics.jsonl"
    records = read_log(path)
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run: it holds no metrics.jsonl")
    with parsing(path):
        steps = latest(records, "step")
        epochs = {epoch + 1: record for epoch, record in latest(records, "epoch").items()}
    if not steps and not epochs:
        raise UserError(f"{path} has no step and no epoch yet")
    config = read_config(folder / "config.yaml")[0] if (folder / "config.yaml").exists() else {}
    return Run(name, steps, epochs, config, read_evaluations(folder))


def read_evaluations(folder: Path) -> list[list[str]]:
    """Returns the cells of each evaluation: checkpoint, data file and how it was asked, examples, accuracy. Raises
    UserError."""
    rows = []
    for path, one in evaluations_in(folder):
        with parsing(path / "metrics.json"):
            how = read_config(path / "config.yaml")[0] if (path / "config.yaml").is_file() else {}
            described = Path(one["checkpoint"]) / "coconut.json"
            described = read_object(described) if described.is_file() else {"stage": one.get("stage")}
            asked = ", ".join([str(one.get("file", "")), *ways(how, one, described)])
            rows.append([Path(one["checkpoint"]).name, asked, str(one["examples"]), f"{one['accuracy']:.1%}"])
    return rows


def values_of(records: dict[int, dict], key: str) -> dict[int, float]:
    """Returns the value of a key at each step or epoch whose record has it."""
    return {number: record[key] for number, record in records.items() if key in record}


def averaged(values: dict[int, float], width: int) -> dict[int, float]:
    """Returns, for each interval of `width` steps, numbered from 0, the mean of its finite values, or NaN."""
    intervals: dict[int, list[float]] = {}
    for step, value in values.items():
        intervals.setdefault((step - 1) // width, [])
        if math.isfinite(value):
            intervals[(step - 1) // width].append(value)
    return {number: statistics.fmean(found) if found else math.nan for number, found in intervals.items()}


def stage_starts(records: dict[int, dict]) -> list[tuple[float, str]]:
    """Returns (where it begins, name) of each stage after the first, on an axis of steps or epochs."""
    return [
        (number - 0.5, f"stage {stage_name(record['stage'])}")
        for (_, before), (number, record) in pairwise(records.items())
        if record["stage"] != before["stage"]
    ]


# --- The page ---


def report_page(runs: list[Run]) -> str:
    """Returns the page as HTML. Raises UserError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figures need matplotlib: pip install -r requirements-dev.txt")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [training(runs), validation(runs), *evaluations(runs), configurations(runs)]
    return page(title, sections, [(run.name, run_summary(run)) for run in runs])


def run_summary(run: Run) -> str:
    """Returns a run's progress, its last accuracy, and the keys that describe it."""
    planned = f" of {run.config['num_epochs']}" if "num_epochs" in run.config else ""
    parts = [f"{len(run.epochs)}{planned} epochs, {max(run.steps, default=0):,} steps"]
    if run.epochs:
        last = run.epochs[max(run.epochs)]
        parts.append(f"stage {stage_name(last['stage'])}, validation accuracy {last['accuracy']:.1%}")
    parts += [f"{key} {run.config[key]}" for key in ("method", "thought", "model_id", "seed") if key in run.config]
    return "; ".join(parts)


def training(runs: list[Run]) -> Section:
    """Returns the figures over steps: loss, speed and the method's own measures."""
    if not any(run.steps for run in runs):
        return Section("Training", "The logs hold no step.")
    texts = []
    for run in runs:
        steps = [step for step, loss in values_of(run.steps, "loss").items() if not math.isfinite(loss)]
        if steps:
            texts.append(f"{run.name}: losses that are not finite: {len(steps)}, the first at step {steps[0]}.")
    figures = [over_steps(runs, "loss", "training loss", "{:.4g}")]
    figures.append(over_steps(runs, "tokens_per_second", "tokens a second", "{:,.0f}"))
    for key, (name, form) in STEP_COLUMNS.items():
        if having := [run for run in runs if values_of(run.steps, key)]:
            figures.append(over_steps(having, key, name, form))
    return Section("Training", "\n\n".join(texts), figures)


def over_steps(runs: list[Run], key: str, ylabel: str, form: str) -> Figure:
    """Draws means over intervals of steps, a line for each run, with a table of means over wider intervals."""
    values = {run.name: values_of(run.steps, key) for run in runs}
    last = max(max(run.steps, default=0) for run in runs)
    width, wide = math.ceil(last / POINTS), math.ceil(last / ROWS)
    series = {
        name: [(number * width + (width + 1) / 2, mean) for number, mean in averaged(of_run, width).items()]
        for name, of_run in values.items()
    }
    columns = [averaged(of_run, wide) for of_run in values.values()]
    rows = [
        [f"{first + 1:,} to {min(last, first + wide):,}", *(cell(form, column.get(number)) for column in columns)]
        for number, first in enumerate(range(0, last, wide))
    ]
    caption = f"{ylabel} by optimizer step" + (f", means of {width} steps each" if width > 1 else "")
    return line_figure(runs, "steps", series, ylabel, caption, rows)


def validation(runs: list[Run]) -> Section:
    """Returns the figures of loss and accuracy over epochs, and a table of epochs for each run."""
    if not any(run.epochs for run in runs):
        return Section("Validation", "No epoch is finished yet.")
    tables = [epoch_table(run) for run in runs if run.epochs]
    return Section("Validation", "", [over_epochs(runs, "validation loss"), over_epochs(runs, "accuracy"), *tables])


def over_epochs(runs: list[Run], name: str) -> Figure:
    """Draws one of EPOCH_COLUMNS over epochs, a line for each run."""
    key, form = EPOCH_COLUMNS[name]
    values = {run.name: values_of(run.epochs, key) for run in runs}
    factor, ylabel = (100, f"{name}, %") if form.endswith("%}") else (1, name)
    series = {run: [(epoch, factor * value) for epoch, value in of_run.items()] for run, of_run in values.items()}
    epochs = sorted({epoch for of_run in values.values() for epoch in of_run})
    rows = [[str(epoch), *(cell(form, of_run.get(epoch)) for of_run in values.values())] for epoch in epochs]
    return line_figure(runs, "epochs", series, ylabel, f"{name} after each epoch", rows)


def line_figure(runs: list[Run], over: str, series: dict, ylabel: str, caption: str, rows: list[list[str]]) -> Figure:
    """Draws `series`, run -> [(x, y)], over steps or epochs; marks the stages of the run with the most stages."""
    from analysis import figures

    xlabel = {"steps": "optimizer step", "epochs": "epoch"}[over]
    staged = max(runs, key=lambda run: len(stage_starts(getattr(run, over))))
    marks = stage_starts(getattr(staged, over))
    figure = figures.lines(series, xlabel, ylabel, marks)
    finite = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if ylabel.endswith("loss") and finite and 0 < SPAN * min(finite) < max(finite):
        figures.make_logarithmic(figure)
    if marks:
        caption += f"; dotted: where a stage {f'of {staged.name} ' if len(series) > 1 else ''}begins"
    return Figure(figures.svg(figure), caption, [xlabel, *series], rows)


def epoch_table(run: Run) -> Figure:
    """Returns a table of a run's epochs."""
    columns = {name: values_of(run.epochs, key) for name, (key, _) in EPOCH_COLUMNS.items()}
    filled = [name for name, values in columns.items() if values]
    rows = [
        [str(epoch), stage_name(record["stage"])]
        + [cell(EPOCH_COLUMNS[name][1], columns[name].get(epoch)) for name in filled]
        for epoch, record in run.epochs.items()
    ]
    caption = f"{run.name}: tokens: generated, thoughts included; seconds: of training"
    return Figure("", caption, ["epoch", "stage", *filled], rows)


def evaluations(runs: list[Run]) -> list[Section]:
    """Returns a section with a table of the runs' evaluations, or none."""
    rows = [[run.name, *cells] for run in runs for cells in run.evaluations]
    head = ["run", "checkpoint", "data", "n", "accuracy"]
    table = Figure("", "accuracy of checkpoints on other data", head, rows)
    return [Section("Evaluations", "", [table])] if rows else []


def configurations(runs: list[Run]) -> Section:
    """Returns a table of a run's configuration, or of the keys in which several runs differ."""
    known = [run for run in runs if run.config]
    text = " ".join(f"{run.name} has no config.yaml." for run in runs if not run.config)
    keys = dict.fromkeys(key for run in known for key in run.config if key != "name")
    table = [[key, *(as_yaml(run.config.get(key)) for run in known)] for key in keys]
    rows = [row for row in table if len(runs) == 1 or len(set(row[1:])) > 1]
    if len(known) > 1 and not rows:
        text += " All keys but their names are the same."
    caption = "keys in which the runs differ" if len(runs) > 1 else "all keys"
    figure = Figure("", caption, ["key", *(run.name for run in known)], rows)
    return Section("Configurations", text, [figure] if rows else [])


def as_yaml(value) -> str:
    """Returns a value as a YAML file spells it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def cell(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: save_path/name")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html in the first run's folder)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    logs = ", ".join(str(folder / "metrics.jsonl") for folder in options.runs)
    with parsing(f"{logs}: a record"):
        write_whole(out, report_page(read_runs(options.runs)))
    print_result(f"the page: {out}")


if __name__ == "__main__":
    sys.exit(main())
