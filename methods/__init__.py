"""The protocol of a method. A method is one file of this folder, found by its name; everything else works without it.

The upper part of a file needs no torch: its docstring and `class Method`, with the method's own keys, the defaults that
it sets for other keys, the combinations that it rejects, and its older spellings. The lower part starts at the first
import of torch, or of a module that imports torch, and holds the model and the dataset. config.py runs the upper part
only (`rules_of`), so that --help and error messages appear at once; `implementation` imports the whole file.
docs/contributing.md shows an example.

A thought may be registered with `@register("name", takes=":N")` in any file of this folder.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from math import inf
from pathlib import Path

FOLDER = Path(__file__).parent
SLOW = {"torch", "transformers", "coconut", "dataset", "model", "trainer"}  # importing one of these ends the upper part
LARGEST_SAMPLE = 100_000  # upper limit of the answers to one question
LARGEST_FACTOR = 1e30  # upper limit of a loss weight or learning rate: products with gradients must fit float32


def key(
    default,
    text,
    *,
    choices=(),
    low=-inf,
    high=inf,
    check=None,
    free=False,
    later=False,
    empty=False,
    shapes=False,
    file=False,
):
    """Returns the dataclass field of a key: its default, its text for --help and its limits.

    choices, low, high: the allowed values. check: a function of the value that raises ValueError. free: the key does
    not affect the trained weights, so it may change when a run is continued. later: the key was added after results in
    experiments/ were recorded; those results had its default. empty: `key=` sets the empty string instead of nothing.
    shapes: the key affects a model's sequences, so checkpoints record it. file: it may be a path.
    """
    limits = {"choices": choices, "low": low, "high": high, "check": check, "free": free, "later": later}
    limits |= {"empty": empty, "shapes": shapes, "file": file}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


class Texts(typing.NamedTuple):
    """Auxiliary texts of an example."""

    name: dict  # identifies them in the token cache
    steps: Callable[[Sequence[str]], list[str]]  # the example's steps -> the texts that replace them
    in_one_sequence: bool = False  # whether the model reads the question, all texts and the answer together


class Method:
    """The part of a method that needs no torch. Its own keys are annotated fields made by `key`. A static function with
    the name of a `@replaceable` function of curriculum.py replaces that function."""

    has_latents = False  # whether its sequences have latent positions
    has_stages = True  # if False, every epoch has the latents of the last stage
    predicts_end_marker = False  # whether the model writes the end marker itself, after its latents
    variant_of: str | None = None  # method with the same sequences: its checkpoints fit; older results have its name
    needs: tuple[str, ...] = ()  # other files of this folder that it imports
    evaluates_as_coconut = False  # whether only its training differs: evaluation runs its weights in a plain Coconut
    generates = False  # whether its training steps generate answers; `run.py --plan` cannot count these
    n_companions = 0  # further models of the same size that are trained with it
    defaults: typing.ClassVar[dict] = {}  # key -> default, used when `method` names this method

    @staticmethod
    def problems(config) -> Iterable[str]:
        """Returns one sentence for each invalid combination in a config.Config. It is called for every method, since a
        key of this one may be set under another."""
        return []

    @staticmethod
    def texts(config) -> Texts | None:
        """Returns the auxiliary texts of each example; their tokens are `tokens.auxiliary`."""
        return None

    @staticmethod
    def variants(config) -> list:
        """Returns the configurations of all sequences that a training step builds from one example."""
        return [config]

    @staticmethod
    def output(tokens: list[int], markers) -> list[int]:
        """Returns the part of the generated tokens that is the model's output."""
        return tokens

    @staticmethod
    def options(config) -> dict:
        """Returns the keyword arguments of its model's constructor, besides those of Coconut."""
        return {}

    @staticmethod
    def mixes_in(config) -> bool:
        """Whether its model and dataset are combined with those of another method."""
        return False

    @staticmethod
    def older(values: dict) -> None:
        """Rewrites an older spelling of this method in place."""


class _WithLatents(Method):
    has_latents = True


CORE = {"coconut": _WithLatents, "cot": Method, "no_cot": Method, "no_thoughts": Method}


@cache
def _trees() -> dict[str, tuple[Path, ast.Module]]:
    paths = [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    return {path.stem: (path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for path in paths}


def _is_slow(node: ast.stmt) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return any(name.partition(".")[0] in SLOW or name.startswith("methods.") for name in names)


@cache
def all_rules() -> dict[str, type[Method]]:
    """Returns name -> class Method for every method, the core's first. Methods that need an absent file are left
    out."""
    rules_by_name = dict(CORE)
    for name, (path, tree) in _trees().items():
        end = next((number for number, node in enumerate(tree.body) if _is_slow(node)), len(tree.body))
        upper = tree.body[:end]
        if any(isinstance(node, ast.ClassDef) and node.name == "Method" for node in upper):
            module = types.ModuleType(f"methods.{name}")
            exec(compile(ast.Module(upper, []), str(path), "exec"), vars(module))
            rules_by_name[name] = module.Method
    return {name: rules for name, rules in rules_by_name.items() if rules_by_name.keys() >= {*rules.needs}}


def names() -> tuple[str, ...]:
    return tuple(all_rules())


def rules_of(name: str) -> type[Method]:
    return all_rules()[name]


def modern(values: dict) -> dict:
    """Returns the keys in their current spelling. Older configurations and checkpoints name some methods
    differently."""
    values = dict(values)
    for rules in all_rules().values():
        rules.older(values)
    return values


def with_defaults(values: dict) -> dict:
    """Returns `modern(values)` with the method's defaults if `method` names it; an older spelling had no such
    defaults."""
    values, given = modern(values), values.get("method")
    rules = all_rules().get(given)
    return {**rules.defaults, **values} if rules and values["method"] == given else values


def own_keys(rules: type[Method]) -> Iterator[tuple[str, str, dataclasses.Field]]:
    """Yields (name, annotation, field) of each key that a method defines."""
    for name, annotation in inspect.get_annotations(rules).items():
        if isinstance(field := vars(rules)[name], dataclasses.Field):
            yield name, annotation, field


def thoughts() -> Iterator[tuple[str, str, str]]:
    """Yields (name, what may follow the name, module) of each thought registered in this folder."""
    for module, (_, tree) in _trees().items():
        for node in tree.body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "register":
                    takes = {word.arg: word.value.value for word in call.keywords}.get("takes", "")
                    yield call.args[0].value, takes, f"methods.{module}"


def implementation(name: str) -> types.ModuleType:
    """Imports and returns the whole file of a method, with torch. It may define MODEL, a subclass of Coconut; DATASET,
    a subclass of StageDataset; `validate`, with the arguments of trainer.evaluate.evaluate; and `on_device(run,
    batch)`, which turns a training batch into the model's arguments, for example by sampling answers and computing
    rewards."""
    return importlib.import_module(f"methods.{name}")
