"""Questions with what is known of them beside the answer: states, graphs, what would follow from another thought.

Two kinds of data can be analysed: state tracking (preprocessing/machine.py, with PREFIX_machine.json beside the file),
and graphs with ProsQA's fields (the paper's and the mirrored ones, in sentences or compact).
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
    classes: tuple[str, ...]  # what an output can be, in the order in which they are stacked
    step_prefix: str = ""  # the text that is forced before a name, the first of a next step
    fewest: int = 0  # thoughts after which steps begin so

    def __init__(self, examples: list[dict]):
        self.examples = examples

    def names(self) -> list[list[str]]:
        """For each question all names that a step can begin with after step_prefix."""

    def next_name(self, index: int, k: int) -> str | None:
        """The name with which the (k + 1)-th step of a question begins; None where it has none, or fewer steps."""
        steps = self.examples[index]["steps"]
        return steps[k] if self.fewest <= k < len(steps) else None

    def classify(self, index: int, output: str, n_thoughts: int) -> str:
        """Which of `classes` an output is."""

    def others(self) -> list[str | None]:
        """For each question the wrong candidate, which only reasoning excludes; None where there is none."""
        return [None] * len(self.examples)

    def twins(self) -> list[dict | None]:
        """For each question one that differs in where it begins, and so in its answer, where there is one."""

    def redrawn(self, random) -> tuple[str, list[dict]]:
        """(what was done, questions): the same with their parts in another order."""


class Machine(Task):
    """State tracking: from a start state each button leads to a state."""

    kind = "machine"
    classes = ("right steps and answer", "right answer only", "wrong answer")

    def __init__(self, examples: list[dict], permutations: dict[str, dict[str, str]]):
        super().__init__(examples)
        self.permutations = permutations
        self.states = sorted(next(iter(permutations.values())))
        for number, example in enumerate(examples):
            try:
                is_of_machine = example == example | self.question_of(example["question"][:1], example["question"][1:])
            except (KeyError, IndexError):
                is_of_machine = False
            if not is_of_machine:
                raise UserError(f"record {number} (counted from 0) is no question of its machine")

    def names(self) -> list[list[str]]:
        return [self.states] * len(self.examples)

    def classify(self, index: int, output: str, n_thoughts: int) -> str:
        example = self.examples[index]
        if extract_answer(output) != example["answer"]:
            return self.classes[2]
        left = "".join(example["steps"][n_thoughts:])
        return self.classes[0] if "".join(extract_steps(output).split()) == left else self.classes[1]

    def follow(self, state: str, buttons: str) -> str:
        """Where a word of buttons leads."""
        for button in buttons:
            state = self.permutations[button][state]
        return state

    def question_of(self, start: str, buttons: str) -> dict:
        """The question of where a word of buttons leads from a state, with its steps and answer. Raises KeyError."""
        steps = [self.follow(start, buttons[: number + 1]) for number in range(len(buttons))]
        return {"question": start + buttons, "steps": steps, "answer": steps[-1]}

    def twins(self) -> list[dict | None]:
        """The same words, pressed in the state that comes next in the alphabet."""
        following = dict(zip(self.states, [*self.states[1:], self.states[0]], strict=True))
        return [self.question_of(following[e["question"][0]], e["question"][1:]) for e in self.examples]

    def redrawn(self, random) -> tuple[str, list[dict]]:
        """Another order of buttons is another question; its own answer is what should come out."""
        questions = [example["question"] for example in self.examples]
        found = [self.question_of(word[0], "".join(random.permutation(list(word[1:])))) for word in questions]
        return "buttons in another order", found

    def after_transplant(self, index: int, donor: int, k: int) -> str:
        """Where this question's buttons after the k-th lead from the donor's state after k."""
        return self.follow(self.examples[donor]["steps"][k - 1], self.examples[index]["question"][1 + k :])


class Graphs(Task):
    """ProsQA: which of two candidates can be reached from the root?

    A compact step is the name that it leads to. A sentence begins with the name that it comes from, one edge nearer to
    the root: after k thoughts 'Every' is followed by a node at distance k (paper, Section 5.2). The first step begins
    with the root, without 'Every'.
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
        """Edges from the root to the nodes that steps begin with after k thoughts."""
        return k + 1 if self.compact else k

    def classify(self, index: int, output: str, n_thoughts: int) -> str:
        answer = extract_answer(output) if "#" in output else ""  # without it the text is all reasoning
        return paths.classify(self.graphs[index], extract_steps(output), answer, n_thoughts)

    def others(self) -> list[str | None]:
        return [self.with_answer(example, "neg_target") for example in self.examples]

    def with_answer(self, example: dict, which: str) -> str:
        """The answer that names the target or the other candidate."""
        name = example["idx_to_symbol"][example[which]]
        return name if self.compact else f"{example['idx_to_symbol'][example['root']]} is a {name}."

    def twins(self) -> list[dict | None]:
        """Asked about the root of the other candidate, where it has one that does not lead to the right one as well."""
        found: list[dict | None] = []
        for example, graph in zip(self.examples, self.graphs, strict=True):
            leads_to = {name: paths.distances(graph, name) for name in sorted(graph.sources)}
            roots = [name for name, ends in leads_to.items() if graph.other in ends and graph.target not in ends]
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
        """The order of the edges carries no information: the answers stay."""
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
    """The first questions of a data file, with `steps` the first that have so many, and what is known about them.

    Raises UserError where they are of no known kind, or too few.
    """
    examples = load_examples(path, count if steps is None else None)
    machine = path.with_name(path.name.rpartition("_")[0] + "_machine.json")
    if all("neg_target" in example for example in examples):
        kind = Graphs
    elif machine.is_file():
        kind = partial(Machine, permutations=read_json(machine)["permutations"])
    else:
        raise UserError(
            f"{path} is of no kind that can be analysed: neither graphs with ProsQA's fields, nor state tracking with "
            f"{machine.name} beside it"
        )
    try:
        task = kind(examples)  # of all: messages name a record by its index in the file
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if steps is not None:
        task = kind([example for example in examples if len(example["steps"]) == steps][:count])
    if len(task.examples) < 2:
        raise UserError(
            f"{path} holds too few such questions ({len(task.examples)}): thoughts are compared across questions"
        )
    return task
