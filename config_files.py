"""Where the values of a configuration are written: YAML files, the files that they extend, the command line.

A value is kept with its text: what YAML makes of `0123` or `on` is not what was written as a name.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import NamedTuple

import yaml


class Value(NamedTuple):
    """What YAML makes of a value, and the text where it was a plain scalar, or the texts of a mapping of these."""

    value: object
    text: str | dict[str, str] | None


class Layer(NamedTuple):
    """The values of one file, or of the command line, by key; None where the file cannot be read."""

    origin: str
    values: dict[str, Value] | None


def yaml_layers(path: Path, problems: list[str], seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The files that `path` extends, outermost first, then `path` itself. What is wrong with them goes to problems."""
    if path.resolve() in seen:
        problems.append(f"{path} extends itself")
        return [Layer(str(path), None)]
    try:
        values = read_mapping(path.read_text(encoding="utf-8"), str(path), problems)
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
        return [Layer(str(path), None)]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        problems.append(f"{path} is not valid YAML: {' '.join(str(error).split())}")
        return [Layer(str(path), None)]
    parents, parent = [], values.pop("extends", Value(None, None))
    if isinstance(parent.text, str) and parent.value is not None:
        parents = yaml_layers(path.parent / parent.text, problems, (*seen, path.resolve()))
    elif parent.value is not None:
        problems.append(f"extends in {path} must be the path of a file, not {parent.value!r}")
    for layer in parents:
        (layer.values or {}).pop("name", None)  # two files must not share a run's folder by accident
    return [*parents, Layer(str(path), values)]


def override_layer(overrides, problems: list[str]) -> list[Layer]:
    """The key=value arguments of the command line."""
    values: dict[str, Value] = {}
    given: dict[str, str] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r} on the command line is not key=value")
            continue
        if name in given:
            problems.append(f"{name} is set twice on the command line: {given[name]!r} and {text!r}")
        given[name] = text
        values[name] = _of_command_line(value, f"{text!r} on the command line", problems)
    return [Layer("the command line", values)] if values else []


def _of_command_line(text: str, origin: str, problems: list[str]) -> Value:
    """What YAML makes of a value, as in a file; but a key that takes text gets what was written: the shell has taken
    the quotes that a file needs around a name with ' #' or ': ' in it, or one that begins with @, * or %."""
    written = text.strip()
    try:
        value = read_mapping(f"value: {text}", origin, problems)["value"]
    except (yaml.YAMLError, ValueError, KeyError, RecursionError):
        return Value(written, written)
    is_plain = isinstance(value.text, str) and not written.startswith(("'", '"'))
    return value._replace(text=written) if is_plain else value


class _Loader(yaml.SafeLoader):
    """Takes whole numbers as they are written, within lists too: 010 is ten."""

    def whole_number(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch(r"[+-]?\d+", node.value):
            return int(node.value)
        return self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)


def _check_keys(node: yaml.Node, name: str, problems: list[str], seen: set[int]) -> None:
    """Adds the keys that a mapping, or one within it, has twice. Raises ValueError where one is no plain text."""
    if id(node) in seen:  # an alias stands for the node itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, name, problems, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"the key in line {line} is no plain text")
        if key.value in lines:
            problems.append(f"{name} has the key {key.value!r} twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line
        _check_keys(value, name, problems, seen)


def read_mapping(text: str, name: str, problems: list[str]) -> dict[str, Value]:
    """The keys of a YAML mapping. Raises YAMLError, and ValueError where a scalar cannot be what it seems to be."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            problems.append(f"{name} must hold `key: value` lines")
            return {}
        _check_keys(node, name, problems, set())
        texts = {key.value: _text(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        loaded = loader.construct_document(node)
        return {key: Value(value, texts.get(key)) for key, value in loaded.items()}
    finally:
        loader.dispose()


def _text(node: yaml.Node) -> str | dict[str, str] | None:
    """What is written where a plain scalar stands, or a mapping of plain scalars; None where it is anything else."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if not isinstance(node, yaml.MappingNode):
        return None
    if not all(isinstance(part, yaml.ScalarNode) for pair in node.value for part in pair):
        return None
    return {key.value: value.value for key, value in node.value}


# ---------------------------------------------------------------------------------------------------------------
# From what is written to a value of a type
# ---------------------------------------------------------------------------------------------------------------


def converted(written: Value, annotation):
    """What is written as the annotated type of a key. Raises ValueError with what was expected."""
    return _converted(_as_written(written, annotation), annotation)


def _as_written(written: Value, annotation):
    """The value without what YAML 1.1 makes of a text: of 1:30 a number to the base of 60, of a name such as 0123,
    2026-01-31 or `on` no text at all."""
    value, text = written
    if value is None or text is None:
        return value
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if isinstance(text, dict):
        return text if dict[str, str] in options else value
    if str in options and bool not in options:
        return text
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return text if is_number and ":" in text else value


def _converted(value, annotation):
    """`value` as the annotated type. Raises ValueError with what was expected."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or value == "None":  # the reference writes the string None where YAML has null
        if type(None) in options:
            return None
        raise ValueError("must be set")
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 1e-4 as text
            except ValueError:
                pass
        if option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value) or (None if type(None) in options else "")
        if option == list[int] and isinstance(value, list) and value and all(type(entry) is int for entry in value):
            return value
        if option == dict[str, str] and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            return value
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list[int]: "a list of whole numbers",
        dict[str, str]: "a mapping of names to texts",
    }
    raise ValueError("must be " + " or ".join(names[option] for option in options if option in names))


def check_range(value, metadata) -> None:
    if metadata["choices"] and isinstance(value, str) and value not in metadata["choices"]:
        raise ValueError("must be one of " + ", ".join(metadata["choices"]))
    if metadata["check"]:
        metadata["check"](value)
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        if metadata["low"] is not None and not number >= metadata["low"]:
            raise ValueError(f"must be at least {metadata['low']}")
        if metadata["high"] is not None and not number <= metadata["high"]:
            raise ValueError(f"must be at most {metadata['high']}")
