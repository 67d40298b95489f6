"""How far do cheap rules get on a ProsQA-like file, without any search? The percentage that each decides rightly.

    python preprocessing/shortcuts.py data/prosqa_valid.json
    python preprocessing/shortcuts.py data/prosqa_test.json data/mirror_test.json --json

A rule gives either candidate a number and takes the one with the greater; a tie is a coin, and counts as half. It sees
the graph and which node is asked about, not which candidate is right: the fields idx_to_symbol, edges, root, target and
neg_target of the records, in either template. A model that reasons must be better than the best rule. A source is a
node without parents.

Traps. A rule that looks as many edges back as the question has hops is the whole search: with 2 hops 'no other source
within two back' is no shortcut. And each rule is one that a person thought of: at 50 % it is excluded, the next is not.
"""

import json
import sys

from files import command, each, load_examples, make_parser
from graphs import fewest_edges


def scores(parents: list[list[int]], root: int, node: int) -> dict[str, int]:
    """Rule -> the number that it gives a candidate, of a graph and the node that is asked about."""
    others = {source for source, of in enumerate(parents) if not of and source != root}
    back = fewest_edges(parents, [node])  # ancestor -> the fewest edges between it and the node, which is its own at 0
    return {
        "chance": 0,
        "in-degree": -len(parents[node]),  # fewer parents
        "depth of ancestors": max(back.values()),  # the longer way back to the farthest, over the fewest edges
        "number of ancestors": len(back),
        "no parent that is another source": not others & {*parents[node]},
        "no other source within two back": not any(back.get(source, 3) <= 2 for source in others),
    }


def has_graph(example: dict) -> bool:
    """Whether these rules have something to look at: ProsQA's fields."""
    return {"idx_to_symbol", "edges", "root", "target", "neg_target"} <= example.keys()


def decide(example: dict) -> dict[str, float]:
    """Rule -> 1 where it takes the target, 0 where the other, 0.5 in a tie.

    Raises KeyError for a missing field, ValueError where a node is not there.
    """
    nodes = range(len(example["idx_to_symbol"]))
    parents: list[list[int]] = [[] for _ in nodes]
    root, target, wrong = (example[key] for key in ("root", "target", "neg_target"))
    for tail, head in [*example["edges"], (root, target), (root, wrong)]:
        if tail not in nodes or head not in nodes:
            raise ValueError(f"{tail} or {head} is none of its {len(nodes)} nodes")
    for tail, head in example["edges"]:
        parents[head].append(tail)
    of_target, of_wrong = (scores(parents, root, node) for node in (target, wrong))
    pairs = ((rule, right, of_wrong[rule]) for rule, right in of_target.items())
    return {rule: 0.5 + 0.5 * ((right > other) - (right < other)) for rule, right, other in pairs}


def measure(examples: list[dict], origin: str) -> dict[str, float]:
    """Rule -> the percentage that it decides rightly. Raises UserError that names the record which has no graph."""
    named = ((f"record {number} (counted from 0)", example) for number, example in enumerate(examples))
    decided = each(decide, named, origin, "has no graph to look at: ")
    return {name: 100 * sum(one[name] for one in decided) / len(decided) for name in decided[0]}


def table(results: dict[str, dict]) -> str:
    """A row for each rule and a column for each file, as Markdown."""
    first, *_ = results.values()
    rows = [
        ["rule, % right", *results],
        ["---", *["--:"] * len(results)],
        ["examples", *(f"{result['examples']:,}" for result in results.values())],
        *([rule, *(f"{result['right'][rule]:.1f}" for result in results.values())] for rule in first["right"]),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="as prosqa.py writes them, or the authors'")
    parser.add_argument("--json", action="store_true", help="print JSON: file -> its examples, and right for each rule")
    options = parser.parse_args(arguments)
    results = {}
    for path in options.files:
        examples = load_examples(path)
        results[path] = {"examples": len(examples), "right": measure(examples, path)}
    print(json.dumps(results, indent=2) if options.json else table(results))


if __name__ == "__main__":
    sys.exit(main())
