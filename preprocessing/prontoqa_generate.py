"""Generates ProntoQA: "True or false: Max is not wooden." over a small fictional ontology (arXiv 2210.01240).

The ontology is that of the official generator with five hops, fictional words, distractors and random order:

    entity -> C1 -> C2 -> C3 -> C4 -> C5 -> C6     the chain; the query is about C5's property
    each of C1..C5 -> another concept              outside the chain
    entity -> D1 -> D2                             a distractor: a second membership that leads nowhere
    X                                              an unrelated concept with the negation of C5's property

Every concept except C6, D2 and X has one property of its own. No two of these properties are of one family (no two
colours). The sentences about concepts come in random order, each in one of three forms; the two about the entity come
last.

    python preprocessing/prontoqa_generate.py                        # data/prontoqa_{train,valid,test}.json
"""

import sys
from itertools import pairwise

import numpy as np
from files import command
from prontoqa import PAPER, QUERY
from splits import Splits, draw, parse_splits, publish_splits, splits_parser

HOPS = 5
NEGATED = 0.3  # share of negated properties; of the queried property half are negated
# the words in the official generator's examples; the properties of one family exclude each other
NAMES, CONCEPTS = (
    words.split()
    for words in (
        "Alex Fae Max Polly Rex Sally Sam Stella Wren",
        "brimpus dumpus gorpus grimpus impus jompus lempus lorpus numpus rompus shumpus sterpus tumpus vumpus wumpus "
        "yumpus zumpus",
    )
)
FAMILIES = [
    family.split()
    for family in (
        *("blue brown orange red", "large small", "liquid luminous metallic wooden", "opaque transparent"),
        *("feisty happy nervous shy", "bright dull", "bitter sour spicy sweet", "earthy floral fruity"),
        *("cold hot temperate", "aggressive amenable angry kind mean", "discordant loud melodic muffled"),
        *("fast moderate slow", "overcast rainy snowy sunny windy"),
    )
]


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def fact(rng: np.random.Generator, subject: str, word: str, is_noun: bool, negated: bool = False) -> str:
    """Returns a sentence about all members of a concept: they belong to another one (a noun), or have a property."""
    no = "not " if negated else ""
    if rng.random() < 0.5:
        return f"{subject.capitalize()}es are {no}{word}{'es' if is_noun else ''}."
    quantifier = "Each" if rng.random() < 0.5 else "Every"
    return f"{quantifier} {subject} is {no}{f'{article(word)} {word}' if is_noun else word}."


def make_example(rng: np.random.Generator) -> dict:
    """Returns one example: question, steps and answer."""
    concepts = iter(rng.permutation(CONCEPTS).tolist())
    chain = [next(concepts) for _ in range(HOPS + 1)]
    beside = [next(concepts) for _ in range(HOPS)]  # the concepts outside the chain that C1..C5 lead to
    distractor, distractor_parent, unrelated = (next(concepts) for _ in range(3))
    families = iter(rng.permutation(len(FAMILIES)).tolist())
    owners = [*chain[:HOPS], *beside, distractor]
    properties = {concept: str(rng.choice(FAMILIES[next(families)])) for concept in owners}
    negations = {concept: bool(rng.random() < NEGATED) for concept in owners}
    queried = chain[HOPS - 1]
    negations[queried] = bool(rng.random() < 0.5)
    properties[unrelated], negations[unrelated] = properties[queried], not negations[queried]

    memberships = [*pairwise(chain), *zip(chain, beside, strict=False), (distractor, distractor_parent)]
    member = {pair: fact(rng, *pair, is_noun=True) for pair in memberships}
    has = {concept: fact(rng, concept, word, False, negations[concept]) for concept, word in properties.items()}
    facts = [*member.values(), *has.values()]
    entity = str(rng.choice(NAMES))

    def is_a(concept: str) -> str:
        return f"{entity} is {article(concept)} {concept}."

    def has_property(negated: bool) -> str:
        return f"{entity} is {'not ' if negated else ''}{properties[queried]}."

    about_entity = [is_a(concept) for concept in rng.permutation([chain[0], distractor]).tolist()]
    negated_in_query = bool(rng.random() < 0.5)
    query = QUERY + has_property(negated_in_query)
    reasons = [*(member[pair] for pair in pairwise(chain[:HOPS])), has[queried]]
    steps = [f"{is_a(concept)} {reason}" for concept, reason in zip(chain[:HOPS], reasons, strict=True)]
    return {
        "question": " ".join([*(facts[i] for i in rng.permutation(len(facts))), *about_entity, query]),
        "steps": [*steps, has_property(negations[queried])],
        "answer": str(negated_in_query == negations[queried]),
    }


def make_splits(sizes: dict[str, int], seed: int, progress: bool = False) -> Splits:
    """Returns splits of the given sizes. No question occurs twice, within a split or across splits."""
    rng = np.random.default_rng(seed)
    return draw(sizes, lambda _: make_example(rng), progress)


@command
def main(arguments: list[str] | None = None) -> None:
    options, sizes = parse_splits(splits_parser(__doc__, **PAPER), arguments)
    publish_splits(make_splits(sizes, options.seed, progress=True), options.out, "prontoqa")


if __name__ == "__main__":
    sys.exit(main())
