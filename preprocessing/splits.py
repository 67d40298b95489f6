"""Shared by the generators: options for the splits, and examples that are unique within and across splits."""

import argparse
from collections.abc import Callable, Hashable
from operator import itemgetter
from pathlib import Path

from files import UserError, make_parser, print_result, publish, refuse
from tqdm import tqdm

Splits = dict[str, list[dict]]  # name of the split -> its examples
MAX_STEPS = 100  # of an example: the number of possible questions, which is computed, grows exponentially with it


def splits_parser(
    description: str, train: int, valid: int, test: int, prefix: str = "", seed: bool = True
) -> argparse.ArgumentParser:
    """Returns a parser with options for the sizes and folder of the splits, and for the prefix and seed if wanted."""
    parser = make_parser(description)
    add = parser.add_argument
    add("--out", type=Path, default=Path("data"), help="output folder (default: %(default)s)")
    add("--train", type=int, default=train, help="training examples (default: %(default)s)")
    add("--valid", type=int, default=valid, help="validation examples (default: %(default)s)")
    add("--test", type=int, default=test, help="test examples (default: %(default)s)")
    if prefix:
        add("--prefix", default=prefix, help="prefix of the file names (default: %(default)s)")
    if seed:
        add("--seed", type=int, default=0, help="the same seed gives the same files (default: %(default)s)")
    return parser


def parse_splits(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Returns the options and the size of each split; exits if an option of `splits_parser` is invalid."""
    options = parser.parse_args(arguments)
    prefix, seed = getattr(options, "prefix", ""), getattr(options, "seed", 0)
    sizes = {"train": options.train, "valid": options.valid, "test": options.test}
    problems = {
        "--train, --valid and --test must be at least 1": min(sizes.values()) < 1,
        f"--prefix {prefix!r} begins the file names and cannot contain '/'; --out names the folder": "/" in prefix,
        f"--seed must be at least 0, not {seed}": seed < 0,
    }
    refuse(parser, problems)
    return options, sizes


def draw(
    sizes: dict[str, int],
    make: Callable[[str], dict | None],
    progress: bool = False,
    key: Callable[[dict], Hashable] = itemgetter("question"),
    too_few: str = "with these settings there is hardly ever a new question",
) -> Splits:
    """Draws splits of the given sizes, in their order. No key occurs twice, within a split or across splits.

    Args:
        make: takes the name of a split and returns one of its examples, or None if the draw failed.
        too_few: message of the UserError that is raised when nearly all draws fail.
    """
    seen: set[Hashable] = set()
    splits: Splits = {}
    for name, size in sizes.items():
        examples = splits[name] = []
        failures = 0
        with tqdm(total=size, desc=name, unit="example", disable=not progress) as bar:
            while len(examples) < size:
                example = make(name)
                if example is not None and (found := key(example)) not in seen:
                    seen.add(found)
                    examples.append(example)
                    bar.update()
                elif (failures := failures + 1) > 1000 + 1000 * len(examples):
                    raise UserError(too_few)
    return splits


def publish_splits(splits: Splits, folder: Path, prefix: str, others: dict[Path, dict] | None = None) -> None:
    """Writes folder/PREFIX_NAME.json for each split, and the other JSON files; prints a line for each split."""
    files = {folder / f"{prefix}_{name}.json": examples for name, examples in splits.items()}
    publish(files | (others or {}))
    for path, examples in files.items():
        print_result(f"{path}: {len(examples)} examples")
