"""Analyses the thoughts of a checkpoint and of a control: what they hold, and whether the model uses them.

    python -m analysis checkpoints/state_tracking/coconut-0 --control checkpoints/state_tracking/pause_as_thought-0 \\
        --data data/machine/machine_test.json --out results/analysis_machine
    python -m analysis CHECKPOINT --data FILE --out FOLDER --page    # makes the page again from the numbers in FOLDER

FOLDER/index.html is the page. JSON files beside it hold the numbers: probe (what thoughts hold), sweep (other numbers
of thoughts), search (graphs: is there a frontier?), interventions (what follows when thoughts are changed?).
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from preprocessing.examples import load_examples, read_json
from trainer import commands
from trainer.run_folder import check_checkpoint
from utils import UserError, as_json, print_error, print_result


def make_parser() -> argparse.ArgumentParser:
    parser = commands.make_parser(__doc__, prog="python -m analysis")
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run's folder (its newest epoch checkpoint)")
    add("--control", metavar="CHECKPOINT", help="a model without feedback, shown beside it in every figure")
    add("--data", type=Path, required=True, help="questions of state tracking, or graphs with ProsQA's fields")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the page and its numbers")
    add("--questions", type=int, default=500, metavar="N", help="use the first N questions (default: 500)")
    add("--thoughts", type=int, metavar="K", help="latent thoughts (default: as in training at the model's stage)")
    add("--seed", type=int, default=0, help="seed of donors and noise (default: 0)")
    add("--steps", type=int, metavar="N", help="use only questions with N steps (default: all)")
    add("--show", type=int, nargs="+", default=range(8), metavar="N", help="graphs to draw (default: 0 to 7)")
    add("--trust-remote-code", action="store_true", help=commands.TRUST_REMOTE_CODE)
    add("--page", action="store_true", help="only make the page from the numbers in FOLDER")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if min(options.show) < 0 or options.questions < 2 or (options.thoughts is not None and options.thoughts < 1):
        parser.error("--questions must be at least 2, --thoughts at least 1, --show at least 0")
    return options


def check_files(options: argparse.Namespace) -> None:
    """Raises UserError for what needs no model: missing checkpoints, data or numbers, and a missing matplotlib."""
    if find_spec("matplotlib") is None:
        raise UserError("the figures need matplotlib: pip install -r requirements-dev.txt")
    if options.page:
        read_json(options.out / "about.json")
        return
    for checkpoint in filter(None, (options.checkpoint, options.control)):
        check_checkpoint(checkpoint)
    load_examples(options.data)


if __name__ == "__main__":  # answers --help and errors before the slow imports below
    try:
        check_files(parse())
    except UserError as error:
        sys.exit(print_error(error))

from tqdm import tqdm
from transformers.utils import logging

from analysis import interventions, probe, search
from analysis.report import write_page
from analysis.subject import Subject
from analysis.tasks import Graphs, Machine, Task, load_task
from trainer.commands import command
from trainer.files import write_whole


def measure_probe(subject: Subject, task: Task, options: argparse.Namespace) -> dict:
    """Measures what thoughts hold: values of next steps, norms, and on state tracking the decoded states."""
    found = {
        "next step": probe.next_step(task, probe.values(subject, task, subject.n_thoughts)),
        "shape": probe.shape(subject),
    }
    return found | ({"decoded": probe.decoded(subject, task)} if isinstance(task, Machine) else {})


def measure_search(subject: Subject, task: Task, options: argparse.Namespace) -> dict | None:
    """Measures the search in graphs; None for another task."""
    if not isinstance(task, Graphs):
        return None
    deepest = max(task.fewest, min(subject.n_thoughts, max(len(example["steps"]) for example in task.examples) - 1))
    counts = range(task.fewest, deepest + 1)
    values = probe.values(subject, task, deepest)
    drawn = [index for index in options.show if index < len(task.examples)]
    return {
        "parallelism": [search.parallelism(values[k]) for k in range(1, min(deepest, 2) + 1)],  # as the paper: 1 and 2
        "frontier": [search.frontier(task, values[k], k) for k in counts],
        "by height": {"shortest": [row for k in counts for row in search.by_height(task, values[k], k)]},
        "trees": [[search.tree(task, index, values[k]) for k in counts] for index in drawn],
    }


def measure_interventions(subject: Subject, task: Task, options: argparse.Namespace) -> dict:
    """Measures every intervention on every set of thoughts, and on state tracking the transplants."""
    rows = []
    tried = interventions.interventions(subject, task, options.seed)
    for intervention in tqdm(tried, desc="interventions", unit="intervention"):
        for place, numbers in interventions.thought_sets(subject.n_thoughts).items():
            found = interventions.measure(subject, task, intervention, numbers)
            rows.append({"kind": intervention.kind, "name": intervention.name, "place": place, **found})
    found = {"rows": rows, "another question": interventions.with_another_question(subject, task, options.seed)}
    if isinstance(task, Machine):
        found["transplants"] = interventions.transplants(subject, task, options.seed)
    return found


MEASURES = {
    "probe": measure_probe,
    "sweep": lambda subject, task, _: probe.sweep(subject, task),
    "search": measure_search,
    "interventions": measure_interventions,
}


def measure(options: argparse.Namespace) -> None:
    """Writes FOLDER/about.json and a FOLDER/PART.json for each part. Raises UserError."""
    task = load_task(options.data, options.questions, options.steps)
    paths, subjects = [path for path in (options.checkpoint, options.control) if path], {}
    for path in paths:
        subject = Subject.load(path, task.examples, options.thoughts, options.trust_remote_code)
        name = "Coconut" if subject.model.thinks else "pause as thought"
        subjects["control" if name in subjects else name] = subject
    about = {
        "kind": task.kind,
        "data": str(options.data),
        "questions": len(task.examples),
        "steps": options.steps,
        "seed": options.seed,
        "classes": task.classes,
        "checkpoints": dict(zip(subjects, paths, strict=True)),
        "thoughts": {name: subject.n_thoughts for name, subject in subjects.items()},
    }
    if isinstance(task, Machine):
        about["states"] = len(task.states)
    write_json(options.out / "about.json", about)
    for part, measure_part in MEASURES.items():
        found = {}
        for name, subject in subjects.items():
            print_result(f"{part}: {name}")
            found[name] = measure_part(subject, task, options)
        write_json(options.out / f"{part}.json", found)


def write_json(path: Path, content) -> None:
    """Writes a JSON file with numbers rounded to five digits after the point: further digits differ by machine."""
    exact = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 5))
    write_whole(path, as_json(exact))


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not options.page:
        measure(options)
    print_result(f"the page: {write_page(options.out)}")


if __name__ == "__main__":
    sys.exit(main())
