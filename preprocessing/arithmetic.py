"""Generates chained arithmetic in the format of iCoT's GSM8K.

An example computes from left to right, modulo a small base:

    {"question": "3+4*2-5", "steps": ["<<3+4=2>>", "<<2*2=4>>", "<<4-5=4>>"], "answer": "4"}       (base 5)

    python preprocessing/arithmetic.py                    # data/arithmetic_{train,valid,test}.json
"""

import argparse
import random
import sys

from files import UserError, command
from splits import MOST_STEPS, add_drawing_options, add_split_options, draw, parse_splits, publish_splits

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def make_example(rng: random.Random, n_steps: int, base: int) -> dict:
    """One example with n_steps operations on numbers 0..base-1, uniform in numbers and operations."""
    value = rng.randrange(base)
    question, steps = str(value), []
    for _ in range(n_steps):
        operation, operand = rng.choice("+-*"), rng.randrange(base)
        result = OPERATIONS[operation](value, operand) % base
        question += f"{operation}{operand}"
        steps.append(f"<<{value}{operation}{operand}={result}>>")
        value = result
    return {"question": question, "steps": steps, "answer": str(value)}


def make_splits(
    sizes: dict[str, int], min_steps: int = 2, max_steps: int = 4, base: int = 5, seed: int = 0
) -> dict[str, list[dict]]:
    """Splits of the given sizes, name -> examples; no question occurs twice, within a split or across them.

    Raises UserError where there are not enough questions.
    """
    possible = sum(base ** (n + 1) * 3**n for n in range(min_steps, max_steps + 1))
    if sum(sizes.values()) > possible // 2:
        raise UserError(
            f"{sum(sizes.values())} examples are more than half of the {possible} questions that base {base} and "
            f"{min_steps} to {max_steps} steps allow: ask for fewer, or for more steps"
        )
    rng = random.Random(seed)
    counts = list(range(min_steps, max_steps + 1))
    # in proportion to the fourth root of how many there are: short questions are few, and all splits need all lengths
    weights = [(base ** (n + 1) * 3**n) ** 0.25 for n in counts]
    small_first = sorted(sizes.items(), key=lambda item: item[1])  # the large ones use the short questions up
    splits = draw(dict(small_first), lambda: make_example(rng, rng.choices(counts, weights)[0], base))
    return {name: splits[name] for name in sizes}


def describe_first(examples: list[dict]) -> str:
    return f", first: {examples[0]['question']} -> {examples[0]['answer']}"


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split_options(parser, train=40000, valid=300, test=1000)
    parser.add_argument("--base", type=int, default=5, help="numbers are 0..BASE-1 (default: %(default)s)")
    parser.add_argument("--min-steps", type=int, default=2, help="fewest operations (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=4, help="most operations (default: %(default)s)")
    add_drawing_options(parser, checks=False)
    options, sizes = parse_splits(parser, arguments)
    if not 2 <= options.base <= 10 or not 1 <= options.min_steps <= options.max_steps <= MOST_STEPS:
        parser.error(f"base must be 2 to 10, and 1 <= min-steps <= max-steps <= {MOST_STEPS}")
    splits = make_splits(sizes, options.min_steps, options.max_steps, options.base, options.seed)
    publish_splits(splits, options.out, "arithmetic", describe_first)


if __name__ == "__main__":
    sys.exit(main())
