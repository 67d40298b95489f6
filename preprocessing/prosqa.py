"""Generates ProsQA: "Is Tom a lempus or scrompus?" over a random graph in which Tom reaches only one of the two.

The graph has two roots. Each new node descends from one root, from both or from neither. The question names a root; one
candidate is a leaf that only this root reaches, the other a leaf that only the other root reaches (Hao et al. 2024,
appendix A.2). The fields are those of the authors' files. data/README.md shows examples.

    python preprocessing/prosqa.py                        # data/prosqa_{train,valid,test}.json, 17,886/300/500
    python preprocessing/prosqa.py --train 2000 --nodes 14 --max-hops 4

--mirror makes graphs that no cheap rule solves (shortcuts.py). It grows a graph under one root and copies it under a
second root with other names; the candidates are the two copies of one of the deepest leaves. The number of hops is
uniform from --min-hops to --max-hops.

    python preprocessing/prosqa.py --mirror --min-hops 1 --max-hops 3 --test-hops 3 4 --template compact --prefix mirror
    python preprocessing/prosqa.py --mirror --chains --min-hops 1 --max-hops 4 --template compact --prefix chains

--template compact writes a node as one character. The question lists the edges from parent to child, then the
candidates, then the root. The steps are the nodes after the root, and the answer is the last of them.

Traps. A rule that looks back as many edges as the question has hops is a full search: with 2 hops 'no other source
within two back' is always right. No graph is in two splits, but there are few shapes of small graphs: a test graph may
be a training graph with other names.
"""

import argparse
import string
import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from files import UserError, command, refuse
from graphs import ROOTS, choose_question, grow_graph, grow_side, shortest_path
from splits import Splits, draw, parse_splits, publish_splits, splits_parser

NAMES, CONCEPTS = (
    words.split()
    for words in (
        "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren",
        "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
        "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus "
        "tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus",
    )
)
CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Settings:
    """Size and words of the graphs. The hops are the edges from the root to the target."""

    nodes: int = 28
    min_hops: int = 3
    max_hops: int = 6
    names: tuple[str, ...] = tuple(NAMES)
    concepts: tuple[str, ...] = tuple(CONCEPTS)
    nodes_a_side: int | None = None  # set for a mirror, which ignores `nodes`; of the longest chain with `chains`
    chains: bool = False  # mirrors only: each side is a single path
    characters: str = ""  # set for the compact template, which ignores names and concepts

    @property
    def description(self) -> str:
        """Names the graphs in messages."""
        side = self.nodes_a_side
        return f"graphs of {self.nodes} nodes" if side is None else f"mirrors of {side} nodes a side"


@dataclass(frozen=True)
class Question:
    """A graph, the root that is asked about, and the candidates. Every edge (a, b) has a < b; they are sorted by b."""

    edges: list[tuple[int, int]]
    root: int
    target: int
    neg_target: int


def draw_question(rng: np.random.Generator, settings: Settings) -> Question | None:
    """Draws a graph of the paper's kind and a question, or returns None if the number of hops is out of range."""
    graph = grow_graph(rng, settings.nodes)
    choice = choose_question(rng, graph)
    if choice is None or not settings.min_hops <= graph.depths[choice[1]] <= settings.max_hops:
        return None
    edges = [(parent, node) for node, drawn in enumerate(graph.parents) for parent in drawn]
    index_of = {node: index for index, node in enumerate(sorted({node for edge in edges for node in edge}))}
    return Question([(index_of[tail], index_of[head]) for tail, head in edges], *(index_of[node] for node in choice))


def draw_mirror(rng: np.random.Generator, settings: Settings) -> Question:
    """Draws a graph and its copy: node n of side s has index 2n + s. The candidates are copies of a deepest leaf."""
    hops = int(rng.integers(settings.min_hops, settings.max_hops + 1))
    side = grow_side(rng, hops + 1 if settings.chains else settings.nodes_a_side, hops)
    leaf = int(rng.choice([node for node, depth in enumerate(side.depths) if depth == hops]))
    root = int(rng.integers(2))
    edges = [
        (2 * parent + copy, 2 * node + copy)
        for node, parents in enumerate(side.parents)
        for copy in ROOTS
        for parent in parents
    ]
    return Question(edges, root, 2 * leaf + root, 2 * leaf + 1 - root)


def name_nodes(rng: np.random.Generator, settings: Settings, edges: list[tuple[int, int]]) -> list[str] | None:
    """Draws a symbol for each node: names for sources, concepts for others. Returns None if there are too few."""
    heads = {head for _, head in edges}
    n_nodes = len({node for edge in edges for node in edge})
    if settings.characters:
        if n_nodes > len(settings.characters):
            return None
        return rng.permutation(list(settings.characters))[:n_nodes].tolist()
    n_names = n_nodes - len(heads)
    if n_names > len(settings.names) or len(heads) > len(settings.concepts):
        return None
    names = iter(rng.permutation(settings.names)[:n_names].tolist())
    concepts = iter(rng.permutation(settings.concepts)[: len(heads)].tolist())
    return [next(concepts) if node in heads else next(names) for node in range(n_nodes)]


def make_example(rng: np.random.Generator, settings: Settings) -> dict | None:
    """Returns one example, or None if the drawn graph has no question with these hops or more nodes than symbols."""
    question = draw_question(rng, settings) if settings.nodes_a_side is None else draw_mirror(rng, settings)
    symbols = question and name_nodes(rng, settings, question.edges)
    if symbols is None:
        return None
    path = [symbols[node] for node in shortest_path(rng, question.edges, question.root, question.target)]
    shuffled = [question.edges[index] for index in rng.permutation(len(question.edges))]
    facts = [(symbols[tail], symbols[head]) for tail, head in shuffled]
    candidates = [symbols[question.target], symbols[question.neg_target]]
    if rng.random() >= 0.5:
        candidates.reverse()
    concepts = {symbols[head] for _, head in question.edges}
    text = compact(facts, candidates, path) if settings.characters else sentences(facts, candidates, path, concepts)
    nodes = {"root": question.root, "target": question.target, "neg_target": question.neg_target}
    return {**text, "idx_to_symbol": symbols, "edges": [list(edge) for edge in question.edges], **nodes}


def sentences(facts: list[tuple[str, str]], candidates: list[str], path: list[str], concepts: set[str]) -> dict:
    """Returns question, answer and steps in the authors' wording. The path leads from the root to the target."""

    def sentence(edge: tuple[str, str]) -> str:
        subject = f"Every {edge[0]}" if edge[0] in concepts else edge[0]
        return f"{subject} is a {edge[1]}."

    return {
        "question": " ".join([*map(sentence, facts), f"Is {path[0]} a {' or '.join(candidates)}?"]),
        "answer": f"{path[0]} is a {path[-1]}.",
        "steps": [sentence(edge) for edge in pairwise(path)],
    }


def compact(facts: list[tuple[str, str]], candidates: list[str], path: list[str]) -> dict:
    """The same in single characters. The root comes last, so that the first step follows the node it starts from."""
    edges = " ".join(tail + head for tail, head in facts)
    return {"question": f"{edges}?{''.join(candidates)}:{path[0]}", "answer": path[-1], "steps": path[1:]}


def named_edges(example: dict) -> frozenset[tuple[str, str]]:
    """Returns the edges as pairs of symbols, which do not depend on the numbering of the nodes."""
    symbols = example["idx_to_symbol"]
    return frozenset((symbols[tail], symbols[head]) for tail, head in example["edges"])


def make_splits(
    sizes: dict[str, int],
    settings: Settings,
    seed: int | tuple[int, ...],
    progress: bool = False,
    test_hops: tuple[int, int] | None = None,
) -> Splits:
    """Returns splits of the given sizes. No graph, and so no question, occurs twice, within a split or across splits.

    test_hops: fewest and most hops of the split `test`, by default those of the settings. Raises UserError if the
    settings make a mirror impossible, or a new question hardly ever possible.
    """
    low, high = test_hops or (settings.min_hops, settings.max_hops)
    settings_by_split = dict.fromkeys(sizes, settings) | {"test": replace(settings, min_hops=low, max_hops=high)}
    for one in settings_by_split.values():
        check_mirror(one)
    rng = np.random.default_rng(seed)
    too_few = f"{settings.description} with these words hardly ever have a new question with these hops"
    return draw(sizes, lambda name: make_example(rng, settings_by_split[name]), progress, named_edges, too_few)


def check_mirror(settings: Settings) -> None:
    """Raises UserError if a mirror cannot have leaves that deep, or has more nodes than symbols."""
    side, hops = settings.nodes_a_side, settings.max_hops
    if side is None:
        return
    n_characters, n_names, n_concepts = map(len, (settings.characters, settings.names, settings.concepts))
    if hops >= side:
        raise UserError(f"{side} nodes a side have no leaf {hops} hops from their root: it takes {hops + 1} nodes")
    if n_characters and n_characters < 2 * side:
        raise UserError(f"{settings.description} take {2 * side} characters, and there are {n_characters}")
    if not n_characters and (n_names < 2 or n_concepts < 2 * side - 2):
        raise UserError(
            f"{settings.description} take 2 names and {2 * side - 2} concepts, and there are {n_names} and {n_concepts}"
        )


def graphs_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = splits_parser(__doc__, train=17886, valid=300, test=500, prefix="prosqa")
    add = parser.add_argument
    add("--nodes", type=int, help="nodes of a graph, with isolated ones, which are dropped (default: 28)")
    add("--mirror", action="store_true", help="a graph and its copy: no shortcuts")
    add("--nodes-a-side", type=int, help="mirrors: nodes of each copy, with the root (default: 7)")
    add("--chains", action="store_true", help="mirrors: each copy is a single path")
    add("--min-hops", type=int, default=3, help="fewest steps (default: %(default)s)")
    add("--max-hops", type=int, help="most steps (default: 6; mirrors: 3, or --min-hops if that is more)")
    add(
        "--test-hops", type=int, nargs=2, metavar=("MIN", "MAX"), help="test split: fewest and most (default: as above)"
    )
    add("--template", choices=["sentences", "compact"], default="sentences", help="(default: %(default)s)")
    return parser


def settings_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    """Returns the settings that the options ask for; exits if the options contradict each other."""
    mirror, low, test_hops = options.mirror, options.min_hops, options.test_hops or (1, 1)
    default_high = max(3, low) if mirror else 6
    high = default_high if options.max_hops is None else options.max_hops
    nodes = 28 if options.nodes is None else options.nodes
    side = 7 if options.nodes_a_side is None else options.nodes_a_side
    problems = {
        "--mirror takes --nodes-a-side, not --nodes": mirror and options.nodes is not None,
        "--nodes-a-side is an option of --mirror": options.nodes_a_side is not None and not mirror,
        "--chains is an option of --mirror": options.chains and not mirror,
        "--chains sets the number of nodes from the hops: leave --nodes-a-side out": options.chains
        and options.nodes_a_side,
        "it takes 1 <= min-hops <= max-hops": not 1 <= low <= high,
        "--test-hops takes the fewest and then the most, both at least 1": not 1 <= test_hops[0] <= test_hops[1],
        "--nodes must be at least 4, --nodes-a-side at least 2": nodes < 4 or side < 2,
    }
    refuse(parser, problems)
    if options.chains:
        side = 1 + max(high, test_hops[1])
    characters = CHARACTERS[: max(26, 2 * side if mirror else nodes)] if options.template == "compact" else ""
    return Settings(
        nodes, low, high, nodes_a_side=side if mirror else None, chains=options.chains, characters=characters
    )


@command
def main(arguments: list[str] | None = None) -> None:
    parser = graphs_parser()
    options, sizes = parse_splits(parser, arguments)
    splits = make_splits(sizes, settings_of(parser, options), options.seed, progress=True, test_hops=options.test_hops)
    publish_splits(splits, options.out, options.prefix)


if __name__ == "__main__":
    sys.exit(main())
