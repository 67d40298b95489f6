"""The protocol of a method: one file of this folder, found by its name, without which everything else still works.

A file begins with what needs no torch: its docstring and `class Method`, with the method's own keys, the defaults that
it gives to others', what it excludes, and how it was spelled before. Below that, from the first import of torch or of
what imports torch on, stand its model and its dataset. config.py reads the upper part alone (`rules_of`), so that
--help and every complaint come at once; `implementation` imports the whole. docs/contributing.md shows a file.

A thought is registered by `@register("name", takes=":N")` in any file of this folder, and found likewise.
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
SLOW = {"torch", "transformers", "coconut", "dataset", "model", "trainer"}  # the import of one ends the upper part
LARGEST_FACTOR = 1e30  # of what a gradient is multiplied with: it has to stay a float32


def key(
    default, text, *, choices=(), low=-inf, high=inf, check=None, free=False, later=False, empty=False, shapes=False
):
    """A key with its text for --help and its limits: `check` raises ValueError. `free` where it does not decide what
    the weights become, so that it may change between a run and its continuation; `later` where results of experiments/
    are older than the key, and had its default; `empty` where nothing, as in `key=`, is the empty text; `shapes` where
    it decides what a model's sequences look like, so that checkpoints record it."""
    limits = {"choices": choices, "low": low, "high": high, "check": check, "free": free, "later": later}
    return dataclasses.field(default=default, metadata={"help": text, "empty": empty, "shapes": shapes, **limits})


class Texts(typing.NamedTuple):
    """Other texts in place of an example's steps, and what names their tokens in the cache."""

    name: dict
    steps: Callable[[Sequence[str]], list[str]]


class Method:
    """What a method is, without torch. Its own keys are annotated fields made by `key`; a static function that is
    named as one of curriculum.py's `@replaceable` functions takes its place."""

    has_latents = False  # whether its sequences have latent positions
    has_stages = True  # where not, its latents are always those of the last stage
    goes_on_at_once = True  # whether the text that follows its latents is predicted right after them
    variant_of: str | None = None  # the method with the same sequences, as which checkpoints and results recorded it
    needs: tuple[str, ...] = ()  # other files of this folder
    n_companions = 0  # models of the same size that are trained beside it
    defaults: typing.ClassVar[dict] = {}  # of any keys, where it is chosen by its name

    @staticmethod
    def problems(config) -> Iterable[str]:
        """What is impossible about a config.Config, a sentence each; called whatever the method, for a key of this one
        may be set under another."""
        return []

    @staticmethod
    def texts(config) -> Texts | None:
        """Other texts of each example that are tokenized too, as `tokens.auxiliary`."""
        return None

    @staticmethod
    def variants(config) -> list:
        """The configurations of all sequences that a training step sees of an example."""
        return [config]

    @staticmethod
    def output(tokens: list[int], markers) -> list[int]:
        """What of generated tokens is the model's output."""
        return tokens

    @staticmethod
    def options(config) -> dict:
        """What its model's constructor takes beside Coconut's arguments."""
        return {}

    @staticmethod
    def mixes_in(config) -> bool:
        """Whether its model and dataset take part in those of another method."""
        return False

    @staticmethod
    def older(values: dict) -> None:
        """Rewrites, in place, what is set in an older spelling of this method."""


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
    """Name -> the class Method of every method, the core's first; without those that lack a file which they need."""
    found = dict(CORE)
    for name, (path, tree) in _trees().items():
        end = next((number for number, node in enumerate(tree.body) if _is_slow(node)), len(tree.body))
        upper = tree.body[:end]
        if any(isinstance(node, ast.ClassDef) and node.name == "Method" for node in upper):
            module = types.ModuleType(f"methods.{name}")
            exec(compile(ast.Module(upper, []), str(path), "exec"), vars(module))
            found[name] = module.Method
    return {name: rules for name, rules in found.items() if found.keys() >= {*rules.needs}}


def names() -> tuple[str, ...]:
    return tuple(all_rules())


def rules_of(name: str) -> type[Method]:
    return all_rules()[name]


def modern(values: dict) -> dict:
    """Values of keys in today's spelling, where they are in that of before a method had a name of its own."""
    values = dict(values)
    for rules in all_rules().values():
        rules.older(values)
    return values


def with_defaults(values: dict) -> dict:
    """`modern`, with the defaults of the method where it is chosen by its name: an older spelling had none."""
    values, given = modern(values), values.get("method")
    rules = all_rules().get(given)
    return {**rules.defaults, **values} if rules and values["method"] == given else values


def own_keys(rules: type[Method]) -> Iterator[tuple[str, str, dataclasses.Field]]:
    """(name, annotation, field) of each key that a method brings."""
    for name, annotation in inspect.get_annotations(rules).items():
        if isinstance(field := vars(rules)[name], dataclasses.Field):
            yield name, annotation, field


def thoughts() -> Iterator[tuple[str, str, str]]:
    """(name, what may follow it, module) of each thought that is registered in this folder."""
    for module, (_, tree) in _trees().items():
        for node in tree.body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "register":
                    takes = {word.arg: word.value.value for word in call.keywords}.get("takes", "")
                    yield call.args[0].value, takes, f"methods.{module}"


def implementation(name: str) -> types.ModuleType:
    """The whole file of a method, which imports torch. It may define MODEL, a subclass of Coconut; DATASET, one of
    StageDataset; `validate`, with the arguments of trainer.evaluate.evaluate; and `on_device(run, batch)`, which makes
    of a training batch what the model is called with, such as rollouts and their rewards."""
    return importlib.import_module(f"methods.{name}")
