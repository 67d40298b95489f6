"""Generates state tracking: each button of a machine permutes its states; where does a word of buttons lead?

    {"question": "Msnqw", "steps": ["N", "S", "L", "F"], "answer": "F"}

Start in state M and press s, n, q, w. The steps are the states after each button; the answer is the last state. The
composition of random permutations has no shorter form, unlike + - * modulo a small number, so the steps must be taken
one after the other. Chance is 1 in STATES.

    python preprocessing/machine.py                       # data/machine_{train,valid,test}.json, 60,000/500/1,000
    python preprocessing/machine.py --states 10 --buttons 10 --train 5000 --prefix small

PREFIX_machine.json holds the permutations: {"states", "buttons", "permutations": {button: {state: next state}}}. They
depend only on --seed, --states, --buttons and --fan-out: another call can ask longer words of the same machine.

With --fan-out F a button has F permutations that differ at every state, so it leads to F states, and "next state" above
is their F letters. The question ends with two candidates, exactly one of which is reachable; --candidates asks the same
with --fan-out 1. The answer is drawn uniformly from the reachable states, the other candidate from the rest.

    {"question": "HgdaJO", "steps": ["D", "K", "L"], "answer": "O"}

--steps chooses what is written for the same questions: `path` (the default) takes one of the F states of each button at
random, whatever the answer is; `answer` is a path that leads to the answer; `frontier` lists the reachable states after
each button and ends each list with "/".

Traps. No word is in two splits, whatever its start state: the words of each length are divided between the splits
(data/README.md). If a length has fewer than 10 words, its questions are divided instead, and the script prints that.
Lengths are uniform until the short ones run out of questions. --test-max-steps adds longer words to the test split.
"""

import random
import string
import sys
from typing import NamedTuple

from files import UserError, command, print_result, refuse
from splits import MAX_STEPS, Splits, draw, parse_splits, publish_splits, splits_parser

STATES, BUTTONS = string.ascii_uppercase, string.ascii_lowercase
MIN_WORDS = 10  # a length with fewer words has its questions divided, not its words
MAX_FAN_OUT = 4  # rejection sampling of permutations that differ everywhere accepts one in e^3 for the fourth
STEPS = ("path", "answer", "frontier")

Permutations = dict[str, dict[str, str]]  # button -> state -> the states that the button leads to


class Share(NamedTuple):
    """How the questions of one length are divided between the splits: by words, or by questions if words are few.

    The unit of division is a word or a question. Question number = word number * number of states + start state number.
    """

    length: int
    questions: int
    starts: int  # questions in a unit: the number of states, or 1
    held: dict[str, list[int]]  # split other than train -> numbers of its units
    taken: frozenset[int]  # the units of all these splits; train has the rest

    def capacity(self, split: str) -> int:
        """Returns the number of questions that a split has."""
        if split in self.held:
            return len(self.held[split]) * self.starts
        return self.questions - len(self.taken) * self.starts

    def draw(self, rng: random.Random, split: str) -> int | None:
        """Draws the number of a question. Returns None if the draw is another split's, or the split has no question."""
        if split in self.held:
            units = self.held[split]
            return rng.choice(units) * self.starts + rng.randrange(self.starts) if units else None
        number = rng.randrange(self.questions)
        return None if number // self.starts in self.taken else number


def make_machine(rng: random.Random, states: str, buttons: str, fan_out: int = 1) -> Permutations:
    """Draws fan_out permutations for each button, no two of which agree at any state."""
    machine = {}
    for button in buttons:
        permutations: list[list[str]] = []
        while len(permutations) < fan_out:
            drawn = rng.sample(states, len(states))
            if all(a != b for earlier in permutations for a, b in zip(drawn, earlier, strict=True)):
                permutations.append(drawn)
        machine[button] = dict(zip(states, map("".join, zip(*permutations, strict=True)), strict=True))
    return machine


def make_example(permutations: Permutations, start: str, word: str) -> dict:
    """Returns the question, the states that the word leads through, and the last of them."""
    steps, state = [], start
    for button in word:
        state = permutations[button][state]
        steps.append(state)
    return {"question": start + word, "steps": steps, "answer": state}


def frontiers_of(permutations: Permutations, start: str, word: str) -> list[str]:
    """Returns the reachable states after each button of a word, in alphabetical order."""
    found, frontier = [], start
    for button in word:
        frontier = "".join(sorted({*"".join(permutations[button][state] for state in frontier)}))
        found.append(frontier)
    return found


def make_choice(
    rng: random.Random, permutations: Permutations, start: str, word: str, steps: str = "path"
) -> dict | None:
    """Draws a question with two candidates for the state after a word, or returns None if all states are reachable.

    The random draws do not depend on `steps`, so that each kind of steps has the same questions.
    """
    frontiers = frontiers_of(permutations, start, word)
    others = [state for state in permutations[word[0]] if state not in frontiers[-1]]
    if not others:
        return None
    answer = rng.choice(frontiers[-1])
    candidates = rng.sample([answer, rng.choice(others)], 2)
    path, state = [], start
    for button in word:
        state = rng.choice(permutations[button][state])
        path.append(state)
    to_answer = [answer]  # backwards: draw among the reachable states from which the button leads to the next one
    for button, before in zip(word[:0:-1], frontiers[-2::-1], strict=True):
        to_answer.append(rng.choice([state for state in before if to_answer[-1] in permutations[button][state]]))
    written = {"path": path, "answer": to_answer[::-1], "frontier": [frontier + "/" for frontier in frontiers]}
    return {"question": start + word + "".join(candidates), "steps": written[steps], "answer": answer}


def divide(rng: random.Random, n_states: int, n_buttons: int, length: int, sizes: dict[str, int]) -> Share:
    """Divides the questions of one length. A held-out split gets units in proportion to its size, at least one and at
    most one per example."""
    words = n_buttons**length
    starts = n_states if words >= MIN_WORDS else 1
    units = words * n_states // starts
    total = sum(sizes.values())
    taken: set[int] = set()
    held: dict[str, list[int]] = {}
    for name in [name for name in sizes if name != "train"]:
        held[name] = []
        count = min(sizes[name], max(units * sizes[name] // total, 1)) if units >= MIN_WORDS else 0
        while len(held[name]) < count:  # random.sample fails for the 26**14 words of 14 buttons
            unit = rng.randrange(units)
            if unit not in taken:
                taken.add(unit)
                held[name].append(unit)
    return Share(length, words * n_states, starts, held, frozenset(taken))


def check_settings(
    n_states: int, n_buttons: int, min_steps: int, max_steps: int, test_max_steps: int | None, fan_out: int
) -> None:
    """Raises UserError if there is no such machine, or no such words."""
    if not 2 <= n_states <= len(STATES) or not 1 <= n_buttons <= len(BUTTONS):
        raise UserError(
            f"{n_states} states and {n_buttons} buttons cannot be named: the names of 2 to {len(STATES)} states are "
            f"upper-case letters, those of 1 to {len(BUTTONS)} buttons lower-case letters"
        )
    if test_max_steps is not None and not max_steps <= test_max_steps <= MAX_STEPS:
        raise UserError(f"test-max-steps {test_max_steps} must be at least max-steps {max_steps}, at most {MAX_STEPS}")
    if not 1 <= min_steps <= max_steps <= MAX_STEPS:
        raise UserError(
            f"words of {min_steps} to {max_steps} buttons cannot be made: 1 <= min-steps <= max-steps <= {MAX_STEPS}"
        )
    most = min(MAX_FAN_OUT, n_states - 1)
    if not 1 <= fan_out <= most:
        raise UserError(f"a button of {n_states} states leads to 1 to {most} states, not to {fan_out}")


def make_splits(
    sizes: dict[str, int],
    n_states: int = 26,
    n_buttons: int = 26,
    min_steps: int = 3,
    max_steps: int = 5,
    seed: int = 0,
    fan_out: int = 1,
    candidates: bool = False,
    steps: str = "path",
    test_max_steps: int | None = None,
) -> tuple[Splits, Permutations, list[Share]]:
    """Returns the splits, the machine, and how the questions of each length are divided.

    A fan_out above 1 implies candidates. The test split has words of up to test_max_steps buttons (default: max_steps).
    Raises UserError if no such machine exists or a split has too few questions.
    """
    check_settings(n_states, n_buttons, min_steps, max_steps, test_max_steps, fan_out)
    rng = random.Random(seed)
    permutations = make_machine(rng, STATES[:n_states], BUTTONS[:n_buttons], fan_out)
    with_candidates = candidates or fan_out > 1
    total = sum(sizes.values())
    # where a word has many questions, valid and test hold out one word in twenty each
    weights = {name: (18 if name == "train" else 1) * total for name in sizes} if with_candidates else sizes
    longest = test_max_steps or max_steps
    shares = [divide(rng, n_states, n_buttons, length, weights) for length in range(min_steps, longest + 1)]
    shares_of = {name: shares if name == "test" else shares[: max_steps - min_steps + 1] for name in sizes}
    for name, size in sizes.items() if not with_candidates else ():
        capacity = sum(share.capacity(name) for share in shares_of[name])
        if size > capacity:
            raise UserError(
                f"{name}: {size} examples are more than its {capacity} of the "
                f"{sum(share.questions for share in shares)} questions that {n_states} states, {n_buttons} buttons and "
                f"{min_steps} to {longest} steps allow: ask for fewer, or for more steps"
            )

    def make(split: str) -> dict | None:
        share = rng.choice(shares_of[split])
        number = share.draw(rng, split)
        if number is None:
            return None
        word, start = divmod(number, n_states)
        buttons = (BUTTONS[word // n_buttons**index % n_buttons] for index in range(share.length))
        if with_candidates:
            return make_choice(rng, permutations, STATES[start], "".join(buttons), steps)
        return make_example(permutations, STATES[start], "".join(buttons))

    return draw(sizes, make), permutations, shares


@command
def main(arguments: list[str] | None = None) -> None:
    parser = splits_parser(__doc__, train=60000, valid=500, test=1000, prefix="machine")
    add = parser.add_argument
    add("--states", type=int, default=26, help="number of states, 2 to 26 (default: %(default)s)")
    add("--buttons", type=int, default=26, help="number of buttons, 1 to 26 (default: %(default)s)")
    add("--min-steps", type=int, default=3, help="fewest buttons in a word (default: %(default)s)")
    add("--max-steps", type=int, default=5, help="most buttons in a word (default: %(default)s)")
    add("--test-max-steps", type=int, help="test split: most buttons in a word (default: --max-steps)")
    add("--fan-out", type=int, default=1, help="number of states that a button leads to, 1 to 4 (default: %(default)s)")
    add("--candidates", action="store_true", help="ask which of two states is reachable, as --fan-out 2 always does")
    add(
        "--steps",
        choices=STEPS,
        default="path",
        help="what to write for questions with candidates (default: %(default)s)",
    )
    o, sizes = parse_splits(parser, arguments)
    problem = f"--steps {o.steps} needs --fan-out 2 or more, or --candidates"
    refuse(parser, {problem: o.steps != "path" and o.fan_out == 1 and not o.candidates})
    splits, permutations, shares = make_splits(
        sizes, o.states, o.buttons, o.min_steps, o.max_steps, o.seed, o.fan_out, o.candidates, o.steps, o.test_max_steps
    )
    machine = {"states": list(STATES[: o.states]), "buttons": list(permutations), "permutations": permutations}
    publish_splits(splits, o.out, o.prefix, {o.out / f"{o.prefix}_machine.json": machine})
    for share in shares:
        if share.starts == 1:
            text = "too few words to hold any out; splits share words there, but no question"
            print_result(f"steps {share.length}: {text}")


if __name__ == "__main__":
    sys.exit(main())
