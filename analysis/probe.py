"""What thoughts hold: what probes decode from them, and what the model writes when language begins right after them.

Legend: N questions, K thoughts, D hidden size, C names. The functions return rows for a JSON file.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from analysis.subject import Subject
from analysis.tasks import Machine, Task
from trainer.evaluate import extract_answer

FOLDS = 2
RIDGE = 1e-2  # of the linear probe, relative to the mean eigenvalue of the thoughts' covariance


def values(subject: Subject, task: Task, n_thoughts: int) -> np.ndarray:
    """Returns each name's value after 0, 1, ... n_thoughts thoughts, (n_thoughts + 1, N, C) (paper, Section 5.2)."""
    names = task.names()
    return np.stack([subject.values(names, task.step_prefix, k).numpy() for k in range(n_thoughts + 1)])


def next_step(task: Task, name_values: np.ndarray) -> list[dict]:
    """Returns, for each number k of thoughts, means over the questions that have a step k + 1.

    value: probability of the name that begins this step
    renormalised: the same, with the names' probabilities scaled to sum to 1
    first: share of questions in which it is the likeliest name
    elsewhere: probability outside all names
    """
    found, names = [], task.names()
    for k, shares in enumerate(name_values):
        following = [(index, name) for index in range(len(names)) if (name := task.next_name(index, k)) is not None]
        if not following:
            continue
        chosen = [index for index, _ in following]
        right = shares[chosen, gold := [names[index].index(name) for index, name in following]]
        found.append(
            {
                "thoughts": k,
                "questions": len(chosen),
                "value": float(right.mean()),
                "renormalised": float((right / np.maximum(shares[chosen].sum(1), 1e-12)).mean()),
                "first": float((shares[chosen].argmax(1) == gold).mean()),
                "elsewhere": float(1 - shares[chosen].sum(1).mean()),
            }
        )
    return found


def decoded(subject: Subject, task: Machine) -> list[dict]:
    """Returns, for each thought k, how often the state after k steps is decoded from the hidden state that the thought
    is made from, over the questions with at least k steps.

    head: by the LM head, as the likeliest of the states
    probe: by a linear probe (ridge regression), fitted on one half of the questions and tested on the other
    """
    readings = subject.readings()  # (N, K, D)
    head = subject.model.base_causallm.get_output_embeddings().weight
    ids = [subject.tokenizer(state, add_special_tokens=False)["input_ids"][-1] for state in task.states]
    found = []
    for k in range(subject.n_thoughts):
        chosen = [index for index, example in enumerate(task.examples) if len(example["steps"]) > k]
        if not chosen:
            break
        gold = np.array([task.states.index(task.examples[index]["steps"][k]) for index in chosen])
        states = readings[chosen, k]
        with torch.no_grad():
            words = subject.model.head(states.to(head))[:, ids].argmax(1).cpu().numpy()
        found.append(
            {
                "thought": k + 1,
                "questions": len(chosen),
                "head": float((words == gold).mean()),
                "probe": probe_accuracy(states.numpy(), gold, len(task.states)) if len(chosen) >= FOLDS else None,
            }
        )
    return found


def probe_accuracy(states: np.ndarray, classes: np.ndarray, n_classes: int) -> float:
    """Returns the two-fold cross-validated accuracy of a linear probe from states, (N, D), to classes, (N,)."""
    fold = np.arange(len(states)) % FOLDS
    right = np.zeros(len(states), dtype=bool)
    for number in range(FOLDS):
        fit, test = fold != number, fold == number
        inputs = np.c_[states - states[fit].mean(0), np.ones(len(states))].astype(np.float64)
        gram = inputs[fit].T @ inputs[fit]
        gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram, inputs[fit].T @ np.eye(n_classes)[classes[fit]])
        right[test] = (inputs[test] @ weights).argmax(1) == classes[test]
    return float(right.mean())


def shape(subject: Subject) -> list[dict]:
    """Returns each thought's mean norm and its mean cosine with the thought before."""
    thoughts = subject.thoughts().numpy()  # (N, K, D)
    norms = np.linalg.norm(thoughts, axis=2)  # (N, K)
    cosines = (thoughts[:, 1:] * thoughts[:, :-1]).sum(2) / (norms[:, 1:] * norms[:, :-1])  # (N, K - 1)
    pairs = zip(norms.mean(0).tolist(), [None, *cosines.mean(0).tolist()], strict=True)
    return [{"thought": k, "norm": norm, "cosine with the one before": one} for k, (norm, one) in enumerate(pairs, 1)]


def sweep(subject: Subject, task: Task) -> list[dict]:
    """Returns the accuracy and the number of outputs of each class after 0 to K + 2 thoughts (paper, Section 5.1)."""
    found = []
    for k in range(subject.n_thoughts + 3):
        outputs = subject.outputs(k)
        classes = Counter(task.classify(index, output, k) for index, output in enumerate(outputs))
        right = sum(extract_answer(mine) == e["answer"] for mine, e in zip(outputs, task.examples, strict=True))
        found.append({"thoughts": k, "questions": len(outputs), "accuracy": right / len(outputs)})
        found[-1]["classes"] = {name: classes[name] for name in task.classes}
    return found
