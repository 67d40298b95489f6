"""The answers with another number of thoughts: 0 to K + 2, then language (paper, Section 5.1)."""

from __future__ import annotations

from collections import Counter

from analysis.subject import Subject
from analysis.tasks import Task
from trainer.evaluate import extract_answer


def sweep(subject: Subject, task: Task) -> list[dict]:
    """For each number of thoughts the accuracy, and how many outputs are of each of the task's classes."""
    found = []
    for k in range(subject.n_thoughts + 3):
        outputs = subject.outputs(k)
        classes = Counter(task.classify(index, output, k) for index, output in enumerate(outputs))
        both = zip(outputs, task.examples, strict=True)
        right = sum(extract_answer(output) == example["answer"] for output, example in both)
        found.append({"thoughts": k, "questions": len(outputs), "accuracy": right / len(outputs)})
        found[-1]["classes"] = {name: classes[name] for name in task.classes}
    return found
