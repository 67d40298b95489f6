"""Prints the table of a run, or evaluates all of its checkpoints.

python -m tools.evaluate checkpoints/NAME                              # prints its stages and its best checkpoint
python -m tools.evaluate checkpoints/NAME --all data/gsm_test.json     # evaluates every checkpoint on a file
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import chain, count
from pathlib import Path

from curriculum import stage_name
from preprocessing.examples import load_examples
from trainer.commands import command, make_parser
from trainer.evaluate import HEADER, named_best, row_of, summary
from trainer.files import why_unreadable
from trainer.run_folder import best_with_warnings, checkpoints, is_epoch_checkpoint, run_checkpoints
from utils import UserError, print_result, progress_bar, read_object


def evaluate_all(run_dir: Path, file: str) -> tuple[str, list[str]]:
    """Evaluates every checkpoint of a finished epoch with run.py, and writes RUN/evaluations/FILE/CHECKPOINT/eval.

    Another file of the same name gets the folder FILE_2, and so on.

    Returns a table that marks the best checkpoint in validation, and a sentence for each failed evaluation. Prints the
    warnings of run.py, each once. Raises UserError without a checkpoint.
    """
    paths, everything = ([*filter(is_epoch_checkpoint, find(run_dir))] for find in (checkpoints, run_checkpoints))
    if not paths:
        raise UserError(f"{run_dir} holds no checkpoint of a finished epoch")
    load_examples(file)  # its mistakes would be those of every evaluation
    failed = [f"{path} could not be evaluated: it is damaged" for path in everything if path not in paths]
    rows, folder, chosen = [HEADER], _folder_of(run_dir / "evaluations", file), best_with_warnings(run_dir)
    warned: set[str] = set()
    for path in progress_bar(paths, "evaluating", "checkpoint", shown=True):
        keys = {"only_eval": True, "from_scratch": False, "load_model_path": str(path), "val_path": file, "resume": 0}
        keys |= {"max_eval_examples": None}  # the run's own value limits its validation
        keys |= {"save_path": str(folder), "name": path.name, "wandb": "disabled"}
        # without escapes: YAML reads a pair of surrogates as two characters
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
        command = [sys.executable, Path(__file__).parent.parent / "run.py", run_dir / "config.yaml", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        for warning in [line for line in lines if line.startswith("warning: ")]:
            general = warning.replace(str(path), "a checkpoint")  # most warnings hold for every checkpoint
            if general not in warned:
                print(general, file=sys.stderr, flush=True)
            warned.add(general)
        if done.returncode:
            error = re.search("^error: (.*)", done.stderr, re.MULTILINE | re.DOTALL)  # a line for each problem
            reason = error[1].strip() if error else [*lines[-1:], "no reason given"][0]
            failed.append(f"{path} could not be evaluated: {reason}")
            continue
        metrics = read_object(folder / path.name / "eval" / "metrics.json")
        mark = ", best" if path == chosen else ""
        rows.append(
            row_of(f"{path.name}, stage {stage_name(metrics['stage'])}{mark}", "", metrics, f"{metrics['seconds']:.1f}")
        )
    return "\n".join(rows), failed


def _folder_of(evaluations: Path, file: str) -> Path:
    """Returns the first of STEM, STEM_2, ... that holds evaluations of this file or none."""

    def holds_others(folder: Path) -> bool:
        files = (str(read_object(path).get("file")) for path in folder.glob("*/eval/metrics.json"))
        return any(Path(other).resolve() != Path(file).resolve() for other in files)

    stem = evaluations / Path(file).stem
    folders = chain([stem], (stem.with_name(f"{stem.name}_{number}") for number in count(2)))
    return next(folder for folder in folders if not holds_others(folder))


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run: save_path/name")
    parser.add_argument("--all", metavar="FILE", help="evaluate all of its checkpoints on this data file")
    options = parser.parse_args(arguments)
    if reason := why_unreadable(options.run):
        raise UserError(f"{options.run} cannot be reached: {reason}")
    if options.all is not None:
        found, failed = evaluate_all(options.run, options.all)
    else:
        found, failed = summary(options.run), []
    print_result("\n".join(filter(None, (found, named_best(options.run)))))
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    sys.exit(main())
