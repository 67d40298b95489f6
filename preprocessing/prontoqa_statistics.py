"""What `prontoqa_generate.py --check` measures of one ProntoQA example: its ontology, its order and its words."""

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from prontoqa_words import FAMILIES

FAMILY = {word: family[0] for family in FAMILIES for word in family}
SINGULAR = r" is (?P<no>not )?(?:an? (?P<noun>\w+)|(?P<property>\w+))\."
FORMS = {
    "each": re.compile(r"Each (?P<subject>\w+)" + SINGULAR),
    "every": re.compile(r"Every (?P<subject>\w+)" + SINGULAR),
    "plural": re.compile(r"(?P<subject>\w+us)es are (?P<no>not )?(?:(?P<noun>\w+us)es|(?P<property>\w+))\."),
    "entity": re.compile(r"(?P<subject>[A-Z]\w+)" + SINGULAR),
}


class Sentence(NamedTuple):
    """One of noun and property is None."""

    form: str
    subject: str
    negated: bool
    noun: str | None
    property: str | None


def parse(sentence: str) -> Sentence:
    """Raises ValueError where the sentence has none of the known forms."""
    for form, pattern in FORMS.items():
        if match := pattern.fullmatch(sentence):
            subject = match["subject"] if form == "entity" else match["subject"].lower()
            return Sentence(form, subject, match["no"] is not None, match["noun"], match["property"])
    raise ValueError(f"{sentence!r} has no known form")


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.]+\.", text.replace(". ", "."))


def measure(example: dict) -> dict[str, list]:
    """Statistic -> its numbers or words. Raises ValueError where the example cannot be understood."""
    text, mark, query = example["question"].partition(" True or false: ")
    if not mark:
        raise ValueError("its question has no 'True or false:'")
    texts = sentences(text)
    facts = [parse(sentence) for sentence in texts]
    walked = sentences(" ".join(example["steps"]))
    places = [texts.index(sentence) for sentence in walked if sentence in texts]
    chain = [sentence.noun for sentence in map(parse, walked) if sentence.form == "entity" and sentence.noun]
    if not chain or len(places) < 2:
        raise ValueError("its steps are not made of its facts")
    asked = parse(query)
    return {
        **_order(facts, places, texts),
        **_ontology(facts, chain, asked),
        **_negations(facts, chain, asked),
        **_words(facts, chain, asked),
        "steps": [len(example["steps"])],
        "answer": [example["answer"]],
        "last step is the query": [walked[-1] == query],
        "words of the question": [len(example["question"].split())],
        "words of the steps": [len(" ".join(example["steps"]).split())],
    }


def _order(facts: list[Sentence], places: list[int], texts: list[str]) -> dict[str, list]:
    last = max(len(texts) - 1, 1)
    start, *reasons = places
    return {
        "sentences": [len(texts)],
        "which sentence about the entity begins the chain": [texts[start] == texts[-1]],
        "place of the chain's sentences": [place / last for place in reasons],
        "chain's sentences in order": [a < b for a, b in pairwise(reasons)],
        "place of the properties": [place / last for place, fact in enumerate(facts) if fact.property],
        "neighbours about one concept": [a.subject == b.subject for a, b in pairwise(facts)],
    }


def _ontology(facts: list[Sentence], chain: list[str], asked: Sentence) -> dict[str, list]:
    general = [fact for fact in facts if fact.form != "entity"]
    concepts = sorted({word for fact in facts for word in (fact.subject, fact.noun) if word and word != asked.subject})
    up = Counter(fact.subject for fact in general if fact.noun)
    down = Counter(fact.noun for fact in facts if fact.noun)
    properties = Counter(fact.subject for fact in general if fact.property)
    named = [fact.property for fact in facts if fact.property]
    contrary = [fact for fact in general if fact.property == asked.property and fact.subject not in chain]
    aside = [fact.noun for fact in general if fact.noun and fact.subject in chain and fact.noun not in chain]
    return {
        "hops": [len(chain)],
        "concepts": [len(concepts)],
        "families of properties": [len({FAMILY.get(word, word) for word in named})],
        "memberships of a concept": [up[concept] for concept in concepts],
        "members of a concept": [down[concept] for concept in concepts],
        "properties of a concept": [properties[concept] for concept in concepts],
        "concepts beside the chain": [len(aside)],
        "properties of a concept beside the chain": [properties[concept] for concept in aside],
        "sentences with the queried property": [named.count(asked.property)],
        "its bearers beside the chain: memberships": [up[fact.subject] for fact in contrary],
        "its bearers beside the chain: contrary": [fact.negated != _queried(facts, chain).negated for fact in contrary],
    }


def _queried(facts: list[Sentence], chain: list[str]) -> Sentence:
    queried = next((fact for fact in facts if fact.property and fact.subject == chain[-1]), None)
    if queried is None:
        raise ValueError(f"the last concept of its steps, {chain[-1]}, has no property")
    return queried


def _negations(facts: list[Sentence], chain: list[str], asked: Sentence) -> dict[str, list]:
    general = [fact for fact in facts if fact.form != "entity"]
    others = [fact for fact in facts if fact.property and fact.property != asked.property]
    return {
        "query: negated": [asked.negated],
        "queried property: negated": [_queried(facts, chain).negated],
        "other properties of the chain: negated": [fact.negated for fact in others if fact.subject in chain],
        "other properties beside the chain: negated": [fact.negated for fact in others if fact.subject not in chain],
        "form of a membership": [fact.form for fact in general if fact.noun],
        "form of a property": [fact.form for fact in general if fact.property],
        "form of the queried property": [_queried(facts, chain).form],
        "plurals": [sum(fact.form == "plural" for fact in facts)],
    }


def _words(facts: list[Sentence], chain: list[str], asked: Sentence) -> dict[str, list]:
    return {
        "which entity": [asked.subject],
        "which concepts": sorted({fact.noun for fact in facts if fact.noun}),
        "which chain concepts": chain,
        "which families": [FAMILY.get(fact.property, fact.property) for fact in facts if fact.property],
        "which properties": [fact.property for fact in facts if fact.property],
        "which property is queried": [asked.property],
    }
