"""The tokens of data files: made once, kept in flat arrays that all ranks map into memory.

Legend: Q question, S_i written step i, A answer.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np

from curriculum import END, LATENT, START
from methods import Texts
from preprocessing.examples import load_examples
from trainer.files import retried, sync_to_disk, writing
from utils import UserError, progress_bar

ANSWER_PREFIX = "### "
CACHE_VERSION = 2  # raise it when `tokenize` changes


class Tokens:
    """The token ids of a data file: `tokens[i]` is (Q, [S_1..S_n], A) of example i, as lists of int.

    Three flat arrays, memory-mapped: `ids` (int32) holds all texts end to end; text j is ids[texts[j]:texts[j + 1]];
    example i owns the texts examples[i] to examples[i + 1] - 1: its question, its steps, its answer.
    """

    NAMES = ("ids", "texts", "examples")

    def __init__(self, ids: np.ndarray, texts: np.ndarray, examples: np.ndarray):
        self.ids, self.texts, self.examples = ids, texts, examples
        self.chosen: np.ndarray | None = None  # where examples are left out, the numbers of the others
        self.auxiliary: Tokens | None = None  # of Method.texts: with other texts in place of the steps
        self.answer_prefix: list[int] = []  # what stands before the answer itself, where a method asks for it

    def __len__(self) -> int:
        return len(self.examples) - 1 if self.chosen is None else len(self.chosen)

    def leave_out_longer_than(self, length: int) -> None:
        """Leaves out the examples with more tokens than that: question, all steps, answer and EOS."""
        lengths = np.diff(self.texts[self.examples]) + 1
        self.chosen = np.flatnonzero(lengths <= length)

    def __getitem__(self, index: int) -> tuple[list[int], list[list[int]], list[int]]:
        if self.chosen is not None:
            index = self.chosen[index]
        bounds = self.texts[self.examples[index] : self.examples[index + 1] + 1].tolist()
        ids = self.ids[bounds[0] : bounds[-1]].tolist()
        question, *steps, answer = (ids[begin - bounds[0] : end - bounds[0]] for begin, end in pairwise(bounds))
        return question, steps, answer

    def digest(self) -> str:
        """SHA-256 of all ids and of where texts and examples begin, in hexadecimal: the same for any tokenizer that
        makes the same ids, however another release of it is written to disk."""
        found = hashlib.sha256()
        for name in self.NAMES:
            found.update(np.ascontiguousarray(getattr(self, name)))
        return found.hexdigest()

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """Maps what `save` has written, on this node or on another. Raises UserError."""
        try:
            tokens = cls(*(retried(lambda name=name: np.load(folder / f"{name}.npy", "r")) for name in cls.NAMES))
            if tokens.examples[-1] != len(tokens.texts) - 1 or tokens.texts[-1] != len(tokens.ids):
                raise ValueError("it is not whole")
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise UserError(f"{folder} cannot be read: {error}; remove it, and it is made again") from None
        return tokens

    def save(self, folder: Path) -> None:
        for name in self.NAMES:
            np.save(folder / f"{name}.npy", getattr(self, name))


def tokenize(
    examples: Iterable[dict],
    tokenizer,
    show_progress: bool = False,
    step_separator: str = "\n",
    source: str = "the data",
    markers: Mapping[int, str] = MappingProxyType({}),
) -> Tokens:
    """Q as `question_ids` makes it; S = step + step_separator and A = "### " + answer without special tokens. A's EOS
    is added by `training_sequence`.

    Raises UserError, that names source, record and field, where a text holds one of the markers (id -> text), which the
    model would take for one, and where nothing is left of a question."""
    ids: list[np.ndarray] = []
    text_lengths: list[np.ndarray] = []
    texts_per_example: list[int] = []
    bar = progress_bar(examples, "tokenizing", "examples", show_progress)
    for part in batched(bar, 1000):
        questions = question_ids(tokenizer, [e["question"] for e in part])
        others = [
            text
            for e in part
            for text in (*(step + step_separator for step in e["steps"]), ANSWER_PREFIX + e["answer"])
        ]
        rest = iter(tokenizer(others, add_special_tokens=False)["input_ids"] if others else [])
        n_texts = [len(example["steps"]) + 2 for example in part]
        texts = [
            text for question, n in zip(questions, n_texts, strict=True) for text in (question, *islice(rest, n - 1))
        ]
        text_lengths.append(np.array([len(text) for text in texts], dtype=np.int64))
        ids.append(np.fromiter(chain.from_iterable(texts), dtype=np.int32, count=text_lengths[-1].sum()))
        if problem := _problem(len(texts_per_example), n_texts, text_lengths[-1], ids[-1], markers):
            raise UserError(f"{source}: {problem}")
        texts_per_example += n_texts
    return Tokens(
        np.concatenate(ids),
        np.concatenate([[0], np.cumsum(np.concatenate(text_lengths))]),
        np.concatenate([[0], np.cumsum(texts_per_example)]),
    )


def _problem(
    first: int, n_texts: list[int], lengths: np.ndarray, ids: np.ndarray, markers: Mapping[int, str]
) -> str | None:
    """What is wrong with the tokens of some examples, of which the first has the number `first`: of each how many texts
    it has, of each text its length, and the ids of all."""
    begins = np.cumsum([0, *n_texts])  # of each example, its first text
    if len(places := np.flatnonzero(np.isin(ids, list(markers)))):
        text = int(np.searchsorted(np.cumsum(lengths), places[0], side="right"))
        number = int(np.searchsorted(begins, text, side="right")) - 1
        field = {0: "question", n_texts[number] - 1: "answer"}.get(text - int(begins[number]), "steps")
        what = f"has the text {markers[int(ids[places[0]])]!r} in its {field!r}, which marks the latent positions"
    elif len(empty := np.flatnonzero(lengths[begins[:-1]] == 0)):
        number, what = int(empty[0]), "has a 'question' of which the tokenizer leaves nothing"
    else:
        return None
    return f"record {first + number} (counted from 0) {what}"


def question_ids(tokenizer, questions: list[str]) -> list[list[int]]:
    """Q = question + newline, with the special tokens that the tokenizer itself puts before a text, without those that
    it puts after one: reasoning and answer follow, and some tokenizers end every text with EOS."""
    found = tokenizer([question + "\n" for question in questions], return_special_tokens_mask=True)
    for ids, is_special in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
        while is_special and is_special.pop():
            ids.pop()
    return found["input_ids"]


def markers_of(tokenizer) -> dict[int, str]:
    """The markers that a tokenizer has, id -> text."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[marker]: marker for marker in (START, END, LATENT) if marker in vocabulary}


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of at most `size` items."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def cache_tokens(
    path: str,
    tokenizer,
    folder: Path,
    limit: int | None = None,
    show_progress: bool = True,
    step_separator: str = "\n",
    auxiliary: Texts | None = None,
) -> Path:
    """Tokenizes the data file `path` into a folder under `folder`, unless it is there already; returns that folder.

    Its name is a digest of the file's bytes, the tokenizer, the limit and the separator. It appears whole or not at
    all. With `auxiliary` there are other texts in place of the steps.
    """
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    identity = [type(tokenizer).__name__, _what_decides_ids(tokenizer), limit, CACHE_VERSION]
    if step_separator != "\n":
        identity.append(step_separator)
    if auxiliary is not None:
        identity.append(auxiliary.name)
    digest.update(json.dumps(identity).encode())
    target = folder / digest.hexdigest()[:32]
    if not target.exists():
        examples = load_examples(path, limit)
        if auxiliary is not None:
            examples = ({**example, "steps": auxiliary.steps(example["steps"])} for example in examples)
        tokens = tokenize(examples, tokenizer, show_progress, step_separator, path, markers_of(tokenizer))
        with writing(target):
            _write_cache(tokens, target)
    return target


def _what_decides_ids(tokenizer) -> str:
    """What a tokenizer makes ids of. Truncation and padding are not part of it: they are of the last call, or of
    whoever saved the tokenizer, and `tokenize` uses neither."""
    if not tokenizer.is_fast:
        return json.dumps(tokenizer.get_vocab())
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(state, ensure_ascii=False, separators=(",", ":"))


def _write_cache(tokens: Tokens, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as own:  # other jobs may write the same
        aside = Path(own, "tokens")
        aside.mkdir()
        tokens.save(aside)
        sync_to_disk(aside)
        try:
            aside.rename(target)
        except OSError:
            if not target.exists():  # otherwise another job was faster
                raise
