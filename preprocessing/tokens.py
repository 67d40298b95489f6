"""Tokenizes data files once, into flat arrays on disk that all ranks map into memory.

Legend: Q question, S_i written step i, A answer.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np

from curriculum import END, LATENT, START
from methods import Texts
from preprocessing.examples import load_examples, read_bytes
from trainer.files import retried, sync_to_disk, writing
from utils import UserError, progress_bar

ANSWER_PREFIX = "### "
CACHE_VERSION = 2  # increase it when `tokenize` changes


class Tokens:
    """The token ids of a data file. `tokens[i]` is (Q, [S_1..S_n], A) of example i, as lists of int.

    They are three flat, memory-mapped arrays. `ids` (int32) is the concatenation of all texts. Text j is
    ids[texts[j]:texts[j + 1]]. The texts of example i are examples[i] to examples[i + 1] - 1: question, steps, answer.
    """

    NAMES = ("ids", "texts", "examples")

    def __init__(self, ids: np.ndarray, texts: np.ndarray, examples: np.ndarray):
        self.ids, self.texts, self.examples = ids, texts, examples
        self.chosen: np.ndarray | None = None  # indices of the examples that are kept, if some are left out
        self.auxiliary: Tokens | None = None  # with the texts of Method.texts in place of the steps
        self.answer_prefix: list[int] = []  # tokens of "### ", for methods with auxiliary texts

    def __len__(self) -> int:
        return len(self.examples) - 1 if self.chosen is None else len(self.chosen)

    def leave_out_longer_than(self, length: int) -> None:
        """Leaves out examples whose question, steps, answer and EOS together have more tokens than `length`."""
        self.chosen = np.flatnonzero(self.written_lengths() <= length)

    def written_lengths(self) -> np.ndarray:
        """Returns each example's number of tokens: question, steps, answer and EOS, (examples,) int64."""
        lengths = np.diff(self.texts[self.examples]) + 1
        return lengths if self.chosen is None else lengths[self.chosen]

    def record(self, index: int) -> int:
        """Returns the number of an example's record in the file, counted from 0."""
        return index if self.chosen is None else int(self.chosen[index])

    def __getitem__(self, index: int) -> tuple[list[int], list[list[int]], list[int]]:
        index = self.record(index)
        bounds = self.texts[self.examples[index] : self.examples[index + 1] + 1].tolist()
        ids = self.ids[bounds[0] : bounds[-1]].tolist()
        question, *steps, answer = (ids[begin - bounds[0] : end - bounds[0]] for begin, end in pairwise(bounds))
        return question, steps, answer

    def digest(self) -> str:
        """Returns the SHA-256 of the three arrays in hexadecimal. It depends on the ids only, not on how a release of
        tokenizers writes a tokenizer to disk."""
        found = hashlib.sha256()
        for name in self.NAMES:
            found.update(np.ascontiguousarray(getattr(self, name)))
        return found.hexdigest()

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """Maps the arrays that `save` has written, possibly on another node, into memory. Raises UserError."""
        try:
            tokens = cls(*(retried(lambda name=name: np.load(folder / f"{name}.npy", "r")) for name in cls.NAMES))
            if tokens.examples[-1] != len(tokens.texts) - 1 or tokens.texts[-1] != len(tokens.ids):
                raise ValueError("it is incomplete")
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise UserError(f"{folder} cannot be read: {error}; remove it, and the next run makes it again") from None
        return tokens

    def save(self, folder: Path) -> None:
        for name in self.NAMES:
            with (folder / f"{name}.npy").open("wb") as file:
                # numpy writes to a file itself through C's stdio and ignores that its last bytes do not fit on a disk
                np.save(SimpleNamespace(write=file.write), getattr(self, name))


def tokenize(
    examples: Iterable[dict],
    tokenizer,
    show_progress: bool = False,
    step_separator: str = "\n",
    source: str = "the data",
    markers: Mapping[int, str] = MappingProxyType({}),
) -> Tokens:
    """Tokenizes Q by `question_ids`, and S = step + step_separator and A = "### " + answer without special tokens.
    `training_sequence` adds EOS after A.

    Raises UserError that names source, record and field if a text contains one of the markers (id -> text), which the
    model could not tell from its own, or if a question has no tokens."""
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
        if problem := _problem(n_texts, text_lengths[-1], ids[-1], markers):
            index, complaint = problem
            raise UserError(f"{source}: record {len(texts_per_example) + index} (counted from 0) {complaint}")
        texts_per_example += n_texts
    return Tokens(
        np.concatenate(ids),
        np.concatenate([[0], np.cumsum(np.concatenate(text_lengths))]),
        np.concatenate([[0], np.cumsum(texts_per_example)]),
    )


def _problem(
    n_texts: list[int], lengths: np.ndarray, ids: np.ndarray, markers: Mapping[int, str]
) -> tuple[int, str] | None:
    """Returns (index of an invalid example, complaint), or None.

    Args:
        n_texts: number of texts of each example.
        lengths: number of tokens of each text.
        ids: tokens of all texts, concatenated.
    """
    first_texts = np.cumsum([0, *n_texts])  # index of each example's first text
    if len(found := np.flatnonzero(np.isin(ids, list(markers)))):
        text = int(np.searchsorted(np.cumsum(lengths), found[0], side="right"))
        index = int(np.searchsorted(first_texts, text, side="right")) - 1
        field = {0: "question", n_texts[index] - 1: "answer"}.get(text - int(first_texts[index]), "steps")
        return index, f"has the text {markers[int(ids[found[0]])]!r} in its {field!r}, which marks the latent positions"
    if len(empty := np.flatnonzero(lengths[first_texts[:-1]] == 0)):
        return int(empty[0]), "has a 'question' for which the tokenizer returns no tokens"
    return None


def question_ids(tokenizer, questions: list[str]) -> list[list[int]]:
    """Tokenizes Q = question + newline. Keeps the special tokens that the tokenizer puts before a text. Removes those
    after it, because reasoning and answer follow: some tokenizers end every text with EOS."""
    encoded = tokenizer([question + "\n" for question in questions], return_special_tokens_mask=True)
    for ids, is_special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        is_special = [*is_special, *[1] * (len(ids) - len(is_special))]  # Python tokenizers may leave out what they add
        while is_special and is_special.pop():
            ids.pop()
    return encoded["input_ids"]


def markers_of(tokenizer) -> dict[int, str]:
    """Returns id -> text of the markers that are in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[marker]: marker for marker in (START, END, LATENT) if marker in vocabulary}


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Yields consecutive lists of at most `size` items."""
    rest = iter(items)
    while part := list(islice(rest, min(size, sys.maxsize))):
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
    """Tokenizes the data file `path` into a subfolder of `folder`, unless it exists already, and returns the subfolder.

    Its name is a digest of the file's bytes, the tokenizer, the limit, the separator and the auxiliary texts, which
    replace the steps. It appears only when complete.
    """
    digest = hashlib.sha256(read_bytes(path))
    identity = [type(tokenizer).__name__, _tokenizer_state(tokenizer), limit, CACHE_VERSION]
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


def _tokenizer_state(tokenizer) -> str:
    """Returns the tokenizer's state as text, without truncation and padding: they are left over from its last call or
    from before it was saved, and `tokenize` uses neither."""
    if not tokenizer.is_fast:
        return json.dumps(tokenizer.get_vocab())
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(state, ensure_ascii=False, separators=(",", ":"))


def _write_cache(tokens: Tokens, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".writing-", dir=target.parent
    ) as own:  # other jobs may write the same cache
        aside = Path(own, "tokens")
        aside.mkdir()
        tokens.save(aside)
        sync_to_disk(aside)
        try:
            aside.rename(target)
        except OSError:
            if not target.exists():  # if it exists, another job was faster
                raise
