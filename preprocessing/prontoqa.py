"""Converts the official ProntoQA generator's output into data files, with the paper's 9,000/200/800 examples.

The question consists of the facts and the query. A step has two sentences, a statement about the entity and the fact
that is applied to it; the last step is the conclusion about the property. The answer is True or False. These commands
make 5hop_0shot_random.json, 10,000 examples of five hops (the paper's appendix; arXiv 2210.01240):

    git clone https://github.com/asaparov/prontoqa && cd prontoqa
    python run_experiment.py --model-name json --model-size dummy --ordering random --num-trials 10000 \\
        --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1

    python preprocessing/prontoqa.py 5hop_0shot_random.json      # data/prontoqa_{train,valid,test}.json

`preprocessing/prontoqa_generate.py` makes such data without the official generator.
"""

import sys
from pathlib import Path

from files import UserError, command, each, read_json
from splits import Splits, parse_splits, publish_splits, splits_parser

QUERY = "True or false: "
PAPER = {"train": 9000, "valid": 200, "test": 800}  # examples
HOW = "(how to make it: python preprocessing/prontoqa.py --help)"


def convert_example(example: dict) -> dict:
    """Converts one example of the official file. Raises ValueError or KeyError that says what is wrong with it."""
    example = example.get("test_example") if isinstance(example, dict) else None
    if not isinstance(example, dict):
        raise ValueError("it has no 'test_example' object")
    for field in ("question", "query", "answer"):
        if not isinstance(example[field], str) or not example[field].strip():
            raise ValueError(f"its {field!r} is no text")
    chain, query, answer = example["chain_of_thought"], example["query"], example["answer"]
    if not isinstance(chain, list) or not chain or not all(isinstance(sentence, str) for sentence in chain):
        raise ValueError("its 'chain_of_thought' is no list of texts")
    if not query.startswith(QUERY):
        raise ValueError(f"its query does not begin with {QUERY.strip()!r}")
    if answer not in ("True", "False"):
        raise ValueError(f"its answer is {answer!r}, not True or False")
    if (chain[-1] == query.removeprefix(QUERY)) != (answer == "True"):
        raise ValueError(f"its answer is {answer}, but its chain ends with {chain[-1]!r}")
    steps = [" ".join(chain[begin : begin + 2]) for begin in range(0, len(chain), 2)]
    return {"question": f"{example['question']} {query}", "steps": steps, "answer": answer}


def convert(path: Path) -> list[dict]:
    """Converts all examples of an official file, in order. Raises UserError that names the first malformed example."""
    if not path.exists():
        raise UserError(f"{path} does not exist {HOW}")
    loaded = read_json(path)
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path} is not from the official generator: it must hold a JSON object of examples {HOW}")
    named = ((repr(name), example) for name, example in loaded.items())
    return each(convert_example, named, path, "is malformed: ")


def split(examples: list[dict], sizes: dict[str, int], origin: Path) -> Splits:
    """Splits the examples in their order. Raises UserError unless the sizes add up to the number of examples."""
    wanted = sum(sizes.values())
    if len(examples) != wanted:
        numbers = "/".join(f"{size:,}" for size in sizes.values())
        raise UserError(
            f"{origin} holds {len(examples):,} examples, not the {wanted:,} of {numbers}: "
            "set other sizes by --train, --valid and --test"
        )
    rest = iter(examples)
    return {name: [next(rest) for _ in range(size)] for name, size in sizes.items()}


@command
def main(arguments: list[str] | None = None) -> None:
    parser = splits_parser(__doc__, **PAPER, seed=False)
    parser.add_argument("source", type=Path, help="5hop_0shot_random.json of the official generator")
    options, sizes = parse_splits(parser, arguments)
    publish_splits(split(convert(options.source), sizes, options.source), options.out, "prontoqa")


if __name__ == "__main__":
    sys.exit(main())
