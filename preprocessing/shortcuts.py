"""Measures how many questions of a ProsQA-like file cheap rules answer without search, in percent.

    python preprocessing/shortcuts.py data/prosqa_valid.json
    python preprocessing/shortcuts.py data/prosqa_test.json data/mirror_test.json

A rule gives each candidate a score and takes the higher one; a tie counts as half. It sees the graph, the root and the
two candidates, but not which candidate is right: it reads the fields idx_to_symbol, edges, root, target and neg_target,
which both templates have. A model that reasons must beat the best rule. A source is a node without parents.

Traps. A rule that looks back as many edges as the question has hops is a full search: with 2 hops 'no other source
within two back' is not a shortcut. Rules at 50 % exclude only these shortcuts, not others.
"""

import sys

from files import command, each, load_examples, make_parser, print_result
from graphs import fewest_edges


def scores(parents: list[list[int]], root: int, node: int) -> dict[str, int]:
    """Returns rule -> score of a candidate node, for a graph and the root that is asked about."""
    others = {source for source, of in enumerate(parents) if not of and source != root}
    back = fewest_edges(parents, [node])  # ancestor -> its distance; the node itself has 0
    return {
        "chance": 0,
        "in-degree": -len(parents[node]),  # fewer parents
        "depth of ancestors": max(back.values()),  # distance of the farthest ancestor
        "number of ancestors": len(back),
        "no parent that is another source": not others & {*parents[node]},
        "no other source within two back": not any(back.get(source, 3) <= 2 for source in others),
    }


def has_graph(example: dict) -> bool:
    """Returns whether an example has the fields of ProsQA that the rules read."""
    return {"idx_to_symbol", "edges", "root", "target", "neg_target"} <= example.keys()


def decide(example: dict) -> dict[str, float]:
    """Returns rule -> 1 if it takes the target, 0 if the other candidate, 0.5 for a tie.

    Raises KeyError for a missing field, ValueError for a node that does not exist.
    """
    nodes = range(len(example["idx_to_symbol"]))
    parents: list[list[int]] = [[] for _ in nodes]
    root, target, wrong = (example[key] for key in ("root", "target", "neg_target"))
    for tail, head in [*example["edges"], (root, target), (root, wrong)]:
        if tail not in nodes or head not in nodes:
            raise ValueError(f"{tail} or {head} is not one of its {len(nodes)} nodes")
    for tail, head in example["edges"]:
        parents[head].append(tail)
    of_target, of_wrong = (scores(parents, root, node) for node in (target, wrong))
    pairs = ((rule, right, of_wrong[rule]) for rule, right in of_target.items())
    return {rule: 0.5 + 0.5 * ((right > other) - (right < other)) for rule, right, other in pairs}


def measure(examples: list[dict], origin: str) -> dict[str, float]:
    """Returns rule -> percentage of right answers. Raises UserError that names a record without a valid graph."""
    named = ((f"record {number} (counted from 0)", example) for number, example in enumerate(examples))
    decided = each(decide, named, origin, "has no valid graph: ")
    return {name: 100 * sum(one[name] for one in decided) / len(decided) for name in decided[0]}


def table(files: dict[str, list[dict]]) -> str:
    """Returns a Markdown table with a row for each rule and a column for each file, name -> examples."""
    right = [measure(examples, name) for name, examples in files.items()]
    rows = [
        ["rule, % right", *files],
        ["---", *["--:"] * len(files)],
        ["examples", *(f"{len(examples):,}" for examples in files.values())],
        *([rule, *(f"{of_file[rule]:.1f}" for of_file in right)] for rule in right[0]),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="data file of prosqa.py or of the authors")
    options = parser.parse_args(arguments)
    print_result(table({path: load_examples(path) for path in options.files}))


if __name__ == "__main__":
    sys.exit(main())
