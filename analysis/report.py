"""Makes the page of an analysis from the numbers of `python -m analysis`. The same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from analysis import figures
from analysis.page import Figure, Section, page
from preprocessing.examples import read_json
from trainer.files import replaced, write_whole

Found = dict  # of one part: subject -> its numbers
NO_SHARES = ("auc", "norm", "cosine with the one before")  # columns of tables that are not percentages


def write_page(folder: Path) -> Path:
    """Writes FOLDER/index.html, and transplants.png for state tracking; returns the page's path. Raises UserError if
    FOLDER lacks the numbers."""
    about = read_json(folder / "about.json")
    parts = {part: read_json(folder / f"{part}.json") for part in SECTIONS}
    sections = [SECTIONS[part](found, about) for part, found in parts.items() if any(found.values())]
    of_steps = "" if about["steps"] is None else f" of {about['steps']} steps"
    facts = [
        *((f"{name}, {about['thoughts'][name]} thoughts", source) for name, source in about["checkpoints"].items()),
        ("data", f"{about['data']}, {about['questions']} questions{of_steps}"),
        ("seed of donors and noise", str(about["seed"])),
        *summary(parts, about),
    ]
    title = "Thoughts: state tracking" if about["kind"] == "machine" else "Thoughts: search in graphs"
    write_whole(folder / "index.html", page(title, sections, facts))
    if about["kind"] == "machine":
        with replaced(folder / "transplants.png") as picture:
            figures.picture(transplant_lines(parts["interventions"]), picture)
    return folder / "index.html"


def summary(parts: dict[str, Found], about: dict) -> list[tuple[str, str]]:
    """Returns the first rows of the page: a sceptic's questions, answered by numbers for each subject."""

    def accuracies(of: dict) -> str:
        return " / ".join(percent(row_of(of, what, "all")["accuracy"]) for what in ("itself", "noise", "mean"))

    def probes(of: dict) -> str:
        return percent(fmean(row["probe"] for row in of["decoded"] if row["probe"] is not None))

    def moved(of: dict) -> str:
        return " / ".join(percent(row["where it leads"]) for row in of["transplants"])

    def areas(of: dict) -> str:
        return " / ".join(f"{row['auc']:.2f} after {row['thoughts']}" for row in of["frontier"] if "auc" in row)

    def twins(of: dict) -> str:
        return percent(row_of(of, "the twin", "all")["donor"])

    if about["kind"] == "machine":
        asked = {
            f"Do thoughts hold the state? Found by a linear probe, 1 of {about['states']}, mean": ("probe", probes),
            "Does the answer follow a state that is put in? After transplant k = 1, 2, ...": ("interventions", moved),
        }
    else:
        asked = {
            "Do thoughts hold a frontier? Area under the curve (0.5 is nothing)": ("search", areas),
            "Does the answer follow thoughts of the graph asked about the other root?": ("interventions", twins),
        }
    asked["Are they needed? Accuracy as they are / with noise / with the mean"] = ("interventions", accuracies)
    return [
        (question, "; ".join(f"{name} {text(of)}" for name, of in parts[part].items()))
        for question, (part, text) in asked.items()
    ]


def row_of(found: dict, name: str, place: str) -> dict:
    """Returns the row of an intervention on a set of thoughts; {} without one: a control may have fewer thoughts."""
    return next((row for row in found["rows"] if (row["name"], row["place"]) == (name, place)), {})


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def points_of(rows: list[dict], x: str, y: str, factor: float = 100) -> list[tuple[float, float]]:
    return [(row[x], factor * row[y]) for row in rows if row.get(y) is not None]


def table_of(rows_by_subject: dict[str, list[dict]], head: list[str]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of a table with the subject in the first column."""
    rows = [[name, *(cell(key, row.get(key)) for key in head)] for name, of in rows_by_subject.items() for row in of]
    return ["", *head], rows


def cell(key: str, value) -> str:
    """Formats a number of a table: shares as percentages, as in the figures."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3f}" if key in NO_SHARES else percent(value)


def svg_figure(figure: figures.Figure, caption: str, head: Sequence[str] = (), rows: Sequence = ()) -> Figure:
    return Figure(figures.svg(figure), caption, [*head], [*rows])


def probe_section(found: Found, about: dict) -> Section:
    next_steps = {name: of["next step"] for name, of in found.items()}
    lines = {name: points_of(rows, "thoughts", "value") for name, rows in next_steps.items()}
    drawings = [
        svg_figure(
            figures.lines(lines, "thoughts, then language", "value of the right step, %"),
            "The probability, if language begins after k thoughts, of the name that begins the right next step, over "
            "the questions that have one. Renormalised: over the names; first: how often it is the likeliest name; "
            "elsewhere: the probability of all else.",
            *table_of(next_steps, ["thoughts", "questions", "value", "renormalised", "first", "elsewhere"]),
        )
    ]
    if about["kind"] == "machine":
        decoded = {name: of["decoded"] for name, of in found.items()}
        lines = {
            f"{name}, {label}": points_of(rows, "thought", key)
            for key, label in (("head", "LM head"), ("probe", "linear probe"))
            for name, rows in decoded.items()
        }
        drawings.append(
            svg_figure(
                figures.lines(lines, "thought", "state read rightly, %"),
                "How often the LM head, and a linear probe fitted to other questions, decode the state after k steps "
                f"from the hidden state that makes the k-th thought. Chance is {percent(1 / about['states'])}.",
                *table_of(decoded, ["thought", "questions", "head", "probe"]),
            )
        )
    shapes = {name: of["shape"] for name, of in found.items()}
    table = table_of(shapes, ["thought", "norm", "cosine with the one before"])
    drawings.append(Figure("", "Norms of the thoughts, and the cosine of each with the one before.", *table))
    return Section(
        "What thoughts hold",
        "A value is the probability of a name if the model has to continue with language (paper, Section 5.2). That "
        "something can be decoded does not show that the model uses it: interventions do.",
        drawings,
    )


def sweep_section(found: Found, about: dict) -> Section:
    drawings = []
    for name, rows in found.items():
        parts = {label: [100 * row["classes"][label] / row["questions"] for row in rows] for label in about["classes"]}
        flat = [{**row, **row["classes"]} for row in rows]
        drawings.append(
            svg_figure(
                figures.stacked([str(row["thoughts"]) for row in rows], parts, "thoughts, then language", "outputs, %"),
                f"{name}: outputs after 0, 1, ... thoughts, in the last stage of {about['thoughts'][name]}.",
                *table_of({name: flat}, ["thoughts", "accuracy", *about["classes"]]),
            )
        )
    return Section(
        "With another number of thoughts",
        "The model has to begin with language after this number of thoughts (paper, Section 5.1). After many thoughts "
        "outputs are short and leave little room for mistakes, so bars of different numbers are not directly "
        "comparable. In mirrored graphs a wrong target is the other component, or another leaf of the right one.",
        drawings,
    )


def interventions_section(found: Found, about: dict) -> Section:
    rows = [row for of in found.values() for row in of["rows"]]
    names, places = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "place"))

    def accuracies(subject: str, pairs: list[tuple[str, str]]) -> list[float | None]:
        shares = (row_of(found[subject], name, place).get("accuracy") for name, place in pairs)
        return [None if share is None else 100 * share for share in shares]

    of_all = {subject: accuracies(subject, [(name, "all") for name in names]) for subject in found}
    head = ["kind", "name", "place", "questions", "accuracy", "donor", "gold", "T", "escape"]
    drawings = [transplant_figure(found, about)] if about["kind"] == "machine" else []
    drawings.append(
        svg_figure(
            figures.bars(names, of_all, "accuracy, %"),
            "Accuracy when all thoughts are replaced, by the replacement. The table shows every set of replaced "
            "thoughts, over the questions with a step for the first of them. Donor: share of answers that are the "
            "donor's, over donors with another answer; gold: probability of the right answer; T: gold / (gold + other "
            "candidate); escape: probability of neither.",
            *table_of({name: of["rows"] for name, of in found.items()}, head),
        )
    )
    for subject in found:
        contents = ("itself", "mean", "noise", "any other question", "the twin")
        shares = {name: accuracies(subject, [(name, place) for place in places]) for name in contents}
        caption = f"{subject}: accuracy by the replaced thoughts and by the replacement (numbers above)."
        drawings.append(svg_figure(figures.bars(places, shares, "accuracy, %"), caption))
    others = {name: [of["another question"]] for name, of in found.items()}
    caption = "A control that replaces no thought, but puts the parts of each question in another order: how often the "
    caption += "answer is the old question's, and the new one's."
    drawings.append(Figure("", caption, *table_of(others, ["what", "questions", "accuracy", "of the new question"])))
    return Section(
        "Are thoughts used?",
        "A thought is replaced, and the model goes on from there: it makes the later thoughts from the changed one. "
        "Without feedback all thoughts are one embedding, whatever the question: another question's thoughts then "
        "change nothing, by construction.",
        drawings,
    )


def transplant_lines(found: Found) -> figures.Figure:
    lines = {
        f"{name}, {label}": points_of(of["transplants"], "thought", key)
        for key, label in (("where it leads", "follows"), ("where it was", "stays"))
        for name, of in found.items()
    }
    return figures.lines(lines, "number of the thought that is transplanted", "answers, %")


def transplant_figure(found: Found, about: dict) -> Figure:
    transplants = {name: of["transplants"] for name, of in found.items()}
    return svg_figure(
        transplant_lines(found),
        "The k-th thought of another question is put into this one. Follows: the answer is where the rest of this "
        "question's buttons lead from the other question's state after k steps. Stays: it is what it was. Chance is "
        f"{percent(1 / about['states'])}.",
        *table_of(transplants, ["thought", "questions", "where it leads", "where it was"]),
    )


def search_section(found: Found, about: dict) -> Section:
    frontiers = {name: [row for row in of["frontier"] if "auc" in row] for name, of in found.items()}
    areas = {name: points_of(rows, "thoughts", "auc", 1) for name, rows in frontiers.items()}
    parallel = {
        f"{name}, thought {number}": [(place, 100 * share) for place, share in enumerate(row["mean"], 1)]
        for name, of in found.items()
        for number, row in enumerate(of["parallelism"], 1)
    }
    heights = {name: of["by height"]["shortest"] for name, of in found.items()}
    by_height = {
        f"{name}, {'right' if right else 'wrong'} nodes": points_of(
            [row for row in rows if row["right"] == right and row["thoughts"] == 1], "height", "value"
        )
        for name, rows in heights.items()
        for right in (True, False)
    }
    drawings = [
        svg_figure(
            figures.lines(areas, "thoughts, then language", "area under the curve"),
            "Are the nodes that a breadth-first search would name next valued above nodes of the same depth that "
            "cannot be reached? After k thoughts they are k + 1 edges from the root, or k in sentences, which begin "
            "with the node before; 0.5 is chance. Frontier, others: their mean values, renormalised over the names.",
            *table_of(frontiers, ["thoughts", "questions", "auc", "frontier", "others"]),
        ),
        svg_figure(
            figures.lines(parallel, "likeliest names together", "of the value of all names, %"),
            "How many paths are kept open: the share of the value that the likeliest 1, 2, 3 names have together, "
            "after the first and the second thought (paper, Section 5.3: less parallel later).",
            ["", "1", "2", "3"],
            [[name, *(f"{share:.1f} %" for _, share in points)] for name, points in parallel.items()],
        ),
        svg_figure(
            figures.lines(by_height, "height: fewest edges to a leaf", "value within the frontier, %", joined=False),
            "The value of the frontier's nodes after one thought by their height, nodes on a shortest path to the "
            "target apart from the others (paper, Section 5.4).",
            *table_of(heights, ["thoughts", "height", "right", "nodes", "value"]),
        ),
    ]
    trees = [
        (f"question {number + 1}: its graph after each thought", trees_of(found, number))
        for number in range(len(next(iter(found.values()))["trees"]))
    ]
    return Section(
        "Is it a search?",
        "A node's value after k thoughts: how likely its name is as the next step, renormalised over all names.",
        drawings,
        trees,
    )


def trees_of(found: Found, number: int) -> str:
    """Returns one question's graph with its values, for each subject after each number of thoughts, as HTML."""
    parts = []
    for name, of in found.items():
        for row, numbers in zip(of["frontier"], of["trees"][number], strict=True):
            svg = figures.svg(figures.tree(**numbers))
            parts.append(f"<h3>{escape(name)}, thoughts: {row['thoughts']}</h3>{svg}")
    return "".join(parts)


SECTIONS = {
    "probe": probe_section,
    "interventions": interventions_section,
    "search": search_section,
    "sweep": sweep_section,
}
