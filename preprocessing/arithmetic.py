"""Generates chained arithmetic in the format of iCoT's GSM8K, computed from left to right modulo a small base.

{"question": "3+4*2-5", "steps": ["<<3+4=2>>", "<<2*2=4>>", "<<4-5=4>>"], "answer": "4"}       (base 5)

python preprocessing/arithmetic.py                    # data/arithmetic_{train,valid,test}.json
"""

import random
import sys

from files import UserError, command, refuse
from splits import MAX_STEPS, Splits, draw, parse_splits, publish_splits, splits_parser

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def make_example(rng: random.Random, n_steps: int, base: int) -> dict:
    """Returns one example with n_steps operations on numbers 0..base-1; numbers and operations are uniform."""
    value = rng.randrange(base)
    question, steps = str(value), []
    for _ in range(n_steps):
        operation, operand = rng.choice("+-*"), rng.randrange(base)
        result = OPERATIONS[operation](value, operand) % base
        question += f"{operation}{operand}"
        steps.append(f"<<{value}{operation}{operand}={result}>>")
        value = result
    return {"question": question, "steps": steps, "answer": str(value)}


def make_splits(sizes: dict[str, int], min_steps: int = 2, max_steps: int = 4, base: int = 5, seed: int = 0) -> Splits:
    """Returns splits of the given sizes. No question occurs twice, within a split or across splits.

    Raises UserError if there are not enough questions.
    """
    lengths = range(min_steps, max_steps + 1)
    counts = [base ** (n + 1) * 3**n for n in lengths]
    if sum(sizes.values()) > sum(counts) // 2:
        raise UserError(
            f"{sum(sizes.values())} examples are more than half of the {sum(counts)} questions that base {base} and "
            f"{min_steps} to {max_steps} steps allow: ask for fewer, or for more steps"
        )
    rng = random.Random(seed)
    # There are few short questions, and every split needs all lengths. So a length's weight is only the fourth root of
    # its number of questions, and the small splits are drawn first: large ones use up the short questions.
    weights = [count**0.25 for count in counts]
    small_first = dict(sorted(sizes.items(), key=lambda item: item[1]))
    splits = draw(small_first, lambda _: make_example(rng, rng.choices(lengths, weights)[0], base))
    return {name: splits[name] for name in sizes}


@command
def main(arguments: list[str] | None = None) -> None:
    parser = splits_parser(__doc__, train=40000, valid=300, test=1000)
    parser.add_argument("--base", type=int, default=5, help="numbers are 0..BASE-1 (default: %(default)s)")
    parser.add_argument("--min-steps", type=int, default=2, help="fewest operations (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=4, help="most operations (default: %(default)s)")
    options, sizes = parse_splits(parser, arguments)
    low, high, base = options.min_steps, options.max_steps, options.base
    problem = f"base must be 2 to 10, and 1 <= min-steps <= max-steps <= {MAX_STEPS}"
    refuse(parser, {problem: not (2 <= base <= 10 and 1 <= low <= high <= MAX_STEPS)})
    publish_splits(make_splits(sizes, low, high, base, options.seed), options.out, "arithmetic")


if __name__ == "__main__":
    sys.exit(main())
