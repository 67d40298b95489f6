"""The committed tables follow from the committed numbers."""

import json

import breadth_thoughts
import pytest
import tables
from conftest import ROOT
from grid_file import read_grid

NAMES = sorted(
    path.stem for path in (ROOT / "results").glob("*.json") if (ROOT / f"experiments/{path.stem}.yaml").exists()
)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_follows_from_its_numbers(name, monkeypatch):
    """The whole text, except for the accuracy of shortcuts, which needs the data."""
    written = (ROOT / "results" / f"{name}.md").read_text()
    shortcuts = [line for line in written.splitlines() if line.startswith("Accuracy of shortcuts")]
    monkeypatch.setattr(tables, "shortcut_accuracies", lambda grid: [*shortcuts, ""] if shortcuts else [])
    grid = read_grid(ROOT / "experiments" / f"{name}.yaml")
    numbers = json.loads((ROOT / "results" / f"{name}.json").read_text())
    results = {run: numbers[run] for run in grid.runs if run in numbers}
    command = next(line for line in written.splitlines() if line.startswith("    python experiments/grid.py"))
    assert tables.as_text(grid, results, command.partition(".yaml")[2]) == written


@pytest.mark.parametrize("folder", ["", "breadth_recipes_thoughts", "breadth_markov_thoughts"])
def test_breadth_thoughts_follows_from_its_numbers(folder):
    written = ROOT / "results" / folder
    numbers = json.loads((written / "breadth_thoughts.json").read_text())
    assert breadth_thoughts.as_text(numbers) == (written / "breadth_thoughts.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_agree_with_each_other(name):
    for rows in json.loads((ROOT / "results" / f"{name}.json").read_text()).values():
        for row in rows:
            right = tables.answers(row)
            assert right.mean() == pytest.approx(row["accuracy"])
            for n in row["by_steps"] if "steps" in row else ():
                of_steps = [one for one, steps in zip(right, row["steps"].split(), strict=True) if steps == n]
                assert sum(of_steps) / len(of_steps) == pytest.approx(row["by_steps"][n])
