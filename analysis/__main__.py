"""Analyses the thoughts of a checkpoint, beside those of a control: what they hold, and whether they are used.

    python -m analysis checkpoints/state_tracking/coconut-0 --control checkpoints/state_tracking/pause_as_thought-0 \\
        --data data/machine/machine_test.json --out results/analysis_machine
    python -m analysis CHECKPOINT --data FILE --out FOLDER --page                     # the page again from the numbers

FOLDER/index.html is the page. A JSON file beside it holds the numbers of each part: probe (what thoughts hold), sweep
(other numbers of thoughts), search (graphs: is there a frontier?), interventions (what if a thought is changed?).
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

NAMES = ("Coconut", "pause as thought")  # of the two in the page


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run's folder: its newest checkpoint")
    add("--control", metavar="CHECKPOINT", help="the same without feedback: every figure has its twin")
    add("--data", type=Path, required=True, help="questions: state tracking, or graphs as ProsQA's")
    add("--out", type=Path, required=True, help="folder of the page and its numbers")
    add("--questions", type=int, default=500, metavar="N", help="the first so many (default: 500)")
    add("--thoughts", type=int, metavar="K", help="(default: as the last stage was trained)")
    add("--seed", type=int, default=0, help="of donors and noise (default: 0)")
    add("--steps", type=int, metavar="N", help="only questions with so many steps (default: all)")
    add("--show", type=int, nargs="+", default=range(8), help="graphs to draw (default: 0 to 7)")
    add("--page", action="store_true", help="write the page from the numbers in FOLDER, and stop")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the slow imports below
    if find_spec("matplotlib") is None:
        make_parser().exit(2, "error: the figures need matplotlib: pip install -r requirements-dev.txt\n")

from tqdm import tqdm
from transformers.utils import logging

from analysis import interventions, probe, search
from analysis.report import write_page
from analysis.subject import Subject
from analysis.tasks import Graphs, Machine, Task, load_task
from trainer.files import write_whole
from utils import UserError, as_json, print_error, print_result


def measure_probe(subject: Subject, task: Task, options: argparse.Namespace) -> dict:
    """Values of next steps after 0 to K thoughts; on state tracking also whether thoughts hold the state."""
    found = {
        "next step": probe.next_step(task, probe.values(subject, task, subject.n_thoughts)),
        "shape": probe.shape(subject),
    }
    return found | ({"decoded": probe.decoded(subject, task)} if isinstance(task, Machine) else {})


def measure_search(subject: Subject, task: Task, options: argparse.Namespace) -> dict | None:
    """Graphs only. The paper compares the first and the second thought."""
    if not isinstance(task, Graphs):
        return None
    deepest = max(task.fewest, min(subject.n_thoughts, max(len(example["steps"]) for example in task.examples) - 1))
    counts = range(task.fewest, deepest + 1)
    values = probe.values(subject, task, deepest)
    drawn = [index for index in options.show if index < len(task.examples)]
    return {
        "parallelism": [search.parallelism(values[k]) for k in range(1, min(deepest, 2) + 1)],
        "frontier": [search.frontier(task, values[k], k) for k in counts],
        "by height": {"shortest": [row for k in counts for row in search.by_height(task, values[k], k)]},
        "trees": [[search.tree(task, index, values[k]) for k in counts] for index in drawn],
    }


def measure_interventions(subject: Subject, task: Task, options: argparse.Namespace) -> dict:
    """Every intervention at all places; on state tracking also transplants."""
    rows = []
    tried = interventions.interventions(subject, task, options.seed)
    for intervention in tqdm(tried, desc="interventions", unit="intervention"):
        for place, numbers in interventions.places(subject.n_thoughts).items():
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
    """Writes FOLDER/PART.json for each part, and FOLDER/about.json. Raises UserError."""
    task = load_task(options.data, options.questions, options.steps)
    checkpoints = dict(zip(NAMES, filter(None, (options.checkpoint, options.control)), strict=False))
    subjects = {name: Subject.load(path, task.examples, options.thoughts) for name, path in checkpoints.items()}
    about = {
        "kind": task.kind,
        "data": str(options.data),
        "questions": len(task.examples),
        "steps": options.steps,
        "seed": options.seed,
        "classes": task.classes,
        "checkpoints": checkpoints,
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
    """Numbers have five digits after the point: further digits differ between machines."""
    exact = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 5))
    write_whole(path, as_json(exact))


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if min(options.show) < 0 or options.questions < 2 or (options.thoughts is not None and options.thoughts < 1):
        parser.error("--questions must be at least 2, --thoughts at least 1, --show at least 0")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if not options.page:
            measure(options)
        print_result(f"the page: {write_page(options.out)}")
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
