"""Which recipe is the best of each row, by validation accuracy: the part of a report for a grid with recipes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grid_file import Grid

LEARNT = 0.9  # from this accuracy on a seed, or a stage, counts as having learnt the task
TEXT = (
    "Validation accuracy after the last epoch, in percent, mean over the seeds. In brackets, for each seed: the last "
    f"stage that ended, as all before it, with at least {LEARNT:.0%}, which is the number of steps that the row passes "
    "over without writing them; - where stage 0 did not."
)


def validation(rows: list[dict]) -> float:
    """After the last epoch, mean over the seeds."""
    return statistics.mean(row["epochs"][-1]["accuracy"] for row in rows)


def stage_held(row: dict) -> int | None:
    """The last stage that ended, as all before it, with accuracy LEARNT; None where stage 0 did not."""
    held = None
    for stage, accuracy in sorted({record["stage"]: record["accuracy"] for record in row["epochs"]}.items()):
        if accuracy < LEARNT:
            break
        held = stage
    return held


def best_recipe(done: dict[str, list[dict]], most_flops: float = math.inf) -> str | None:
    """Of recipe -> its seeds, within so many FLOPs; None where there is none."""
    within = [recipe for recipe, rows in done.items() if rows[0]["flops"] <= most_flops]
    return max(within, key=lambda recipe: (validation(done[recipe]), -done[recipe][0]["flops"]), default=None)


def of_recipes(grid: Grid, results: dict[str, list[dict]]) -> list[str]:
    """Lines of Markdown; none for a grid without recipes."""
    if not grid.recipes:
        return []
    by_row: dict[str, dict[str, list[dict]]] = {}
    for run, rows in results.items():
        row, _, recipe = run.partition(".")
        by_row.setdefault(row, {})[recipe] = rows
    lines = ["", "## Recipes", "", TEXT, ""]
    lines += markdown(["recipe", *by_row], ([recipe, *_cells(recipe, by_row)] for recipe in grid.recipes))
    models = dict.fromkeys(spec.keys.get("model_id") for spec in grid.recipes.values())
    if len(models) > 1:
        lines += ["", "Steps that a row passes over at most, in any seed with any recipe, by model:", ""]
        head = ["row", *(Path(model or "as in the base file").name for model in models)]
        held = {row: [_most_held(grid, done, model) for model in models] for row, done in by_row.items()}
        lines += markdown(head, ([row, *cells] for row, cells in held.items()))
    return [*lines, *_choices(grid, by_row)]


def _choices(grid: Grid, by_row: dict[str, dict[str, list[dict]]]) -> list[str]:
    """The best recipe of each row, at any FLOPs and within those of the first row's, and their keys."""
    first = next(iter(by_row))
    budget = by_row[first][best_recipe(by_row[first])][0]["flops"]
    text = (
        "The best recipe of each row by validation accuracy, of equals the one with fewer FLOPs (of training and "
        f"evaluation), and the best within the FLOPs of that of {first}. The test split takes no part in the choice."
    )
    chosen = {row: (best_recipe(done), best_recipe(done, budget)) for row, done in by_row.items()}
    head = ["row", "best", "validation", "FLOPs", "best within", "validation", "FLOPs"]
    lines = ["", text, "", *markdown(head, ([row, *_choice(by_row[row], chosen[row])] for row in by_row))]
    lines += ["", "The runs of the table's own grid:", ""]
    for row, (best, within) in chosen.items():
        recipes = {row: best} if within in (best, None) else {row: best, f"{row}_flops": within}
        for name, recipe in recipes.items():
            lines.append(f"    {name}: {{keys: {json.dumps(grid.runs[f'{row}.{recipe}'].keys)}}}")
    return lines


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _cells(recipe: str, by_row: dict[str, dict[str, list[dict]]]) -> list[str]:
    return [_cell(done[recipe]) if recipe in done else "" for done in by_row.values()]


def _cell(rows: list[dict]) -> str:
    held = (stage_held(row) for row in rows)
    return f"{100 * validation(rows):.1f} ({' '.join('-' if stage is None else str(stage) for stage in held)})"


def _most_held(grid: Grid, done: dict[str, list[dict]], model: str | None) -> str:
    of_model = [rows for recipe, rows in done.items() if grid.recipes[recipe].keys.get("model_id") == model]
    held = [stage for rows in of_model for row in rows if (stage := stage_held(row)) is not None]
    return str(max(held)) if held else "-" if of_model else ""


def _choice(done: dict[str, list[dict]], recipes: tuple[str | None, ...]) -> list[str]:
    found = []
    for recipe in recipes:
        rows = done.get(recipe)
        found += [recipe, f"{100 * validation(rows):.1f}", f"{rows[0]['flops']:.2e}"] if rows else ["", "", ""]
    return found
