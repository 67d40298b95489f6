"""Writes results/ladder.md, a table of all methods on three tasks, from the results of the ladder's grids.

for task in machine breadth mirrored2; do python experiments/grid.py experiments/ladder_$task.yaml; done
python experiments/ladder.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from grid_file import Grid, read_grid
from jobs import read_results
from recipes import markdown
from tables import accuracies

from trainer.commands import command, make_parser
from trainer.files import write_whole
from utils import print_result

TASKS = ("machine", "breadth", "mirrored2")
TEXT = """\
# The ladder of methods

    python experiments/ladder.py

Accuracy, in percent, on the test questions whose number of steps is in the training data: mean over the seeds, then
each seed. All rows of a task cost the same training FLOPs (`python experiments/flops.py`). Empty cells were not run.
"""


def as_text(grids: list[Grid], results: list[dict[str, list[dict]]]) -> str:
    """Returns the text of ladder.md. results: for each grid, run -> a row per seed."""
    pairs = list(zip(grids, results, strict=True))
    head = ["method", *(f"[{grid.title}]({grid.name}.md)" if of else grid.title for grid, of in pairs)]
    labels = {run: spec.label or run for grid in grids for run, spec in grid.runs.items()}
    rows = [[label, *(_cell(grid, of.get(run, [])) for grid, of in pairs)] for run, label in labels.items()]
    chance = ["chance", *(f"{100 * grid.chance:.1f}" for grid in grids)]
    return "\n".join([TEXT, *markdown(head, [*rows, chance])]) + "\n"


def _cell(grid: Grid, rows: list[dict]) -> str:
    found = [100 * accuracy for accuracy in accuracies(grid, rows)]
    return f"{statistics.mean(found):.1f} ({' '.join(f'{one:.1f}' for one in found)})" if found else ""


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results (default: results/)")
    options = parser.parse_args(arguments)
    grids = [read_grid(ROOT / "experiments" / f"ladder_{task}.yaml") for task in TASKS]
    text = as_text(grids, [read_results(grid, options.out) for grid in grids])
    write_whole(options.out / "ladder.md", text)
    print_result(text)


if __name__ == "__main__":
    sys.exit(main())
