"""What the generators share: the options of their splits, and examples that differ within and across splits."""

import argparse
from collections.abc import Callable, Hashable
from operator import itemgetter
from pathlib import Path

from files import UserError, publish
from tqdm import tqdm

Splits = dict[str, list[dict]]  # name of the split -> its examples
MOST_STEPS = 100  # of an example: the possible questions are counted


def add_split_options(parser: argparse.ArgumentParser, train: int, valid: int, test: int) -> None:
    """--out, --train, --valid and --test."""
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the files (default: %(default)s)")
    parser.add_argument("--train", type=int, default=train, help="training examples (default: %(default)s)")
    parser.add_argument("--valid", type=int, default=valid, help="validation examples (default: %(default)s)")
    parser.add_argument("--test", type=int, default=test, help="test examples (default: %(default)s)")


def add_drawing_options(parser: argparse.ArgumentParser, checks: bool) -> None:
    """--seed, and --check where the script can compare."""
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    if checks:
        text = "compare FILE with what this script generates, or two files"
        parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help=text)


def parse_splits(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """The options, and the size of each split; exits where the options above make no sense."""
    options = parser.parse_args(arguments)
    sizes = {"train": options.train, "valid": options.valid, "test": options.test}
    if min(sizes.values()) < 1:
        parser.error("every split needs an example")
    if "/" in (prefix := getattr(options, "prefix", "")):
        parser.error(f"--prefix {prefix!r} begins the files' names: the folder is --out")
    if getattr(options, "seed", 0) < 0:
        parser.error(f"--seed must be at least 0, not {options.seed}")
    if len(getattr(options, "check", None) or ()) > 2:
        parser.error("--check takes one file or two")
    return options, sizes


def draw(
    sizes: dict[str, int],
    make: Callable[[], dict | None],
    progress: bool = False,
    key: Callable[[dict], Hashable] = itemgetter("question"),
    hopeless: str = "with these settings there is hardly ever a new question",
    seen: set[Hashable] | None = None,
) -> Splits:
    """Splits of the given sizes, made in this order; no key occurs twice, within a split or across them.

    Args:
        make: returns an example, or None where it fails.
        seen: keys that are not used again; those of the examples are added.
        hopeless: message of the UserError when nearly all tries fail.
    """
    seen = set() if seen is None else seen
    splits: Splits = {}
    for name, size in sizes.items():
        examples = splits[name] = []
        failures = 0
        with tqdm(total=size, desc=name, unit="example", disable=not progress) as bar:
            while len(examples) < size:
                example = make()
                if example is not None and (mark := key(example)) not in seen:
                    seen.add(mark)
                    examples.append(example)
                    bar.update()
                elif (failures := failures + 1) > 1000 + 1000 * len(examples):
                    raise UserError(hopeless)
    return splits


def publish_splits(
    splits: Splits,
    folder: Path,
    prefix: str,
    describe: Callable[[list[dict]], str] = lambda examples: "",
    beside: dict[Path, dict] | None = None,
) -> None:
    """Writes folder/PREFIX_NAME.json for each split, and the files `beside`; prints a line for each, which ends with
    what `describe` returns of its examples."""
    files = {folder / f"{prefix}_{name}.json": examples for name, examples in splits.items()}
    publish(files | (beside or {}))
    for path, examples in files.items():
        print(f"{path}: {len(examples)} examples{describe(examples)}")
