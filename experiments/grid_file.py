"""What a grid of experiments is: its YAML file, as an object. `grid.py` runs it."""

from __future__ import annotations

import difflib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType

import yaml

from utils import UserError


@dataclass(frozen=True)
class RunSpec:
    """A row of a grid: one run for each seed."""

    keys: dict = field(default_factory=dict)  # of run.py, on top of the grid's base file
    base: str | None = None  # where it has another file than the grid
    begins_with: str | None = None  # the beginning or run whose weights it takes; it starts after that one's epochs,
    # or, where that one was trained on other data, at epoch 0
    seeds: tuple[int, ...] | None = None  # where it has others than the grid
    label: str | None = None  # in tables and figures; default its name
    paper: str | None = None  # what the paper has for it

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={_spelled(value)}" for key, value in self.keys.items()]


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
    seeds: tuple[int, ...] = (0, 1, 2)
    controls: tuple[str, ...] = ()  # runs that the others are compared with, question by question
    chance: float | None = None  # accuracy of guessing
    prediction: str = ""  # written before the runs
    about: str = ""  # a paragraph for the report


def _spelled(value) -> str:
    if isinstance(value, str) and not value.isprintable():  # YAML's own spelling of a newline is two lines
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def read_grid(path: Path) -> Grid:
    """Reads a grid. Raises UserError that lists what is wrong with it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a grid: `key: value` lines")
    problems: list[str] = []
    known = _known(Grid, values, str(path), problems)
    for name in ("title", "base", "save_path", "runs", "test_path"):
        if name not in values:
            problems.append(f"{path} lacks {name!r}")
    for name in ("runs", "beginnings"):
        specs = known.get(name) or {}
        known[name] = {
            run: RunSpec(**_known(RunSpec, spec or {}, f"{path}: {name}: {run}", problems))
            for run, spec in specs.items()
        }
    for run, spec in known["runs"].items():
        begin = (known["beginnings"] | known["runs"]).get(spec.begins_with)
        if spec.begins_with is not None and (begin is None or begin.begins_with is not None):
            problems.append(
                f"{path}: run {run!r} begins with {spec.begins_with!r}, but there is no such beginning, nor a run that "
                "begins with nothing"
            )
    for control in known.get("controls", ()):
        if control not in known["runs"]:
            problems.append(f"{path}: control {control!r} is no run of the grid")
    if problems:
        raise UserError("; ".join(problems))
    return Grid(**{"name": path.stem, **known})


def _known(cls, values, where: str, problems: list[str]) -> dict:
    """The fields of a class that are set; what is no field of it, or of another type, is a problem."""
    kinds = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        problems.append(f"{where} must hold `key: value` lines")
        return {}
    found = {}
    for name, value in values.items():
        if name not in kinds:
            close = difflib.get_close_matches(str(name), kinds, 1)
            problems.append(f"{where}: unknown key {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
        elif not _is_of(value, kinds[name]):
            problems.append(f"{where}: {name!r} must be {_in_words(kinds[name])}, not {value!r}")
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _options(kind) -> list:
    return list(typing.get_args(kind)) if isinstance(kind, UnionType) else [kind]


def _is_of(value, kind) -> bool:
    """Whether what YAML has read is of the annotated type of a field."""
    for option in _options(kind):
        plain, inner = typing.get_origin(option) or option, typing.get_args(option)
        if plain is tuple and isinstance(value, list) and all(isinstance(item, inner[0]) for item in value):
            return True
        if plain is not tuple and isinstance(value, (int, float) if plain is float else plain):
            return True
    return False


def _in_words(kind) -> str:
    words = {dict: "`key: value` lines", str: "text", float: "a number", tuple[int, ...]: "a list of whole numbers"}
    words |= {tuple[str, ...]: "a list of texts"}
    known = [option for option in _options(kind) if option is not NoneType]
    return " or ".join(words[option if option in words else typing.get_origin(option)] for option in known)
