"""The two kinds of data that the analysis knows, with what their examples say beyond the answer.

State tracking (preprocessing/machine.py) needs PREFIX_machine.json beside the data file. Graphs need ProsQA's fields;
they may be the paper's or mirrored, in the template of sentences or in the compact one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from analysis import paths
from preprocessing.examples import load_examples, read_json
from trainer.evaluate import extract_answer, extract_steps
from utils import UserError


class Task:
    """Questions of one kind."""

    kind: str
    classes: tuple[str, ...]  # of outputs, in the order in which figures stack them
    step_prefix: str = ""  # the text of a step before the name that it begins with
    fewest: int = 0  # steps after fewer thoughts than this begin without step_prefix

    def __init__(self, examples: list[dict]):
        self.examples = examples

    def names(self) -> list[list[str]]:
        """Returns, for each question, all names that can follow step_prefix."""

    def next_name(self, index: int, k: int) -> str | None:
        """Returns the name that begins a question's step k + 1; None without such a step, and for k < fewest."""
        steps = self.examples[index]["steps"]
        return steps[k] if self.fewest <= k < len(steps) else None

    def classify(self, index: int, output: str, n_thoughts: int) -> str:
        """Returns the class of an output."""

    def others(self) -> list[str | None]:
        """Returns, for each question, its wrong candidate; None if the question names no candidates."""
        return [None] * len(self.examples)

    def twins(self) -> list[dict | None]:
        """Returns, for each question, one that begins elsewhere and has another answer; None if there is none."""

    def redrawn(self, random) -> tuple[str, list[dict]]:
        """Returns (what was done, the questions with their parts in another order)."""


class Machine(Task):
    """State tracking: each button permutes the states; the answer is the state after the last button."""

    kind = "machine"
    classes = ("right steps and answer", "right answer only", "wrong answer")

    def __init__(self, examples: list[dict], permutations: dict[str, dict[str, str]]):
        super().__init__(examples)
        self.permutations = permutations
        self.states = sorted(next(iter(permutations.values())))
        for number, example in enumerate(examples):
            try:
                is_consistent = example == example | self.question_of(example["question"][:1], example["question"][1:])
            except (KeyError, IndexError):
                is_consistent = False
            if not is_consistent:
                raise UserError(f"record {number} (counted from 0) does not follow from the machine's permutations")

    def names(self) -> list[list[str]]:
        return [self.states] * len(self.examples)

    def classify(self, index: int, output: str, n_thoughts: int) -> str:
        example = self.examples[index]
        if extract_answer(output) != example["answer"]:
            return self.classes[2]
        left = "".join(example["steps"][n_thoughts:])
        return self.classes[0] if "".join(extract_steps(output).split()) == left else self.classes[1]

    def follow(self, state: str, buttons: str) -> str:
        """Returns the state after the buttons."""
        for button in buttons:
            state = self.permutations[button][state]
        return state

    def question_of(self, start: str, buttons: str) -> dict:
        """Returns the example that presses these buttons in a state. Raises KeyError for an unknown state or button,
        IndexError without buttons."""
        steps = [self.follow(start, buttons[: number + 1]) for number in range(len(buttons))]
        return {"question": start + buttons, "steps": steps, "answer": steps[-1]}

    def twins(self) -> list[dict | None]:
        """Returns the same buttons, pressed in the next state of the alphabet."""
        following = dict(zip(self.states, [*self.states[1:], self.states[0]], strict=True))
        return [self.question_of(following[e["question"][0]], e["question"][1:]) for e in self.examples]

    def redrawn(self, random) -> tuple[str, list[dict]]:
        """Returns questions with the buttons in another order, and with the answers that follow from it."""
        questions = [example["question"] for example in self.examples]
        found = [self.question_of(text[0], "".join(random.permutation(list(text[1:])))) for text in questions]
        return "buttons in another order", found

    def after_transplant(self, index: int, donor: int, k: int) -> str:
        """Returns the answer if the donor's state after k steps replaces the question's: the question's buttons from
        k + 1 on lead there."""
        return self.follow(self.examples[donor]["steps"][k - 1], self.examples[index]["question"][1 + k :])


class Graphs(Task):
    """ProsQA: which of two candidates does the root reach?

    A compact step is the name of the node that its edge leads to: after k thoughts, a node k + 1 edges from the root.
    A sentence begins with the node that its edge leaves: after k thoughts, 'Every' precedes a node k edges from the
    root (paper, Section 5.2). The first sentence begins with the root, without 'Every'.
    """

    kind = "graphs"
    classes = tuple(paths.CLASSES)

    def __init__(self, examples: list[dict]):
        super().__init__(examples)
        self.graphs = []
        for number, example in enumerate(examples):
            try:
                self.graphs.append(paths.from_example(example))
            except UserError as error:
                raise UserError(f"record {number} (counted from 0): {error}") from None
        self.compact = all(graph.compact for graph in self.graphs)
        if not self.compact:
            self.step_prefix, self.fewest = "Every ", 1

    def names(self) -> list[list[str]]:
        return [example["idx_to_symbol"] for example in self.examples]

    def next_name(self, index: int, k: int) -> str | None:
        step = super().next_name(index, k)
        return step if step is None or self.compact else step.removeprefix(self.step_prefix).partition(" is a ")[0]

    def distance(self, k: int) -> int:
        """Returns how many edges the root is from the nodes that begin a step after k thoughts."""
        return k + 1 if self.compact else k

    def classify(self, index: int, output: str, n_thoughts: int) -> str:
        answer = extract_answer(output) if "#" in output else ""  # without '#' all of the text is reasoning
        return paths.classify(self.graphs[index], extract_steps(output), answer, n_thoughts)

    def others(self) -> list[str | None]:
        return [self.with_answer(example, "neg_target") for example in self.examples]

    def with_answer(self, example: dict, which: str) -> str:
        """Returns the answer that names a candidate: `target` or `neg_target`."""
        name = example["idx_to_symbol"][example[which]]
        return name if self.compact else f"{example['idx_to_symbol'][example['root']]} is a {name}."

    def twins(self) -> list[dict | None]:
        """Returns questions about a source that reaches the other candidate and not the target."""
        found: list[dict | None] = []
        for example, graph in zip(self.examples, self.graphs, strict=True):
            reached = {name: paths.distances(graph, name) for name in sorted(graph.sources)}
            roots = [name for name, ends in reached.items() if graph.other in ends and graph.target not in ends]
            if not roots:
                found.append(None)
                continue
            asks = "" if self.compact else "Is "
            head, _, tail = example["question"].rpartition(asks + graph.root)
            twin = {**example, "question": head + asks + roots[0] + tail, "root": graph.names.index(roots[0])}
            twin |= {"target": example["neg_target"], "neg_target": example["target"]}
            found.append({**twin, "answer": self.with_answer(twin, "target"), "steps": example["steps"]})
        return found

    def redrawn(self, random) -> tuple[str, list[dict]]:
        """Returns questions with the edges in another order, which has no effect on the answers."""
        found = []
        for example in self.examples:
            if self.compact:
                facts, _, rest = example["question"].partition("?")
                question = " ".join(random.permutation(facts.split(" "))) + "?" + rest
            else:
                *facts, last = example["question"].split(". ")
                question = ". ".join([*random.permutation(facts), last])
            found.append({**example, "question": question})
        return "edges in another order", found


def load_task(path: Path, count: int | None = None, steps: int | None = None) -> Task:
    """Loads the first `count` examples of a data file; with `steps`, the first `count` that have that many steps.

    Raises UserError for data of neither kind, inconsistent examples, and fewer than two examples.
    """
    examples = load_examples(path, count if steps is None else None)
    machine = path.with_name(path.name.rpartition("_")[0] + "_machine.json")
    if all("neg_target" in example for example in examples):
        kind = Graphs
    elif machine.is_file():
        kind = partial(Machine, permutations=read_json(machine)["permutations"])
    else:
        raise UserError(
            f"{path} cannot be analysed: its examples have no ProsQA fields, and there is no {machine.name} beside it, "
            "which state tracking needs"
        )
    try:
        task = kind(examples)  # before the selection: messages name a record by its index in the file
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if steps is not None:
        task = kind([example for example in examples if len(example["steps"]) == steps][:count])
    if len(task.examples) < 2:
        raise UserError(f"{path} has too few such questions ({len(task.examples)}): the analysis compares questions")
    return task
