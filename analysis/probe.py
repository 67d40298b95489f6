"""What thoughts hold: what can be read from them, and what the model writes when language is forced after them.

Legend: N questions, K thoughts, D hidden size, C names. Everything returned is ready for JSON.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from analysis.subject import Subject
from analysis.tasks import Machine, Task
from trainer.evaluate import extract_answer
from trainer.inference import decoded_thoughts

TOP = 5  # names shown
FOLDS = 2
RIDGE = 1e-2  # of the linear probe, relative to the mean eigenvalue of the thoughts' covariance


def values(subject: Subject, task: Task, n_thoughts: int) -> np.ndarray:
    """(n_thoughts + 1, N, C): each name's value after 0, 1, ... thoughts (paper, Section 5.2)."""
    names = task.names()
    return np.stack([subject.values(names, task.step_prefix, k).numpy() for k in range(n_thoughts + 1)])


def next_step(task: Task, of_names: np.ndarray) -> list[dict]:
    """For each number of thoughts, over the questions that have a step after them: how likely the name is that begins
    the right next step, how often it is the likeliest name, and how much probability lies on no name at all."""
    found, names = [], task.names()
    for k, shares in enumerate(of_names):
        following = [(index, name) for index in range(len(names)) if (name := task.next_name(index, k)) is not None]
        if not following:
            continue
        asked = [index for index, _ in following]
        right = shares[asked, gold := [names[index].index(name) for index, name in following]]
        found.append(
            {
                "thoughts": k,
                "questions": len(asked),
                "value": float(right.mean()),
                "renormalised": float((right / np.maximum(shares[asked].sum(1), 1e-12)).mean()),
                "first": float((shares[asked].argmax(1) == gold).mean()),
                "elsewhere": float(1 - shares[asked].sum(1).mean()),
            }
        )
    return found


def decoded(subject: Subject, task: Machine) -> list[dict]:
    """For each thought, over the questions that have so many steps: how often the state after as many steps is what
    the LM head finds likeliest of the states where the thought is made, and how often a linear probe finds it in the
    hidden state there (ridge regression to the states, fitted on one half of the questions and tested on the other)."""
    readings = subject.readings()  # (N, K, D)
    head = subject.model.base_causallm.get_output_embeddings().weight
    ids = [subject.tokenizer(state, add_special_tokens=False)["input_ids"][-1] for state in task.states]
    found = []
    for k in range(subject.n_thoughts):
        asked = [index for index, example in enumerate(task.examples) if len(example["steps"]) > k]
        if not asked:
            break
        gold = np.array([task.states.index(task.examples[index]["steps"][k]) for index in asked])
        states = readings[asked, k]
        with torch.no_grad():
            words = subject.model.head(states.to(head))[:, ids].argmax(1).cpu().numpy()
        found.append(
            {
                "thought": k + 1,
                "questions": len(asked),
                "head": float((words == gold).mean()),
                "probe": probe_accuracy(states.numpy(), gold, len(task.states)) if len(asked) >= FOLDS else None,
            }
        )
    return found


def probe_accuracy(states: np.ndarray, classes: np.ndarray, n_classes: int) -> float:
    """How often a linear map of (N, D) finds the class, each half of the rows judged by a map fitted to the other."""
    fold = np.arange(len(states)) % FOLDS
    right = np.zeros(len(states), dtype=bool)
    for number in range(FOLDS):
        of_fit, of_test = fold != number, fold == number
        mean = states[of_fit].mean(0)
        inputs = np.c_[states - mean, np.ones(len(states))].astype(np.float64)
        gram = inputs[of_fit].T @ inputs[of_fit]
        gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram, inputs[of_fit].T @ np.eye(n_classes)[classes[of_fit]])
        right[of_test] = (inputs[of_test] @ weights).argmax(1) == classes[of_test]
    return float(right.mean())


def _shapes(thoughts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) norms of thoughts, and (N, K - 1) cosines of each but the first with the one before."""
    norms = np.linalg.norm(thoughts, axis=2)
    return norms, (thoughts[:, 1:] * thoughts[:, :-1]).sum(2) / (norms[:, 1:] * norms[:, :-1])


def shape(subject: Subject) -> list[dict]:
    """For each thought its mean norm, and its mean cosine with the thought before."""
    norms, cosines = (found.mean(0).tolist() for found in _shapes(subject.thoughts().numpy()))
    pairs = zip(norms, [None, *cosines], strict=True)
    return [{"thought": k, "norm": norm, "cosine with the one before": one} for k, (norm, one) in enumerate(pairs, 1)]


def sweep(subject: Subject, task: Task) -> list[dict]:
    """With 0 to K + 2 thoughts, then language (paper, Section 5.1): the accuracy, and how many outputs are of each of
    the task's classes."""
    found = []
    for k in range(subject.n_thoughts + 3):
        outputs = subject.outputs(k)
        classes = Counter(task.classify(index, output, k) for index, output in enumerate(outputs))
        right = sum(extract_answer(mine) == e["answer"] for mine, e in zip(outputs, task.examples, strict=True))
        found.append({"thoughts": k, "questions": len(outputs), "accuracy": right / len(outputs)})
        found[-1]["classes"] = {name: classes[name] for name in task.classes}
    return found


def close_up(subject: Subject, task: Task, chosen: list[int]) -> list[dict]:
    """Chosen questions by themselves: the output, and for each number of thoughts the likeliest words of the LM
    head where the next thought is made, the likeliest names when language is forced, the probability of no name, the
    norm of the thought, and its cosine with the one before."""
    if not chosen:
        return []
    few = subject.asking([task.examples[index] for index in chosen])
    names = [task.names()[index] for index in chosen]
    heads = [words for _, inputs in few.batches() for words in decoded_thoughts(few.model, few.tokenizer, inputs)]
    values = [few.values(names, task.step_prefix, k).numpy() for k in range(few.n_thoughts + 1)]
    norms, cosines = (of.tolist() for of in _shapes(few.thoughts().numpy()))
    found = []
    for index, (example, output) in enumerate(zip(few.examples, few.outputs(), strict=True)):
        after = []
        for k, shares in enumerate(values):
            row, best = shares[index], []
            if k >= task.fewest:
                order = row[: len(names[index])].argsort()[::-1][:TOP]
                best = [(names[index][number], float(row[number])) for number in order]
            after.append(
                {
                    "thoughts": k,
                    "names": best,
                    "elsewhere": float(1 - row.sum()) if k >= task.fewest else None,
                    "norm": norms[index][k - 1] if k else None,
                    "cosine": cosines[index][k - 2] if k > 1 else None,
                }
            )
        kept = {key: example[key] for key in ("question", "steps", "answer")}
        found.append({**kept, "output": output, "words": heads[index], "after": after})
    return found
