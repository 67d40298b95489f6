"""Reads the YAML file of a grid of experiments into a `Grid`. `grid.py` runs it."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import typing
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType

from config import NOTHING, converted, expanded, read_yaml, shown
from utils import UserError


@dataclass(frozen=True)
class RunSpec:
    """A row of a grid: one run per seed."""

    keys: dict = field(default_factory=dict)  # keys of run.py, on top of the base file and the grid's keys
    base: str | None = None  # its base file; default: the grid's
    row: str | None = None  # a row of the base file
    begins_with: str | None = None  # the beginning or run whose weights it starts from. It continues at the epoch where
    # that run ends, or starts at epoch 0 if that run has other training data
    seeds: tuple[int, ...] | None = None  # default: the grid's
    label: str | None = None  # its name in tables and figures; default: its name in the file
    paper: str | None = None  # the paper's accuracy

    @property
    def overrides(self) -> list[str]:
        chosen = {} if self.row is None else {"row": self.row}
        return [f"{key}={_spelled(value)}" for key, value in (chosen | self.keys).items()]


@dataclass(frozen=True)
class Grid:
    """The content of a grid's YAML file."""

    name: str  # the file's name, without its suffix
    title: str
    base: str  # a file of args/
    save_path: str
    runs: dict[str, RunSpec]
    test_path: str
    task: str | None = None  # another grid's file in the same folder, from which this one takes the missing TASK_KEYS
    needs: dict[str, str] = field(default_factory=dict)  # file -> the script, with its arguments, that makes it
    keys: dict = field(default_factory=dict)  # keys of run.py for all runs, not for beginnings
    beginnings: dict[str, RunSpec] = field(default_factory=dict)  # runs that only provide initial weights
    recipes: dict[str, RunSpec] = field(default_factory=dict)  # each run is made once per recipe, as RUN.RECIPE
    seeds: tuple[int, ...] = (0, 1, 2)
    controls: tuple[str, ...] = ()  # runs that the table compares each run with
    checkpoint: str = "newest"  # newest | best (validation): the one that is tested and that other runs start from
    untrained: tuple[int, ...] = ()  # numbers of steps that only the test split has
    chance: float | None = None  # accuracy of guessing
    prediction: str = ""  # written before the runs
    about: str = ""  # a paragraph for the report


NAME = re.compile(r"\w[\w.-]*")  # of a run; part of folder names and commands
TASK_KEYS = ("base", "save_path", "test_path", "beginnings", "untrained", "chance")  # and the union of `needs`
PATHS = ("base", "task", "save_path", "test_path")
GRID_KEYS = ("name", "seed", "save_path", "test_path", "debug")  # keys that a run may not set


def _spelled(value) -> str:
    """Returns a value as the command line takes it: quoted only if YAML would read the bare text as something else."""
    if isinstance(value, str) and value.isprintable() and value == value.strip() and not value.startswith(("'", '"')):
        return value
    return json.dumps(value, ensure_ascii=False)  # YAML reads an escaped pair of surrogates as two characters


def read_grid(path: Path, seen: tuple[Path, ...] = ()) -> Grid:
    """Reads a grid. `seen`: the grids that take its task. Raises UserError that lists all mistakes."""
    if path.resolve() in seen:
        raise UserError(f"{path}: 'task' leads back to this file")
    problems: list[str] = []
    values = read_yaml(path)
    grid = _fields(Grid, values, str(path), problems)
    for name in ("runs", "beginnings", "recipes"):
        if name in grid:
            grid[name] = {
                run: RunSpec(**_fields(RunSpec, spec or {}, f"{path}: {name}: {run}", problems))
                for run, spec in grid[name].items()
            }
    if grid.get("task"):
        task = read_grid(path.parent / grid["task"], (*seen, path.resolve()))
        grid = {key: getattr(task, key) for key in TASK_KEYS} | grid | {"needs": task.needs | grid.get("needs", {})}
    for name in ("title", "base", "save_path", "runs", "test_path"):
        if name not in values and name not in grid:
            problems.append(f"{path} lacks {name!r}")
    grid = {"runs": {}, "beginnings": {}, "recipes": {}} | grid
    grid["runs"] = {run: replace(spec, keys=grid.get("keys", {}) | spec.keys) for run, spec in grid["runs"].items()}
    if grid["recipes"]:
        grid["runs"] = {
            f"{run}.{recipe}": replace(spec, keys=spec.keys | of.keys, label=f"{spec.label or run}, {recipe}")
            for run, spec in grid["runs"].items()
            for recipe, of in grid["recipes"].items()
        }
    for recipe, of in grid["recipes"].items():
        if "." in recipe:  # recipes.py splits RUN.RECIPE at the last one
            problems.append(f"{path}: recipe {recipe!r}: a name is letters, digits, - and _")
        if of != RunSpec(keys=of.keys):
            problems.append(f"{path}: recipe {recipe!r} can only set 'keys'")
    problems += [f"{path}: {text}" for text in _grid_problems(grid)]
    if problems:
        raise UserError("; ".join(problems))
    return Grid(name=path.stem, **grid)


def _grid_problems(grid: dict) -> list[str]:
    """Returns the mistakes in names, keys and references of a grid, a sentence each."""
    every = grid["beginnings"] | grid["runs"]
    found = [f"{name!r} is both a run and a beginning" for name in grid["beginnings"].keys() & grid["runs"].keys()]
    found += [f"run {name!r}: a name is letters, digits, - _ and ." for name in every if not NAME.fullmatch(name)]
    for name, spec in every.items():
        if fixed := [key for key in GRID_KEYS if key in spec.keys]:
            found.append(f"run {name!r} cannot set {' and '.join(fixed)}: the grid sets them")
        begin = every.get(spec.begins_with)
        if spec.begins_with is not None and (begin is None or begin.begins_with is not None):
            found.append(
                f"run {name!r} begins with {spec.begins_with!r}, which must be a beginning or a run without begins_with"
            )
    if len({spec.keys.get("max_eval_examples") for spec in grid["runs"].values()}) > 1:
        found.append("all runs need the same max_eval_examples: a table compares them on the same questions")
    for control in set(grid.get("controls", ())) - grid["runs"].keys():
        found.append(f"control {control!r} is no run of the grid")
    if grid.get("checkpoint", "newest") not in ("newest", "best"):
        found.append(f"'checkpoint' must be newest or best, not {grid['checkpoint']!r}")
    for file, script in grid.get("needs", {}).items():
        if not _is_command(script):
            found.append(f"'needs' takes FILE: the script, with its arguments, that makes it; not {file!r}: {script!r}")
    return found


def _is_command(text) -> bool:
    """Returns whether a value is a text that a shell splits into words."""
    with suppress(ValueError):  # an open quotation
        return isinstance(text, str) and bool(shlex.split(text))
    return False


def _fields(cls, values, where: str, problems: list[str]) -> dict:
    """Returns the fields of a dataclass that a YAML mapping sets; appends unknown names and wrong types to problems."""
    kinds = typing.get_type_hints(cls)
    kinds.pop("name", None)  # a grid has the name of its file
    if not isinstance(values, dict):
        problems.append(f"{where} must hold `key: value` lines")
        return {}
    found = {}
    for name, value in values.items():
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            problems.append(f"{where}: unknown key {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
            continue
        try:
            found[name] = _checked(name, _typed(value, kinds[name]))
        except ValueError as error:
            problems.append(f"{where}: {name!r} {error}, not {shown(value)}")
    return found


def _checked(name: str, value):
    """Returns the value of a field, a path expanded. Raises ValueError for a value of the right type that is wrong."""
    if value is None:
        return None
    if name == "runs" and not value:
        raise ValueError("must hold a run")
    if name == "seeds" and not 0 < len(value) == len(set(value)):
        raise ValueError("must be a list of different whole numbers")
    if name == "chance" and not 0 <= value <= 1:
        raise ValueError("must be from 0 to 1")
    return expanded(value) if name in PATHS else value


def _typed(value, kind):
    """Returns a YAML value as the annotated type of a field. Raises ValueError that says what was expected."""
    options = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    main = options[0]
    if value in NOTHING and NoneType in options:
        return None
    if main is dict or typing.get_origin(main) is dict:
        if isinstance(value, dict):
            return value
        raise ValueError("must be `key: value` lines")
    if typing.get_origin(main) is tuple:
        item = typing.get_args(main)[0]
        if isinstance(value, list):
            with suppress(ValueError):
                return tuple(converted(text, item) for text in value)
        raise ValueError(f"must be a list of {'texts' if item is str else 'whole numbers'}")
    return converted(value, main)
