"""Generates ProsQA: "Is Tom a lempus or scrompus?" over a random graph in which only one of the two can be reached.

Two roots; every new node descends from one of them, from both or from neither; the question asks for a leaf that only
one root reaches, against one that only the other reaches (the paper's appendix, Hao et al. 2024, A.2). Fields as in the
authors' files. data/README.md shows examples.

    python preprocessing/prosqa.py                        # data/prosqa_{train,valid,test}.json, 17,886/300/500
    python preprocessing/prosqa.py --train 2000 --nodes 14 --max-hops 4
    python preprocessing/prosqa.py --check FILE           # is FILE like what this generator makes?
    python preprocessing/prosqa.py --check FILE OTHER     # are the two alike? exit code 1 where they are not

--mirror leaves cheap rules nothing (shortcuts.py): a graph is copied under a second root with other names, and the two
candidates are the copies of one leaf at the greatest distance. Hops are uniform between the fewest and the most.

    python preprocessing/prosqa.py --mirror --min-hops 1 --max-hops 3 --test-hops 3 4 --template compact --prefix mirror
    python preprocessing/prosqa.py --mirror --chains --min-hops 1 --max-hops 4 --template compact --prefix chains

--template compact writes a name as one character and a step as a name: edges from parent to child, the candidates, and
last the root; steps are the nodes after the root, and the answer is the last of them.

Traps. A rule that looks as far as the hops is the whole search: at 2 hops 'no other source within two back' is always
right. No graph is in two splits, but small graphs have few shapes: under other names they come again.
"""

import argparse
import string
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from compare import check
from files import UserError, command, load_examples, refuse
from graphs import ROOTS, choose_question, grow_graph, grow_side, shortest_path
from prosqa_statistics import measure
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
    """The size and words of the graphs. Hops are edges between the root and the target."""

    nodes: int = 28
    min_hops: int = 3
    max_hops: int = 6
    names: tuple[str, ...] = tuple(NAMES)
    concepts: tuple[str, ...] = tuple(CONCEPTS)
    nodes_a_side: int | None = None  # of a mirror, which ignores `nodes`; of chains that of the longest
    chains: bool = False  # of a mirror: no nodes beside those between root and leaf
    characters: str = ""  # of the compact template, which ignores names and concepts

    @property
    def in_words(self) -> str:
        """The graphs, for messages."""
        side = self.nodes_a_side
        return f"graphs of {self.nodes} nodes" if side is None else f"mirrors of {side} nodes a side"


@dataclass(frozen=True)
class Question:
    """A graph and what is asked of it: nodes are numbered so that every edge (a, b) has a < b, sorted by b."""

    edges: list[tuple[int, int]]
    root: int
    target: int
    neg_target: int


def draw_question(rng: np.random.Generator, settings: Settings) -> Question | None:
    """A graph as the paper's, or None where it has no question with the hops that are asked for."""
    graph = grow_graph(rng, settings.nodes)
    choice = choose_question(rng, graph)
    if choice is None or not settings.min_hops <= graph.depths[choice[1]] <= settings.max_hops:
        return None
    edges = [(parent, node) for node, drawn in enumerate(graph.parents) for parent in drawn]
    number = {node: index for index, node in enumerate(sorted({node for edge in edges for node in edge}))}
    return Question([(number[tail], number[head]) for tail, head in edges], *(number[node] for node in choice))


def draw_mirror(rng: np.random.Generator, settings: Settings) -> Question:
    """A graph and its copy: node n of side s is number 2n + s. The candidates are the copies of a deepest leaf."""
    hops = int(rng.integers(settings.min_hops, settings.max_hops + 1))
    side = grow_side(rng, hops + 1 if settings.chains else settings.nodes_a_side, hops)
    leaf = int(rng.choice([node for node, depth in enumerate(side.depths) if depth == hops]))
    root = int(rng.integers(2))
    one = [[(2 * parent, 2 * node) for parent in drawn] for node, drawn in enumerate(side.parents)]
    edges = [(tail + copy, head + copy) for drawn in one for copy in ROOTS for tail, head in drawn]
    return Question(edges, root, 2 * leaf + root, 2 * leaf + 1 - root)


def name_nodes(rng: np.random.Generator, settings: Settings, edges: list[tuple[int, int]]) -> list[str] | None:
    """A symbol for each node, names for sources and concepts for others; None where there are not enough."""
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
    """One example, or None where the drawn graph has no question with these hops, or more nodes than names."""
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
    asked = {"root": question.root, "target": question.target, "neg_target": question.neg_target}
    return {**text, "idx_to_symbol": symbols, "edges": [list(edge) for edge in question.edges], **asked}


def sentences(facts: list[tuple[str, str]], candidates: list[str], path: list[str], concepts: set[str]) -> dict:
    """Question, answer and steps in the authors' words; the path leads from the root to the target."""

    def sentence(edge: tuple[str, str]) -> str:
        subject = f"Every {edge[0]}" if edge[0] in concepts else edge[0]
        return f"{subject} is a {edge[1]}."

    return {
        "question": " ".join([*map(sentence, facts), f"Is {path[0]} a {' or '.join(candidates)}?"]),
        "answer": f"{path[0]} is a {path[-1]}.",
        "steps": [sentence(edge) for edge in pairwise(path)],
    }


def compact(facts: list[tuple[str, str]], candidates: list[str], path: list[str]) -> dict:
    """The same in single characters. The root stands last: the first step follows the node that it starts from."""
    edges = " ".join(tail + head for tail, head in facts)
    return {"question": f"{edges}?{''.join(candidates)}:{path[0]}", "answer": path[-1], "steps": path[1:]}


def named_edges(example: dict) -> frozenset[tuple[str, str]]:
    """The graph whatever its nodes' numbers: two questions with different graphs are different."""
    symbols = example["idx_to_symbol"]
    return frozenset((symbols[tail], symbols[head]) for tail, head in example["edges"])


def make_splits(
    sizes: dict[str, int],
    settings: Settings,
    seed: int | tuple[int, ...],
    progress: bool = False,
    test_hops: tuple[int, int] | None = None,
) -> Splits:
    """Splits of the given sizes; no graph, and so no question, occurs twice within a split or across them.

    test_hops: the fewest and most of the split `test`, where it has its own. Raises UserError where the settings
    hardly ever allow a question, or never a mirror.
    """
    low, high = test_hops or (settings.min_hops, settings.max_hops)
    of_splits = dict.fromkeys(sizes, settings) | {"test": replace(settings, min_hops=low, max_hops=high)}
    for of_split in of_splits.values():
        check_possible(of_split)
    rng = np.random.default_rng(seed)
    hopeless = f"{settings.in_words} with these words hardly ever have a new question of so many hops"
    return draw(sizes, lambda name: make_example(rng, of_splits[name]), progress, named_edges, hopeless)


def check_possible(settings: Settings) -> None:
    """Raises UserError where a mirror has no leaf so deep, or more nodes than names. Of other graphs `draw` notices."""
    side, hops = settings.nodes_a_side, settings.max_hops
    if side is None:
        return
    n_characters, n_names, n_concepts = map(len, (settings.characters, settings.names, settings.concepts))
    if hops >= side:
        raise UserError(f"{side} nodes a side have no leaf {hops} hops from their root, which takes {hops + 1}")
    if n_characters and n_characters < 2 * side:
        raise UserError(f"{settings.in_words} take {2 * side} characters, and there are {n_characters}")
    if not n_characters and (n_names < 2 or n_concepts < 2 * side - 2):
        raise UserError(
            f"{settings.in_words} take 2 names and {2 * side - 2} concepts, and there are {n_names} and {n_concepts}"
        )


def add_graph_options(parser: argparse.ArgumentParser) -> None:
    """The graphs, and their words."""
    add = parser.add_argument
    add("--nodes", type=int, help="nodes before isolated ones go (default: 28)")
    add("--mirror", action="store_true", help="a graph and its copy: no shortcuts")
    add("--nodes-a-side", type=int, help="of a mirror, with the root (default: 7)")
    add("--chains", action="store_true", help="of a mirror: two chains, with nothing beside them")
    add("--hops", type=int, help="exactly so many steps")
    add("--min-hops", type=int, help="fewest steps (default: 3)")
    add("--max-hops", type=int, help="most steps (default: 6; of a mirror 3, or the fewest)")
    add("--test-hops", type=int, nargs=2, metavar=("MIN", "MAX"), help="of the test split, if others")
    add("--template", choices=["sentences", "compact"], default="sentences", help="(default: sentences)")


def settings_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    """The settings that the options above ask for; exits where they make no sense."""
    mirror, compact, test_hops = options.mirror, options.template == "compact", options.test_hops or (1, 1)
    low = options.hops if options.min_hops is None else options.min_hops
    low = 3 if low is None else low
    high = options.hops if options.max_hops is None else options.max_hops
    high = (max(3, low) if mirror else 6) if high is None else high
    nodes = 28 if options.nodes is None else options.nodes
    side = 7 if options.nodes_a_side is None else options.nodes_a_side
    if options.chains:
        side = 1 + max(high, test_hops[1])
    problems = {
        "--mirror takes --nodes-a-side, not --nodes": mirror and options.nodes is not None,
        "--nodes-a-side is an option of --mirror": options.nodes_a_side is not None and not mirror,
        "--chains is an option of --mirror, whose nodes follow from the hops: leave --nodes-a-side out": options.chains
        and (not mirror or options.nodes_a_side is not None),
        "--hops takes the place of --min-hops and --max-hops": options.hops is not None
        and (options.min_hops, options.max_hops) != (None, None),
        "it takes 1 <= min-hops <= max-hops": not 1 <= low <= high,
        "--test-hops takes the fewest and then the most, 1 or more": not 1 <= test_hops[0] <= test_hops[1],
        "--nodes must be at least 4, --nodes-a-side at least 2": nodes < 4 or side < 2,
        "--check reads sentences of one kind of question: no --template compact, no --test-hops": options.check
        and (compact or options.test_hops),
    }
    refuse(parser, problems)
    characters = CHARACTERS[: max(26, 2 * side if mirror else nodes)] if compact else ""
    side = side if mirror else None
    return Settings(nodes, low, high, nodes_a_side=side, chains=options.chains, characters=characters)


@command
def main(arguments: list[str] | None = None) -> int | None:
    parser = splits_parser(__doc__, train=17886, valid=300, test=500, prefix="prosqa", checks=True)
    add_graph_options(parser)
    options, sizes = parse_splits(parser, arguments)
    settings = settings_of(parser, options)
    if options.check:
        return check(options.check, load_examples, partial(make_splits, settings=settings), measure, options.seed)
    splits = make_splits(sizes, settings, options.seed, progress=True, test_hops=options.test_hops)
    return publish_splits(splits, options.out, options.prefix)


if __name__ == "__main__":
    sys.exit(main())
