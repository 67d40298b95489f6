"""The part of a report for a grid with recipes: the best recipe of each row, by validation accuracy."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grid_file import Grid

LEARNT = 0.9  # a seed, or a stage, that reaches this accuracy counts as learnt
TEXT = (
    "Validation accuracy after the last epoch, in percent, mean over the seeds. In brackets, per seed: the last stage "
    f"that ended with at least {LEARNT:.0%}, that is, the number of steps that the row replaces without writing them; "
    "- if none did."
)


def validation(rows: list[dict]) -> float:
    """Returns the validation accuracy after the last epoch, mean over the seeds."""
    return statistics.mean(row["epochs"][-1]["accuracy"] for row in rows)


def last_learnt_stage(row: dict) -> int | None:
    """Returns the last stage that ended with accuracy LEARNT, None if none did. A model may learn to write the steps
    only in a later stage."""
    ended = {record["stage"]: record["accuracy"] for record in row["epochs"]}
    return max((stage for stage, accuracy in ended.items() if accuracy >= LEARNT), default=None)


def best_recipe(finished: dict[str, list[dict]], most_flops: float = math.inf) -> str | None:
    """Returns the best of recipe -> rows per seed within a number of FLOPs; None if there is none. A tie goes to the
    recipe with fewer FLOPs."""
    within = [recipe for recipe, rows in finished.items() if rows[0]["flops"] <= most_flops]
    return max(within, key=lambda recipe: (validation(finished[recipe]), -finished[recipe][0]["flops"]), default=None)


def of_recipes(grid: Grid, results: dict[str, list[dict]]) -> list[str]:
    """Returns the lines of Markdown; [] for a grid without recipes."""
    if not grid.recipes:
        return []
    by_row: dict[str, dict[str, list[dict]]] = {}
    for run, rows in results.items():
        row, _, recipe = run.rpartition(".")
        by_row.setdefault(row, {})[recipe] = rows
    cells = ([recipe, *(_validation_cell(of.get(recipe)) for of in by_row.values())] for recipe in grid.recipes)
    lines = ["", "## Recipes", "", TEXT, "", *markdown(["recipe", *by_row], cells)]
    models = dict.fromkeys(spec.keys.get("model_id") for spec in grid.recipes.values())
    if len(models) > 1:
        lines += ["", "Most steps that a row replaces, in any seed with any recipe, by model:", ""]
        head = ["row", *(Path(model or "as in the base file").name for model in models)]
        cells = ([row, *(_most_steps(grid, of, model) for model in models)] for row, of in by_row.items())
        lines += markdown(head, cells)
    return [*lines, *_choices(grid, by_row)]


def _choices(grid: Grid, by_row: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Returns the best recipe of each row, at any FLOPs and within those of the first row's, and their keys."""
    first = next(iter(by_row))
    budget = by_row[first][best_recipe(by_row[first])][0]["flops"]
    text = (
        "The best recipe of each row by validation accuracy; a tie goes to the one with fewer FLOPs (of training and "
        f"evaluation). Beside it the best within the FLOPs of {first}'s. The choice does not use the test split."
    )
    chosen = {row: (best_recipe(of), best_recipe(of, budget)) for row, of in by_row.items()}
    head = ["row", "best", "validation", "FLOPs", "best within", "validation", "FLOPs"]
    cells = ([row, *(cell for one in chosen[row] for cell in _recipe_cells(of, one))] for row, of in by_row.items())
    lines = ["", text, "", *markdown(head, cells), "", "The runs of the grid that compares the rows:", ""]
    for row, (best, within) in chosen.items():
        recipes = {row: best} if within in (best, None) else {row: best, f"{row}_flops": within}
        for name, recipe in recipes.items():
            lines.append(f"    {name}: {{keys: {json.dumps(grid.runs[f'{row}.{recipe}'].keys)}}}")
    return lines


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Returns the lines of a table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _validation_cell(rows: list[dict] | None) -> str:
    if rows is None:
        return ""
    stages = (last_learnt_stage(row) for row in rows)
    return f"{100 * validation(rows):.1f} ({' '.join('-' if stage is None else str(stage) for stage in stages)})"


def _most_steps(grid: Grid, finished: dict[str, list[dict]], model: str | None) -> str:
    rows = [
        row
        for recipe, of_recipe in finished.items()
        if grid.recipes[recipe].keys.get("model_id") == model
        for row in of_recipe
    ]
    stages = [stage for row in rows if (stage := last_learnt_stage(row)) is not None]
    return str(max(stages)) if stages else "-" if rows else ""


def _recipe_cells(finished: dict[str, list[dict]], recipe: str | None) -> list[str]:
    rows = finished.get(recipe)
    return [recipe, f"{100 * validation(rows):.1f}", f"{rows[0]['flops']:.2e}"] if rows else ["", "", ""]
