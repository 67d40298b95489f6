"""Whether the model uses its thoughts: its answers when thoughts are changed.

Legend: N questions, K thoughts, D hidden size.

An intervention replaces some thoughts; the model then makes later thoughts from the changed ones. Each question and
thought has its own replacement, (N, K, D):

    controls   itself (nothing changes); the question with its parts in another order
    content    the mean of the k-th thoughts; noise with their mean and covariance; the latent token's embedding, which
               `pause` feeds; the question's own thoughts in another order; zeros, which no thought resembles
    donors     the thoughts of another question: of any; of one with equally many steps; of one with the same answer;
               of the twin, which begins elsewhere and has another answer
    removal    no later position attends to the thought (`probe.sweep` has fewer thoughts instead)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from analysis.subject import Change, Subject
from analysis.tasks import Machine, Task


@dataclass(frozen=True)
class Intervention:
    """The vectors that replace thoughts, and the answers that should follow."""

    name: str
    kind: str  # control, content, donor, removal
    content: torch.Tensor | None  # (N, K, D); None hides thoughts instead
    donors: tuple[str | None, ...] | None = None  # the donors' answers, None for a question without a donor


def interventions(subject: Subject, task: Task, seed: int = 0) -> list[Intervention]:
    """Returns all interventions. The seed determines donors and noise."""
    random = np.random.default_rng(seed)
    thoughts = subject.thoughts()  # (N, K, D)
    count, k, _ = thoughts.shape
    answers = [example["answer"] for example in task.examples]
    lengths = [len(example["steps"]) for example in task.examples]
    embedding = subject.model.base_causallm.get_input_embeddings()
    latent = embedding(torch.tensor(subject.markers.latent, device=embedding.weight.device))
    found = [
        Intervention("itself", "control", thoughts),
        Intervention("mean", "content", thoughts.mean(0).expand_as(thoughts)),
        Intervention("noise", "content", _noise(thoughts, random)),
        Intervention("pause embedding", "content", latent.detach().float().cpu().expand_as(thoughts)),
        Intervention("in another order", "content", thoughts.roll(-1, dims=1)),
        Intervention("zeros (off the manifold)", "content", torch.zeros_like(thoughts)),
    ]
    for name, allowed in (
        ("any other question", lambda mine, other: True),
        ("as many steps", lambda mine, other: lengths[mine] == lengths[other]),
        ("the same answer", lambda mine, other: answers[mine] == answers[other]),
    ):
        chosen = _donors(count, allowed, random)
        donors = tuple(None if donor is None else answers[donor] for donor in chosen)
        found.append(Intervention(name, "donor", _thoughts_of(chosen, thoughts), donors))
    twins = task.twins()
    content = subject.asking([twin or own for twin, own in zip(twins, task.examples, strict=True)]).thoughts(k)
    found.append(Intervention("the twin", "donor", content, tuple(twin and twin["answer"] for twin in twins)))
    found.append(Intervention("not attended to", "removal", None))
    return found


def _noise(thoughts: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Returns normal noise, (N, K, D), with the mean and covariance of each of the K thoughts."""
    drawn = []
    for vectors in thoughts.unbind(1):  # (N, D)
        mean, covariance = vectors.mean(0).numpy(), np.cov(vectors.numpy(), rowvar=False)
        drawn.append(random.multivariate_normal(mean, covariance, len(vectors), method="eigh").astype(np.float32))
    return torch.from_numpy(np.stack(drawn, axis=1))


def _donors(count: int, allowed, random: np.random.Generator) -> list[int | None]:
    """Draws, for each question, the index of another question that is allowed, or None."""
    orders = (random.permutation(count).tolist() for _ in range(count))
    return [
        next((other for other in order if other != mine and allowed(mine, other)), None)
        for mine, order in enumerate(orders)
    ]


def _thoughts_of(donors: list[int | None], thoughts: torch.Tensor) -> torch.Tensor:
    """Returns the thoughts, (N, K, D), of each question's donor, or its own if it has none."""
    return thoughts[[mine if donor is None else donor for mine, donor in enumerate(donors)]]


def thought_sets(n_thoughts: int) -> dict[str, frozenset[int]]:
    """Returns the sets of thoughts to change: name -> their numbers, from 0."""
    every = range(n_thoughts)
    found = {"all": frozenset(every)}
    if n_thoughts > 1:
        found |= {"all but the last": frozenset(every[:-1]), "the last": frozenset(every[-1:])}
        found |= {f"thought {number + 1}": frozenset([number]) for number in every[:-1]}
    return found


def measure(
    subject: Subject, task: Task, intervention: Intervention, numbers: frozenset[int]
) -> dict[str, float | int | None]:
    """Returns means over the questions that have a step for the first changed thought and, if the intervention needs
    one, a donor. None replaces a mean of nothing.

    accuracy: share of right answers
    donor: share of answers that are the donor's, over the donors with another answer
    gold: probability of the right answer after "### "
    T: gold / (gold + other), and escape: 1 - gold - other, for questions with another candidate
    """
    donors = intervention.donors
    scored = [
        index
        for index, example in enumerate(task.examples)
        if len(example["steps"]) > min(numbers) and (donors is None or donors[index] is not None)
    ]
    if intervention.content is None:
        change, given = None, subject.answers(masked_thoughts=numbers)
    else:
        change = Change(intervention.content, numbers)
        given = subject.answers(change=change)
    answers, others = [example["answer"] for example in task.examples], task.others()
    found: dict = {"questions": len(scored), "accuracy": _share(given[index] == answers[index] for index in scored)}
    found |= dict.fromkeys(("donor", "gold", "T", "escape"))
    if donors is not None:
        found["donor"] = _share(given[index] == donors[index] for index in scored if donors[index] != answers[index])
    if change is not None and scored:
        names = [[answer] if other is None else [answer, other] for answer, other in zip(answers, others, strict=True)]
        shares = subject.values(names, "### ", change=change).numpy()[scored]
        found["gold"] = float(shares[:, 0].mean())
        if others[0] is not None:
            both = shares.sum(1)
            found["T"] = float((shares[:, 0] / np.maximum(both, np.finfo(float).tiny)).mean())
            found["escape"] = float((1 - both).mean())
    return found


def _share(outcomes) -> float | None:
    found = list(outcomes)
    return sum(found) / len(found) if found else None


def with_another_question(subject: Subject, task: Task, seed: int = 0) -> dict:
    """Returns the results of the control that replaces no thought and puts the question's parts in another order."""
    what, examples = task.redrawn(np.random.default_rng(seed))
    given = subject.asking(examples).answers()
    return {
        "what": what,
        "questions": len(given),
        "accuracy": _share(mine == example["answer"] for mine, example in zip(given, task.examples, strict=True)),
        "of the new question": _share(mine == example["answer"] for mine, example in zip(given, examples, strict=True)),
    }


def transplants(subject: Subject, task: Machine, seed: int = 0) -> list[dict]:
    """Returns, for each k, what follows when the k-th thought of another question, a donor, replaces a question's own.

    where it leads: share of answers that the rest of the question's buttons reach from the donor's state
    where it was: share of answers that are still the question's

    Question and donor have at least k steps, and the two answers differ.
    """
    random = np.random.default_rng(seed)
    thoughts, found = subject.thoughts(), []
    for k in range(1, subject.n_thoughts + 1):
        long = [len(example["steps"]) >= k for example in task.examples]
        donors = _donors(len(long), lambda mine, other: long[mine] and long[other], random)  # noqa: B023
        given = subject.answers(change=Change(_thoughts_of(donors, thoughts), frozenset([k - 1])))
        outcomes = []
        for index, donor in enumerate(donors):
            if donor is not None:
                wanted = task.after_transplant(index, donor, k)
                if wanted != task.examples[index]["answer"]:
                    outcomes.append((given[index] == wanted, given[index] == task.examples[index]["answer"]))
        row = {"thought": k, "questions": len(outcomes), "where it leads": _share(new for new, _ in outcomes)}
        found.append({**row, "where it was": _share(old for _, old in outcomes)})
    return found
