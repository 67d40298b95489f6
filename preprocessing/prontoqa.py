"""Converts what the official ProntoQA generator writes into this project's files, 9,000/200/800 as the paper does.

The question is the facts and the query; a step is a fact and what follows from it (two sentences), the last step the
conclusion about the property; the answer is True or False. To make 5hop_0shot_random.json, 10,000 examples of five
hops (the paper's appendix; arXiv 2210.01240):

    git clone https://github.com/asaparov/prontoqa && cd prontoqa
    python run_experiment.py --model-name json --model-size dummy --ordering random --num-trials 10000 \\
        --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1

    python preprocessing/prontoqa.py 5hop_0shot_random.json      # data/prontoqa_{train,valid,test}.json

`preprocessing/prontoqa_generate.py` makes such data without that program.
"""

import sys
from pathlib import Path

from files import UserError, command, each, read_json
from splits import Splits, parse_splits, publish_splits, splits_parser

QUERY = "True or false: "
PAPER = {"train": 9000, "valid": 200, "test": 800}  # examples
HOW = "(how to make it: python preprocessing/prontoqa.py --help)"


def convert_example(example) -> dict:
    """One example of the official file. Raises ValueError with what is wrong with it."""
    example = example.get("test_example") if isinstance(example, dict) else None
    if not isinstance(example, dict):
        raise ValueError("has no 'test_example' object")
    for field in ("question", "query", "answer"):
        if not isinstance(example[field], str) or not example[field].strip():
            raise ValueError(f"has a {field!r} that is no text")
    chain, query, answer = example["chain_of_thought"], example["query"], example["answer"]
    if not isinstance(chain, list) or not chain or not all(isinstance(sentence, str) for sentence in chain):
        raise ValueError("has a 'chain_of_thought' that is no list of texts")
    if not query.startswith(QUERY):
        raise ValueError(f"has a query that does not begin with {QUERY.strip()!r}")
    if answer not in ("True", "False"):
        raise ValueError(f"has the answer {answer!r}, which is neither True nor False")
    if (chain[-1] == query.removeprefix(QUERY)) != (answer == "True"):
        raise ValueError(f"has the answer {answer}, but its chain ends with {chain[-1]!r}")
    steps = [" ".join(chain[begin : begin + 2]) for begin in range(0, len(chain), 2)]
    return {"question": f"{example['question']} {query}", "steps": steps, "answer": answer}


def convert(path: Path) -> list[dict]:
    """All examples of an official file, in its order. Raises UserError that names the example that cannot be read."""
    if not path.exists():
        raise UserError(f"{path} does not exist {HOW}")
    loaded = read_json(path)
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path} is not the official generator's: it must hold a JSON object of examples {HOW}")
    return each(convert_example, ((repr(name), example) for name, example in loaded.items()), path)


def split(examples: list[dict], sizes: dict[str, int], origin: Path) -> Splits:
    """Consecutive parts of the given sizes. Raises UserError where the examples are not exactly so many."""
    wanted = sum(sizes.values())
    if len(examples) != wanted:
        numbers = "/".join(f"{size:,}" for size in sizes.values())
        raise UserError(
            f"{origin} holds {len(examples):,} examples, not the {wanted:,} of {numbers}: "
            "set --train, --valid and --test to other sizes"
        )
    rest = iter(examples)
    return {name: [next(rest) for _ in range(size)] for name, size in sizes.items()}


@command
def main(arguments: list[str] | None = None) -> None:
    parser = splits_parser(__doc__, **PAPER, draws=False)
    parser.add_argument("source", type=Path, help="5hop_0shot_random.json of the official generator")
    options, sizes = parse_splits(parser, arguments)
    publish_splits(split(convert(options.source), sizes, options.source), options.out, "prontoqa")


if __name__ == "__main__":
    sys.exit(main())
