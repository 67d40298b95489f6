"""Writes a machine to be followed: each button permutes the states; where does a word of buttons lead?

    {"question": "Msnqw", "steps": ["N", "S", "L", "F"], "answer": "F"}

Start in state M and press s, n, q, w: `steps` are the states passed, one for each button, and `answer` is the last.
Permutations drawn at random compose to nothing simpler than what they are, unlike + - * modulo a small number: the
steps must be gone one after the other. Chance is 1 in STATES.

    python preprocessing/machine.py                       # data/machine_{train,valid,test}.json, 60,000/500/1,000
    python preprocessing/machine.py --states 10 --buttons 10 --train 5000 --prefix small

PREFIX_machine.json holds the permutations: {"states", "buttons", "permutations": {button: {state: next state}}}. They
follow from --seed, --states, --buttons and --fan-out alone: another call can ask the same machine for longer words.

With --fan-out F a button is F permutations that differ everywhere, and may lead to F states ("next state" above is then
their F letters). The question ends with two candidates, of which exactly one can be reached; --candidates asks so with
--fan-out 1. The answer is drawn uniformly from what can be reached, the other candidate from the rest.

    {"question": "AcfaKD", "steps": ["N", "S", "K"], "answer": "D"}

`steps` are by default a path that takes one of the F states of each button at random whatever the answer is; --steps
answer is a path that leads to the answer, --steps frontier lists the states that can be reached after each button, and
ends each list with "/". These three ask the same questions.

Traps. The splits share no word, of whatever start: the words of each length are divided between them (data/README.md).
Where a length has fewer than 10 words, its questions are divided in their place, and the output says so. Lengths are
uniform until the questions of the short ones have run out. With --test-max-steps the test split alone has longer words.
"""

import random
import string
import sys
from typing import NamedTuple

from files import UserError, command, refuse
from splits import MOST_STEPS, Splits, draw, parse_splits, publish_splits, splits_parser

STATES, BUTTONS = string.ascii_uppercase, string.ascii_lowercase
FEWEST_WORDS = 10  # of a length whose words are divided
MOST_FAN_OUT = 4  # permutations that differ everywhere are found by drawing, one in e^3 for the fourth
ONE_WORD_IN = 20  # is a held-out split's, where a word has many questions
STEPS = ("path", "answer", "frontier")

Permutations = dict[str, dict[str, str]]  # button -> state -> the states that it leads to


class Share(NamedTuple):
    """How the questions of one length are divided: by units, which are words, or single questions if words are few.

    A question's number is its word's number times the number of states, plus its start's number.
    """

    length: int
    questions: int
    starts: int  # questions of a unit: the number of states, or 1
    held: dict[str, list[int]]  # every split but train -> the numbers of its units
    taken: frozenset[int]  # these of all splits; train has the rest

    def capacity(self, split: str) -> int:
        """How many questions a split has."""
        if split in self.held:
            return len(self.held[split]) * self.starts
        return self.questions - len(self.taken) * self.starts

    def draw(self, rng: random.Random, split: str) -> int | None:
        """The number of a question of the split, or None where the question drawn was another's, or there is none."""
        if split in self.held:
            units = self.held[split]
            return rng.choice(units) * self.starts + rng.randrange(self.starts) if units else None
        number = rng.randrange(self.questions)
        return None if number // self.starts in self.taken else number


def make_machine(rng: random.Random, states: str, buttons: str, fan_out: int = 1) -> Permutations:
    """For each button random permutations of the states that differ everywhere."""
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
    """The states that a word of buttons leads through."""
    steps, state = [], start
    for button in word:
        state = permutations[button][state]
        steps.append(state)
    return {"question": start + word, "steps": steps, "answer": state}


def frontiers_of(permutations: Permutations, start: str, word: str) -> list[str]:
    """What can be reached after each button of a word, in alphabetical order."""
    found, frontier = [], start
    for button in word:
        frontier = "".join(sorted({*"".join(permutations[button][state] for state in frontier)}))
        found.append(frontier)
    return found


def make_choice(
    rng: random.Random, permutations: Permutations, start: str, word: str, steps: str = "path"
) -> dict | None:
    """Which of two states can be reached at the end of a word? None where all can. What is drawn does not depend on
    `steps`, so that each kind asks the same questions."""
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
    to_answer = [answer]  # backwards: one of the states before from which the button leads there
    for button, before in zip(word[:0:-1], frontiers[-2::-1], strict=True):
        to_answer.append(rng.choice([state for state in before if to_answer[-1] in permutations[button][state]]))
    written = {"path": path, "answer": to_answer[::-1], "frontier": [frontier + "/" for frontier in frontiers]}
    return {"question": start + word + "".join(candidates), "steps": written[steps], "answer": answer}


def divide(rng: random.Random, n_states: int, n_buttons: int, length: int, sizes: dict[str, int]) -> Share:
    """The units of one length: in proportion to the sizes, one at least, and no more than a split has examples."""
    words = n_buttons**length
    starts = n_states if words >= FEWEST_WORDS else 1
    units = words * n_states // starts
    total = sum(sizes.values())
    taken: set[int] = set()
    held: dict[str, list[int]] = {}
    for name in [name for name in sizes if name != "train"]:
        held[name] = []
        count = min(sizes[name], max(units * sizes[name] // total, 1)) if units >= FEWEST_WORDS else 0
        while len(held[name]) < count:  # not random.sample, which refuses the 26**14 words of 14 buttons
            unit = rng.randrange(units)
            if unit not in taken:
                taken.add(unit)
                held[name].append(unit)
    return Share(length, words * n_states, starts, held, frozenset(taken))


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
    """Splits of the given sizes, the machine, and how the questions of each length were divided. With more than one
    state that a button leads to there are always candidates. The test split has words of up to test_max_steps buttons.

    Raises UserError where there is no such machine, or a split has not enough questions.
    """
    if not 2 <= n_states <= len(STATES) or not 1 <= n_buttons <= len(BUTTONS):
        raise UserError(
            f"{n_states} states and {n_buttons} buttons cannot be named: 2 to {len(STATES)} states are capitals, "
            f"1 to {len(BUTTONS)} buttons small letters"
        )
    if test_max_steps is not None and not max_steps <= test_max_steps <= MOST_STEPS:
        raise UserError(f"test-max-steps {test_max_steps} must be at least max-steps {max_steps}, at most {MOST_STEPS}")
    if not 1 <= min_steps <= max_steps <= MOST_STEPS:
        raise UserError(
            f"words of {min_steps} to {max_steps} buttons cannot be: 1 <= min-steps <= max-steps <= {MOST_STEPS}"
        )
    most = min(MOST_FAN_OUT, n_states - 1)
    if not 1 <= fan_out <= most:
        raise UserError(f"a button of {n_states} states leads to 1 to {most} states, not to {fan_out}")
    rng = random.Random(seed)
    permutations = make_machine(rng, STATES[:n_states], BUTTONS[:n_buttons], fan_out)
    chosen = candidates or fan_out > 1
    total = sum(sizes.values())
    weights = {name: (ONE_WORD_IN - 2 if name == "train" else 1) * total for name in sizes} if chosen else sizes
    longest = test_max_steps or max_steps
    shares = [divide(rng, n_states, n_buttons, length, weights) for length in range(min_steps, longest + 1)]
    shares_of = {name: shares if name == "test" else shares[: max_steps - min_steps + 1] for name in sizes}
    for name, size in sizes.items() if not chosen else ():
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
        buttons = (BUTTONS[word // n_buttons**place % n_buttons] for place in range(share.length))
        if chosen:
            return make_choice(rng, permutations, STATES[start], "".join(buttons), steps)
        return make_example(permutations, STATES[start], "".join(buttons))

    return draw(sizes, make), permutations, shares


@command
def main(arguments: list[str] | None = None) -> None:
    parser = splits_parser(__doc__, train=60000, valid=500, test=1000, prefix="machine")
    add = parser.add_argument
    add("--states", type=int, default=26, help="how many, 2 to 26 (default: %(default)s)")
    add("--buttons", type=int, default=26, help="how many, 1 to 26 (default: %(default)s)")
    add("--min-steps", type=int, default=3, help="fewest buttons of a word (default: %(default)s)")
    add("--max-steps", type=int, default=5, help="most buttons of a word (default: %(default)s)")
    add("--test-max-steps", type=int, help="most buttons in the test split (default: --max-steps)")
    add("--fan-out", type=int, default=1, help="states a button leads to (default: %(default)s)")
    add("--candidates", action="store_true", help="ask which of two, as --fan-out 2 always does")
    add("--steps", choices=STEPS, default="path", help="with candidates (default: %(default)s)")
    o, sizes = parse_splits(parser, arguments)
    problem = f"--steps {o.steps} needs --fan-out 2 or more, or --candidates"
    refuse(parser, {problem: o.steps != "path" and o.fan_out == 1 and not o.candidates})
    of_words, of_choice = (o.states, o.buttons, o.min_steps, o.max_steps), (o.fan_out, o.candidates, o.steps)
    splits, permutations, shares = make_splits(sizes, *of_words, o.seed, *of_choice, o.test_max_steps)
    machine = {"states": list(STATES[: o.states]), "buttons": list(permutations), "permutations": permutations}
    publish_splits(splits, o.out, o.prefix, {o.out / f"{o.prefix}_machine.json": machine})
    for share in shares:
        if share.starts == 1:
            print(f"steps {share.length}: too few words to hold any out, the splits share words there but no question")


if __name__ == "__main__":
    sys.exit(main())
