"""Whether thoughts are used: the answers when thoughts are changed.

Legend: N questions, K thoughts, D hidden size.

Every intervention replaces some thoughts and lets the model go on: later thoughts are made from the changed ones. The
replacement is a (N, K, D) of content, a vector for each question and thought:

    controls   itself (nothing changes); the question with its parts in another order
    content    the mean thought of that number; noise of the mean and covariance of that number; the latent token's
               embedding (what `pause` feeds); the question's own thoughts in another order; zeros (off the manifold:
               no thought looks like that)
    donors     the thoughts of another question: any, one with as many steps, one with the same answer, and the twin,
               which begins elsewhere and so has a known other answer
    removal    no later position may attend to the thought (`probe.sweep` takes thoughts away)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from analysis.subject import Change, Subject
from analysis.tasks import Machine, Task


@dataclass(frozen=True)
class Intervention:
    """What replaces thoughts, and the answers that should follow."""

    name: str
    kind: str  # control, content, donor, removal
    content: torch.Tensor | None  # (N, K, D); None hides thoughts instead
    donors: tuple[str | None, ...] | None = None  # the donors' answers, None where a question has no donor


def interventions(subject: Subject, task: Task, seed: int = 0) -> list[Intervention]:
    """All replacements of thoughts. Draws follow from the seed."""
    random = np.random.default_rng(seed)
    thoughts = subject.thoughts()  # (N, K, D)
    count, k, _ = thoughts.shape
    answers = [example["answer"] for example in task.examples]
    lengths = [len(example["steps"]) for example in task.examples]
    embedding = subject.model.base_causallm.get_input_embeddings()
    latent = embedding(torch.tensor(subject.asked.markers.latent, device=embedding.weight.device))
    mean = thoughts.mean(0)
    turned = torch.stack([thoughts[:, (number + 1) % k] for number in range(k)], dim=1)
    found = [
        Intervention("itself", "control", thoughts),
        Intervention("mean", "content", mean.expand_as(thoughts)),
        Intervention("noise", "content", _noise(thoughts, random)),
        Intervention("pause embedding", "content", latent.detach().float().cpu().expand_as(thoughts)),
        Intervention("in another order", "content", turned),
        Intervention("zeros (off the manifold)", "content", torch.zeros_like(thoughts)),
    ]
    for name, allowed in (
        ("any other question", lambda mine, other: True),
        ("as many steps", lambda mine, other: lengths[mine] == lengths[other]),
        ("the same answer", lambda mine, other: answers[mine] == answers[other]),
    ):
        chosen = _donors(count, allowed, random)
        of_donors = tuple(None if donor is None else answers[donor] for donor in chosen)
        found.append(Intervention(name, "donor", _taken(thoughts, chosen), of_donors))
    twins = task.twins()
    content = subject.asking([twin or own for twin, own in zip(twins, task.examples, strict=True)]).thoughts(k)
    found.append(Intervention("the twin", "donor", content, tuple(twin and twin["answer"] for twin in twins)))
    found.append(Intervention("not attended to", "removal", None))
    return found


def _noise(thoughts: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """(N, K, D) of normal noise with the mean and covariance of each number."""
    drawn = []
    for of_number in thoughts.unbind(1):
        mean, covariance = of_number.mean(0).numpy(), np.cov(of_number.numpy(), rowvar=False)
        drawn.append(random.multivariate_normal(mean, covariance, len(of_number), method="eigh").astype(np.float32))
    return torch.from_numpy(np.stack(drawn, axis=1))


def _donors(count: int, allowed, random: np.random.Generator) -> list[int | None]:
    """For each question another one that is allowed, or None."""
    orders = (random.permutation(count).tolist() for _ in range(count))
    return [
        next((other for other in order if other != mine and allowed(mine, other)), None)
        for mine, order in enumerate(orders)
    ]


def _taken(thoughts: torch.Tensor, donors: list[int | None]) -> torch.Tensor:
    """(N, K, D): the thoughts of each question's donor, its own without one."""
    return thoughts[[mine if donor is None else donor for mine, donor in enumerate(donors)]]


def places(n_thoughts: int) -> dict[str, frozenset[int]]:
    """Which thoughts are changed: name -> their numbers, from 0."""
    every = range(n_thoughts)
    found = {"all": frozenset(every)}
    if n_thoughts > 1:
        found |= {"all but the last": frozenset(every[:-1]), "the last": frozenset(every[-1:])}
        found |= {f"thought {number + 1}": frozenset([number]) for number in every[:-1]}
    return found


def measure(
    subject: Subject, task: Task, intervention: Intervention, numbers: frozenset[int]
) -> dict[str, float | int | None]:
    """The results over the questions that have a step for the first changed thought, and a donor where one is needed:

    accuracy: the answer is still right
    donor: the answer is the donor's, of those donors whose answer is another
    gold: mean probability of the right answer when an answer is forced
    T: gold / (gold + other), escape: 1 - gold - other, where there is another candidate
    """
    donors = intervention.donors
    asked = [
        index
        for index, example in enumerate(task.examples)
        if len(example["steps"]) > min(numbers) and (donors is None or donors[index] is not None)
    ]
    hides = intervention.content is None
    change, hidden = (None, numbers) if hides else (Change(intervention.content, numbers), frozenset())
    given = subject.answers(change=change, hidden_columns=hidden)
    answers, others = [example["answer"] for example in task.examples], task.others()
    found: dict = {"questions": len(asked), "accuracy": _share(given[index] == answers[index] for index in asked)}
    found |= dict.fromkeys(("donor", "gold", "T", "escape"))
    if donors is not None:
        found["donor"] = _share(given[index] == donors[index] for index in asked if donors[index] != answers[index])
    if change is not None and asked:
        names = [[answer] if other is None else [answer, other] for answer, other in zip(answers, others, strict=True)]
        shares = subject.values(names, "### ", change=change).numpy()[asked]
        found["gold"] = float(shares[:, 0].mean())
        if others[0] is not None:
            both = shares.sum(1)
            found["T"] = float((shares[:, 0] / np.maximum(both, 1e-12)).mean())
            found["escape"] = float((1 - both).mean())
    return found


def _share(outcomes) -> float | None:
    found = list(outcomes)
    return sum(found) / len(found) if found else None


def with_another_question(subject: Subject, task: Task, seed: int = 0) -> dict:
    """The control without a change of thoughts: the question's parts in another order."""
    what, examples = task.redrawn(np.random.default_rng(seed))
    given = subject.asking(examples).answers()
    return {
        "what": what,
        "questions": len(given),
        "accuracy": _share(mine == example["answer"] for mine, example in zip(given, task.examples, strict=True)),
        "of the new question": _share(mine == example["answer"] for mine, example in zip(given, examples, strict=True)),
    }


def transplants(subject: Subject, task: Machine, seed: int = 0) -> list[dict]:
    """The k-th thought of another question, after k steps in another state: how often the answer is where the rest of
    this question's buttons lead from there, and how often it stays what it was. Over questions and donors that have k
    steps, and where the two differ."""
    random = np.random.default_rng(seed)
    thoughts, found = subject.thoughts(), []
    for k in range(1, subject.n_thoughts + 1):
        has = [len(example["steps"]) >= k for example in task.examples]
        donors = _donors(len(has), lambda mine, other: has[mine] and has[other], random)  # noqa: B023
        given = subject.answers(change=Change(_taken(thoughts, donors), frozenset([k - 1])))
        asked = []
        for index, donor in enumerate(donors):
            if donor is not None:
                wanted = task.after_transplant(index, donor, k)
                if wanted != task.examples[index]["answer"]:
                    asked.append((given[index] == wanted, given[index] == task.examples[index]["answer"]))
        shares = {"where it leads": _share(new for new, _ in asked), "where it was": _share(old for _, old in asked)}
        found.append({"thought": k, "questions": len(asked), **shares})
    return found
