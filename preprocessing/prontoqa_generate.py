"""Generates ProntoQA: "True or false: Max is not wooden." over a small made-up ontology (arXiv 2210.01240).

An ontology as the official generator draws it for five hops, fictional words, distractors and random order:

    entity -> C1 -> C2 -> C3 -> C4 -> C5 -> C6     the chain; the query is about C5's property
    C1..C5 also lead to a concept each that is no part of the chain
    entity -> D1 -> D2                             a second membership, which leads nowhere
    X                                              a concept by itself, with the contrary of C5's property

Every concept but C6, D2 has one property; no two properties are of one family (no two colours), but for X's. The
sentences about concepts come in random order, each in one of three forms; the two about the entity come last.

    python preprocessing/prontoqa_generate.py                        # data/prontoqa_{train,valid,test}.json
    python preprocessing/prontoqa_generate.py --check FILE           # is FILE like what this makes?
    python preprocessing/prontoqa_generate.py --check FILE OTHER     # are the two alike? exit code 1 if not

FILE is the official 5hop_0shot_random.json or a converted one.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from compare import check
from files import command, load_examples, read_json
from prontoqa import PAPER, QUERY, convert
from prontoqa_statistics import measure
from prontoqa_words import CONCEPTS, FAMILIES, NAMES
from splits import Splits, draw, parse_splits, publish_splits, splits_parser

HOPS = 5
NEGATED = 0.3  # of the properties; the queried one and its contrary are negated in half of the examples


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def fact(rng: np.random.Generator, subject: str, word: str, noun: bool, negated: bool = False) -> str:
    """A sentence about every member of a concept: that they are of another one (noun), or have a property."""
    no = "not " if negated else ""
    if rng.random() < 0.5:
        return f"{subject.capitalize()}es are {no}{word}{'es' if noun else ''}."
    quantifier = "Each" if rng.random() < 0.5 else "Every"
    return f"{quantifier} {subject} is {no}{f'{article(word)} {word}' if noun else word}."


def make_example(rng: np.random.Generator) -> dict:
    """One example: question, steps and answer."""
    words = iter(rng.permutation(CONCEPTS).tolist())
    chain = [next(words) for _ in range(HOPS + 1)]
    aside = [next(words) for _ in range(HOPS)]
    distractor, distractor_parent, alone = (next(words) for _ in range(3))
    families = iter(rng.permutation(len(FAMILIES)).tolist())
    bearers = [*chain[:HOPS], *aside, distractor]
    properties = {concept: str(rng.choice(FAMILIES[next(families)])) for concept in bearers}
    negations = {concept: bool(rng.random() < NEGATED) for concept in bearers}
    queried = chain[HOPS - 1]
    negations[queried] = bool(rng.random() < 0.5)
    properties[alone], negations[alone] = properties[queried], not negations[queried]

    memberships = [*pairwise(chain), *zip(chain, aside, strict=False)]
    memberships.append((distractor, distractor_parent))
    member = {pair: fact(rng, *pair, noun=True) for pair in memberships}
    has = {concept: fact(rng, concept, word, False, negations[concept]) for concept, word in properties.items()}
    facts = [*member.values(), *has.values()]
    entity = str(rng.choice(NAMES))

    def is_a(concept: str) -> str:
        return f"{entity} is {article(concept)} {concept}."

    def is_so(negated: bool) -> str:
        return f"{entity} is {'not ' if negated else ''}{properties[queried]}."

    about_entity = [is_a(concept) for concept in rng.permutation([chain[0], distractor]).tolist()]
    asked = bool(rng.random() < 0.5)
    reasons = [*(member[pair] for pair in pairwise(chain[:HOPS])), has[queried]]
    steps = [f"{is_a(concept)} {reason}" for concept, reason in zip(chain[:HOPS], reasons, strict=True)]
    return {
        "question": " ".join([*(facts[i] for i in rng.permutation(len(facts))), *about_entity, QUERY + is_so(asked)]),
        "steps": [*steps, is_so(negations[queried])],
        "answer": str(asked == negations[queried]),
    }


def make_splits(sizes: dict[str, int], seed: int | tuple[int, ...], progress: bool = False) -> Splits:
    """Splits of the given sizes; no question occurs twice, within a split or across them."""
    rng = np.random.default_rng(seed)
    return draw(sizes, lambda _: make_example(rng), progress)


def read_either(path: Path) -> list[dict]:
    """Examples of an official file or of a converted one."""
    return convert(path) if isinstance(read_json(path), dict) else load_examples(path)


@command
def main(arguments: list[str] | None = None) -> int | None:
    options, sizes = parse_splits(splits_parser(__doc__, **PAPER, checks=True), arguments)
    if options.check:
        return check(options.check, read_either, make_splits, measure, options.seed)
    return publish_splits(make_splits(sizes, options.seed, progress=True), options.out, "prontoqa")


if __name__ == "__main__":
    sys.exit(main())
