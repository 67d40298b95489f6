"""What the generators share: the options of their splits, and examples that differ within and across splits."""

import argparse
from collections.abc import Callable, Hashable
from operator import itemgetter
from pathlib import Path

from files import UserError, make_parser, publish, refuse
from tqdm import tqdm

Splits = dict[str, list[dict]]  # name of the split -> its examples
MOST_STEPS = 100  # of an example: the possible questions are counted


def splits_parser(
    description: str, train: int, valid: int, test: int, prefix: str = "", draws: bool = True, checks: bool = False
) -> argparse.ArgumentParser:
    """Options of a script that writes splits: their sizes and folder; with a prefix that of the file names; where it
    draws its examples, the seed; where it can compare, the files."""
    parser = make_parser(description)
    add = parser.add_argument
    add("--out", type=Path, default=Path("data"), help="folder for the files (default: %(default)s)")
    add("--train", type=int, default=train, help="training examples (default: %(default)s)")
    add("--valid", type=int, default=valid, help="validation examples (default: %(default)s)")
    add("--test", type=int, default=test, help="test examples (default: %(default)s)")
    if prefix:
        add("--prefix", default=prefix, help="of the file names (default: %(default)s)")
    if draws:
        add("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    if checks:
        add("--check", type=Path, nargs="+", metavar="FILE", help="compare FILE with what this generates, or two files")
    return parser


def parse_splits(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """The options, and the size of each split; exits where the options above make no sense."""
    options = parser.parse_args(arguments)
    prefix, seed, files = (getattr(options, name, None) for name in ("prefix", "seed", "check"))
    sizes = {"train": options.train, "valid": options.valid, "test": options.test}
    problems = {
        "every split needs an example": min(sizes.values()) < 1,
        f"--prefix {prefix!r} begins the files' names: the folder is --out": "/" in (prefix or ""),
        f"--seed must be at least 0, not {seed}": (seed or 0) < 0,
        "--check takes one file or two": len(files or ()) > 2,
    }
    refuse(parser, problems)
    return options, sizes


def draw(
    sizes: dict[str, int],
    make: Callable[[str], dict | None],
    progress: bool = False,
    key: Callable[[dict], Hashable] = itemgetter("question"),
    hopeless: str = "with these settings there is hardly ever a new question",
) -> Splits:
    """Splits of the given sizes, drawn in this order; no key occurs twice, within a split or across them.

    Args:
        make: returns an example of the split of a name, or None where it fails.
        hopeless: message of the UserError when nearly all tries fail.
    """
    seen: set[Hashable] = set()
    splits: Splits = {}
    for name, size in sizes.items():
        examples = splits[name] = []
        failures = 0
        with tqdm(total=size, desc=name, unit="example", disable=not progress) as bar:
            while len(examples) < size:
                example = make(name)
                if example is not None and (mark := key(example)) not in seen:
                    seen.add(mark)
                    examples.append(example)
                    bar.update()
                elif (failures := failures + 1) > 1000 + 1000 * len(examples):
                    raise UserError(hopeless)
    return splits


def publish_splits(splits: Splits, folder: Path, prefix: str, beside: dict[Path, dict] | None = None) -> None:
    """Writes folder/PREFIX_NAME.json for each split, and the files `beside`; prints a line for each."""
    files = {folder / f"{prefix}_{name}.json": examples for name, examples in splits.items()}
    publish(files | (beside or {}))
    for path, examples in files.items():
        print(f"{path}: {len(examples)} examples")
