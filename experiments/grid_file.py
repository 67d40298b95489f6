"""What a grid of experiments is: its YAML file, as an object. `grid.py` runs it."""

from __future__ import annotations

import difflib
import json
import re
import typing
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType

from config import NOTHING, converted, expanded, read_yaml, shown
from utils import UserError


@dataclass(frozen=True)
class RunSpec:
    """A row of a grid: one run for each seed."""

    keys: dict = field(default_factory=dict)  # of run.py, on top of the grid's base file
    base: str | None = None  # where it has another file than the grid
    row: str | None = None  # of that file
    begins_with: str | None = None  # the beginning or run whose weights it takes; it starts after that one's epochs,
    # or, where that one was trained on other data, at epoch 0
    seeds: tuple[int, ...] | None = None  # where it has others than the grid
    label: str | None = None  # in tables and figures; default its name
    paper: str | None = None  # what the paper has for it

    @property
    def overrides(self) -> list[str]:
        chosen = {} if self.row is None else {"row": self.row}
        return [f"{key}={_spelled(value)}" for key, value in (chosen | self.keys).items()]


@dataclass(frozen=True)
class Grid:
    """A grid's YAML file, read by `read_grid`."""

    name: str
    title: str
    base: str  # a file of args/
    save_path: str
    runs: dict[str, RunSpec]
    test_path: str
    needs: dict[str, str] = field(default_factory=dict)  # file -> the script, with its arguments, that makes it
    beginnings: dict[str, RunSpec] = field(default_factory=dict)
    recipes: dict[str, RunSpec] = field(default_factory=dict)  # each run is made with the keys of each, as RUN.RECIPE
    seeds: tuple[int, ...] = (0, 1, 2)
    controls: tuple[str, ...] = ()  # runs that the others are compared with, question by question
    checkpoint: str = "newest"  # which of a run's is tested, and begins another: newest | best, in validation
    untrained: tuple[int, ...] = ()  # numbers of steps that the test has and training has not
    chance: float | None = None  # accuracy of guessing
    prediction: str = ""  # written before the runs
    about: str = ""  # a paragraph for the report


NAME = re.compile(r"\w[\w.-]*")  # of a run: folders and commands bear it
OF_THE_GRID = ("name", "seed", "save_path", "debug")  # keys that are not a run's to set


def _spelled(value) -> str:
    """A value as the command line takes it: text as it is, unless YAML would read it as something else."""
    if isinstance(value, str) and value.isprintable() and value == value.strip() and not value.startswith(("'", '"')):
        return value
    return json.dumps(value)


def read_grid(path: Path) -> Grid:
    """Reads a grid. Raises UserError that lists what is wrong with it."""
    problems: list[str] = []
    values = read_yaml(path)
    known = _known(Grid, values, str(path), problems)
    for name in ("title", "base", "save_path", "runs", "test_path"):
        if name not in values:
            problems.append(f"{path} lacks {name!r}")
    for name in ("runs", "beginnings", "recipes"):
        specs = known.get(name) or {}
        known[name] = {
            run: RunSpec(**_known(RunSpec, {} if spec == "" else spec, f"{path}: {name}: {run}", problems))
            for run, spec in specs.items()
        }
    if known["recipes"]:
        known["runs"] = {
            f"{run}.{recipe}": replace(spec, keys=spec.keys | of.keys, label=f"{spec.label or run}, {recipe}")
            for run, spec in known["runs"].items()
            for recipe, of in known["recipes"].items()
        }
    problems += [f"{path}: {text}" for text in _of_grid(known)]
    if problems:
        raise UserError("; ".join(problems))
    return Grid(**{"name": path.stem, **known})


def _of_grid(known: dict) -> list[str]:
    """What is wrong with names, keys and beginnings of runs, and with what names them."""
    every = known["beginnings"] | known["runs"]
    found = [f"{name!r} is both a run and a beginning" for name in known["beginnings"].keys() & known["runs"].keys()]
    found += [f"run {name!r}: a name is letters, digits, - _ and ." for name in every if not NAME.fullmatch(name)]
    for name, spec in every.items():
        if fixed := [key for key in OF_THE_GRID if key in spec.keys]:
            found.append(f"run {name!r} cannot set {' and '.join(fixed)}: these are the grid's")
        begin = every.get(spec.begins_with)
        if spec.begins_with is not None and (begin is None or begin.begins_with is not None):
            found.append(
                f"run {name!r} begins with {spec.begins_with!r}, but there is no such beginning, nor a run that begins "
                f"with nothing"
            )
    for control in set(known.get("controls", ())) - known["runs"].keys():
        found.append(f"control {control!r} is no run of the grid")
    if known.get("checkpoint", "newest") not in ("newest", "best"):
        found.append(f"'checkpoint' must be newest or best, not {known['checkpoint']!r}")
    for file, script in known.get("needs", {}).items():
        if not isinstance(script, str) or not script:
            found.append(f"'needs' takes FILE: the script, with its arguments, that makes it; not {file!r}: {script!r}")
    return found


def _known(cls, values, where: str, problems: list[str]) -> dict:
    """The fields of a class that are set; what is no field of it, or of another type, is a problem."""
    kinds = typing.get_type_hints(cls)
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
            found[name] = _typed(value, kinds[name])
            if name in ("save_path", "test_path"):
                found[name] = expanded(found[name])
        except ValueError as error:
            problems.append(f"{where}: {name!r} {error}, not {shown(value)}")
    return found


def _typed(value, kind):
    """What a grid has as the annotated type of a field. Raises ValueError with what was expected."""
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
