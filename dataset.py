"""From examples to batches: tokens, the sequence of a stage, padding, this rank's share.

Legend: Q question, S_i written step i, A answer, n number of written steps; B rows of a batch, T columns.

Tokens are kept once, in flat memory-mapped arrays that all ranks share. The sequence of a stage is built when it is
asked for, so that an epoch starts at once whatever the size of the data. Everything random here is a function of
(seed, epoch, example): no number of ranks, workers or restarts changes it.

All is numpy until the last moment, when `_padded` makes tensors: a plan can be made without waiting for torch.

`python dataset.py FILE --model ID --config YAML --stage S` shows what the model sees of a file at a stage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils import IGNORE, Config, UserError, progress_bar, report, sync_to_disk

if TYPE_CHECKING:
    import torch

NO_REASONING = 1 << 30  # a stage of iCoT that leaves no token of any reasoning
START, END, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"
JSON_SPACE = re.compile(r"[ \t\n\r]*")
CACHE_VERSION = 1  # raise it when `tokenize` changes


class Markers(NamedTuple):
    """Token ids. The first three are None for methods whose sequences hold no latents."""

    start: int | None
    latent: int | None
    end: int | None
    eos: int


# ---------------------------------------------------------------------------------------------------------------
# The curriculum and the sequences (paper, Section 3 and Figure 2)
# ---------------------------------------------------------------------------------------------------------------


def stage_of(config: Config, epoch: int) -> int:
    """The scheduled stage of an epoch (both from 0); at most config.last_stage, in which every written step is gone.

    For icot the stage is the number of removed tokens, which grows within an epoch (see `stage_of_step`): here what it
    has come to in the last step of the epoch.
    """
    if config.method in ("cot", "no_cot"):
        return 0
    if config.method == "icot":
        return stage_of_step(config, epoch, config.icot_tokens_per_epoch - 1, config.icot_tokens_per_epoch)
    if config.curriculum == "none":
        return config.last_stage
    if isinstance(config.epochs_per_stage, int):
        return min(epoch // config.epochs_per_stage, config.last_stage)
    ends = np.cumsum(config.epochs_per_stage)
    return min(int(np.searchsorted(ends, epoch, side="right")), len(ends) - 1)


def stage_name(stage: int) -> str:
    """A stage as people read it."""
    return "all" if stage == NO_REASONING else str(stage)


def stage_of_step(config: Config, epoch: int, step: int, steps_per_epoch: int) -> int:
    """The stage of one optimizer step (from 0 in its epoch): that of its epoch, but for icot it grows by one token
    every 1/icot_tokens_per_epoch of an epoch (arXiv 2405.14838)."""
    if config.method != "icot":
        return stage_of(config, epoch)
    steps_per_token = max(1, round(steps_per_epoch / config.icot_tokens_per_epoch))
    removed = (epoch * steps_per_epoch + step) // steps_per_token
    everything = config.icot_remove_all_after is not None and removed >= config.icot_remove_all_after
    return NO_REASONING if everything else removed


def stage_of_example(config: Config, stage: int, epoch: int, index: int, n_steps: int) -> int:
    """The stage at which training example `index` is seen: the scheduled one, or with uniform_prob one of 0..n.

    icot's removal smoothing: o more tokens, with P(o) = (1 - e^-l) e^(-l o) and l = icot_smoothing.
    """
    if config.method == "icot":
        if not config.icot_smoothing:
            return stage
        random = np.random.default_rng((config.seed, epoch, index))
        return stage + int(random.geometric(1 - np.exp(-config.icot_smoothing))) - 1
    if config.uniform_prob > 0:
        random = np.random.default_rng((config.seed, epoch, index))
        if random.random() < config.uniform_prob:
            return int(random.integers(n_steps + 1))
    return stage


def thoughts_and_dropped(n_steps: int, stage: int, config: Config) -> tuple[int, int]:
    """(latent positions, written steps left out) of an example with n_steps steps at a stage."""
    if config.method in ("cot", "icot"):  # icot leaves out tokens, not steps: see `kept_reasoning`
        return 0, 0
    if config.method == "no_cot":
        return 0, n_steps
    if stage > config.max_latent_stage:
        replaced = config.max_latent_stage if config.pad_latent_to_max else min(n_steps, config.max_latent_stage)
        dropped = n_steps
    else:
        replaced, dropped = stage, min(stage, n_steps)
    return (0 if config.method == "no_thoughts" else replaced * config.c_thought), dropped


def kept_reasoning(steps: Sequence[Sequence[int]], stage: int, config: Config) -> list[int]:
    """The tokens of the written reasoning that a stage leaves: the last steps, or for icot the last tokens."""
    _, dropped = thoughts_and_dropped(len(steps), stage, config)
    tokens = [token for step in steps[dropped:] for token in step]
    return tokens[stage:] if config.method == "icot" else tokens


def _prefix(question: Sequence[int], n_latents: int, config: Config, markers: Markers) -> list[int]:
    if config.method != "coconut":
        return list(question)
    return [*question, markers.start, *[markers.latent] * n_latents, markers.end]


def prompt(
    question: Sequence[int], steps: Sequence[Sequence[int]], stage: int, config: Config, markers: Markers
) -> list[int]:
    """The token ids that generation starts from: what `training_sequence` puts before the supervised tokens.

    With config.eval_latents_from_steps and no padding to max_latent_stage, at most n steps of thought: the
    reference's rule, which tells the model how many steps the gold solution has.
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    if config.eval_latents_from_steps and not config.pad_latent_to_max:
        n_latents = min(n_latents, len(steps) * config.c_thought)
    return _prefix(question, n_latents, config, markers)


def training_sequence(
    question: Sequence[int],
    steps: Sequence[Sequence[int]],
    answer: Sequence[int],
    stage: int,
    config: Config,
    markers: Markers,
) -> tuple[list[int], list[int]]:
    """One example at one stage as (input_ids, labels), equally long; labels are IGNORE up to the end of the prompt.

    Q S_1..S_n A for cot, Q A for no_cot, and for coconut Q start latent* end S_{s+1}..S_n A; no_thoughts is coconut
    without markers and latents; icot is cot without the first `stage` tokens of the steps. A ends with EOS; it is added
    where `answer` has none yet.
    """
    n_latents, _ = thoughts_and_dropped(len(steps), stage, config)
    before = _prefix(question, n_latents, config, markers)
    after = kept_reasoning(steps, stage, config) + list(answer)
    if after[-1:] != [markers.eos]:
        after.append(markers.eos)
    return before + after, [IGNORE] * len(before) + after


# ---------------------------------------------------------------------------------------------------------------
# Examples and their tokens
# ---------------------------------------------------------------------------------------------------------------


def load_examples(path: str | Path, limit: int | None = None) -> list[dict]:
    """The examples of a file, or its first `limit`, as `read_examples` yields them."""
    return list(read_examples(path, limit))


def read_examples(path: str | Path, limit: int | None = None) -> Iterator[dict]:
    """Reads a JSON list of {question: str, answer: str, steps: list of str}; other fields are kept.

    One example at a time: parsed all at once, GSM8K's training set would take a gigabyte. Raises UserError that names
    the file, and the record and field where one is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        for number, example in enumerate(_json_list(text)):
            if number == limit:
                return
            problem = _record_problem(example)
            if problem:
                raise UserError(f"{path}: record {number} (counted from 0) {problem}")
            yield example
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} cannot be decoded") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except _NoListError:
        raise UserError(f"{path} must hold a JSON list of at least one example") from None


class _NoListError(Exception):
    """JSON that is another value than a list, or an empty list."""


def _json_list(text: str) -> Iterator:
    """The items of a JSON list. Raises JSONDecodeError and _NoListError."""

    def skip_space(place: int) -> int:
        return JSON_SPACE.match(text, place).end()

    place = skip_space(0)
    if not text.startswith("[", place):
        json.loads(text)  # says what is wrong, if it is no JSON at all
        raise _NoListError
    place = skip_space(place + 1)
    if text.startswith("]", place):
        json.loads(text)
        raise _NoListError
    decoder = json.JSONDecoder()
    while True:
        item, place = decoder.raw_decode(text, place)
        yield item
        place = skip_space(place)
        mark = text[place : place + 1]
        place = skip_space(place + 1)
        if mark == "]" and place == len(text):
            return
        if mark != ",":
            raise json.JSONDecodeError("Extra data" if mark == "]" else "Expecting ',' delimiter", text, place)


def _record_problem(example) -> str | None:
    if not isinstance(example, dict):
        return "is no object"
    for field in ("question", "answer", "steps"):
        if field not in example:
            return f"lacks {field!r}"
    for field in ("question", "answer"):
        if not isinstance(example[field], str):
            return f"has a {field!r} that is no text"
    steps = example["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return "has 'steps' that are no list of texts"
    return None


class Tokens:
    """The token ids of a data file: `tokens[i]` is (Q, [S_1..S_n], A) of example i, as lists of int.

    Three flat arrays, memory-mapped: `ids` (int32) holds all texts end to end; text j is ids[texts[j]:texts[j + 1]];
    example i owns the texts examples[i] to examples[i + 1] - 1: its question, its steps, its answer.
    """

    NAMES = ("ids", "texts", "examples")

    def __init__(self, ids: np.ndarray, texts: np.ndarray, examples: np.ndarray):
        self.ids, self.texts, self.examples = ids, texts, examples
        self.chosen: np.ndarray | None = None  # where examples are left out, the numbers of the others

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

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.NAMES))

    def save(self, folder: Path) -> None:
        for name in self.NAMES:
            np.save(folder / f"{name}.npy", getattr(self, name))


def load_tokenizer(config: Config, folder: Path | None = None):
    """The tokenizer of a checkpoint's folder, where it has one, else of config.model_id. Raises UserError."""
    from transformers import AutoTokenizer

    has_one = folder is not None and any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    source = folder if has_one else config.model_id
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise not_loadable("load_model_path" if has_one else "model_id", source, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no EOS token, without which no answer ends")
    return tokenizer


def not_loadable(key: str, source, error: Exception) -> UserError:
    """That transformers found nothing it can load where `key` points."""
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f"{key} {str(source)!r} cannot be loaded: it is neither a whole local Hugging Face folder nor to be had from "
        f"the hub ({first_line})"
    )


def mark(tokenizer, method: str) -> Markers:
    """The ids of the markers, for the methods that have them; the tokenizer gets those that it lacks, in the
    reference's order."""
    if method != "coconut":
        return Markers(None, None, None, tokenizer.eos_token_id)
    tokenizer.add_tokens([START, END, LATENT])
    start, end, latent = tokenizer.convert_tokens_to_ids([START, END, LATENT])
    return Markers(start, latent, end, tokenizer.eos_token_id)


def tokenize(examples: Iterable[dict], tokenizer, show_progress: bool = False) -> Tokens:
    """Q = question + newline, with the special tokens that the tokenizer adds by itself; S = step + newline and
    A = "### " + answer without them. A's EOS is added by `training_sequence`."""
    ids: list[np.ndarray] = []
    text_lengths: list[np.ndarray] = []
    texts_per_example: list[int] = []
    bar = progress_bar(examples, "tokenizing", "examples", show_progress)
    for part in batched(bar, 1000):
        questions = tokenizer([e["question"] + "\n" for e in part])["input_ids"]
        others = [text for e in part for text in (*(step + "\n" for step in e["steps"]), "### " + e["answer"])]
        rest = iter(tokenizer(others, add_special_tokens=False)["input_ids"] if others else [])
        n_texts = [len(example["steps"]) + 2 for example in part]
        texts = [
            text for question, n in zip(questions, n_texts, strict=True) for text in (question, *islice(rest, n - 1))
        ]
        text_lengths.append(np.array([len(text) for text in texts], dtype=np.int64))
        ids.append(np.fromiter(chain.from_iterable(texts), dtype=np.int32, count=text_lengths[-1].sum()))
        texts_per_example += n_texts
    return Tokens(
        np.concatenate(ids),
        np.concatenate([[0], np.cumsum(np.concatenate(text_lengths))]),
        np.concatenate([[0], np.cumsum(texts_per_example)]),
    )


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of at most `size` items."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def cache_tokens(path: str, tokenizer, folder: Path, limit: int | None = None, show_progress: bool = True) -> Path:
    """Tokenizes the data file `path` into a folder under `folder`, unless it is there already; returns that folder.

    Its name is a digest of the file's bytes, the tokenizer and the limit. It appears whole or not at all.
    """
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    digest.update(json.dumps([type(tokenizer).__name__, backend, limit, CACHE_VERSION]).encode())
    target = folder / digest.hexdigest()[:32]
    if not target.exists():
        tokens = tokenize(read_examples(path, limit), tokenizer, show_progress)
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        tokens.save(aside)
        sync_to_disk(aside)
        os.chmod(aside, 0o755)  # mkdtemp's folders are private, but a data cache is for the whole group
        try:
            aside.rename(target)
        except OSError:  # another job was faster
            shutil.rmtree(aside)
    return target


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


class StageDataset:
    """Training sequences: item (i, s) is example i at the scheduled stage s, as (input_ids, labels), lists of int.

    With an epoch, single examples depart from that stage as `stage_of_example` says (training); without one they never
    do (validation).
    """

    def __init__(self, tokens: Tokens, config: Config, markers: Markers, epoch: int | None = None):
        self.tokens, self.config, self.markers, self.epoch = tokens, config, markers, epoch

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int]]:
        index, stage = key
        question, steps, answer = self.tokens[index]
        if self.epoch is not None:
            stage = stage_of_example(self.config, stage, self.epoch, index, len(steps))
        return training_sequence(question, steps, answer, stage, self.config, self.markers)


def _padded(rows: list[Sequence[int]], lefts: list[int], fill: int) -> torch.Tensor:
    """Rows of int, each after lefts[i] paddings, as one (B, T) int64 tensor."""
    import torch

    width = max(left + len(row) for row, left in zip(rows, lefts, strict=True))
    result = np.full((len(rows), width), fill, dtype=np.int64)
    for line, row, left in zip(result, rows, lefts, strict=True):
        line[left : left + len(row)] = row
    return torch.from_numpy(result)


def _batch(rows: list[Sequence[int]], lefts: list[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": _padded(rows, lefts, pad_token_id),
        "attention_mask": _padded([[1] * len(row) for row in rows], lefts, 0),
        "position_ids": _padded([range(len(row)) for row in rows], lefts, 0),
    }


def collate(rows: list[tuple[list[int], list[int]]], pad_token_id: int, latent_token_id: int | None) -> dict:
    """(input_ids, labels) pairs -> input_ids, attention_mask, position_ids, labels, each (B, T) int64.

    Rows are padded on the left so that the first latent of each stands in one column, which is what lets rows share
    the latent passes, and on the right to one width. Pads have attention 0, position 0 and label IGNORE.
    """
    first = [ids.index(latent_token_id) if latent_token_id in ids else None for ids, _ in rows]
    column = max((place for place in first if place is not None), default=0)
    lefts = [0 if place is None else column - place for place in first]
    batch = _batch([ids for ids, _ in rows], lefts, pad_token_id)
    batch["labels"] = _padded([labels for _, labels in rows], lefts, IGNORE)
    return batch


def collate_for_device(rows: list[tuple[list[int], list[int]]], pad_token_id: int, latent_token_id: int | None) -> dict:
    """`collate`, with what the model would otherwise have to ask the device for, and wait: `latent_columns`, a list of
    int; `supervised`, (S,) int64, the positions in the flattened (B, T) that predict a supervised token; and
    `left_padded`, whether a row is padded on the left."""
    import torch

    batch = collate(rows, pad_token_id, latent_token_id)
    predicting = torch.zeros_like(batch["labels"], dtype=torch.bool)
    predicting[:, :-1] = batch["labels"][:, 1:] != IGNORE
    batch["supervised"] = predicting.flatten().nonzero().flatten()
    batch["latent_columns"] = latent_columns(batch["input_ids"], latent_token_id)
    batch["left_padded"] = not bool(batch["attention_mask"][:, 0].all())
    return batch


def latent_columns(input_ids: torch.Tensor, latent_token_id: int | None) -> list[int]:
    """The columns of (B, T) in which at least one row has a latent."""
    if latent_token_id is None:
        return []
    return (input_ids == latent_token_id).any(dim=0).nonzero().flatten().tolist()


def collate_prompts(prompts: list[Sequence[int]], pad_token_id: int) -> dict:
    """Prompts -> input_ids, attention_mask, position_ids, each (B, T) int64, padded on the left: generation
    continues every row in the same column."""
    width = max(len(row) for row in prompts)
    return _batch(prompts, [width - len(row) for row in prompts], pad_token_id)


def sequence_lengths(tokens: Tokens, config: Config, stage: int) -> np.ndarray:
    """(examples,) int64: how long the training sequence of each example is at a stage."""
    starts, ends = tokens.examples[:-1], tokens.examples[1:]
    if tokens.chosen is not None:
        starts, ends = starts[tokens.chosen], ends[tokens.chosen]
    n_steps = ends - starts - 2
    by_steps = np.array([thoughts_and_dropped(n, stage, config) for n in range(n_steps.max() + 1)])
    latents, dropped = by_steps[n_steps].T
    reasoning = tokens.texts[ends - 1] - tokens.texts[starts + 1 + dropped]
    if config.method == "icot":
        reasoning = np.maximum(reasoning - stage, 0)
    question = tokens.texts[starts + 1] - tokens.texts[starts]
    answer = tokens.texts[ends] - tokens.texts[ends - 1] + 1  # EOS
    return question + (latents + 2 if config.method == "coconut" else 0) + reasoning + answer


def longest_sequence(tokens: Tokens, config: Config) -> tuple[int, int]:
    """(length, index in the file) of the longest training sequence of any stage."""
    stages = range(config.last_stage + 1) if config.method in ("coconut", "no_thoughts") else [0]
    lengths = np.max([sequence_lengths(tokens, config, stage) for stage in stages], axis=0)
    index = int(lengths.argmax())
    return int(lengths[index]), index if tokens.chosen is None else int(tokens.chosen[index])


class MicroBatch(NamedTuple):
    """One forward pass of one rank: the examples, and the factor of its mean loss in the step's loss."""

    indices: list[int]
    weight: float


def example_order(n_examples: int, config: Config, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """(examples,) int64: the examples of an epoch as they are taken, a permutation drawn from (seed, epoch), the same
    for any number of ranks.

    With `lengths`, of all sequences, the permutation is cut into windows of 50 batches, each window is sorted by length
    and cut into batches, and the batches of all windows are shuffled: what shares a step, and so a pass, is similarly
    long, while which examples meet, and when, stays random.
    """
    random = np.random.default_rng((config.seed, epoch))
    order = random.permutation(n_examples)
    if lengths is None:
        return order
    batch = config.global_batch_size or config.gradient_accumulation_steps * config.batch_size_training
    batches = []
    for begin in range(0, n_examples, 50 * batch):
        window = order[begin : begin + 50 * batch]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[begin : begin + batch] for begin in range(0, len(window), batch)]
    # a short batch stays the last: before others it would shift their cuts
    full = len(batches) - (len(batches[-1]) < batch)
    return np.concatenate([batches[i] for i in (*random.permutation(full), *range(full, len(batches)))])


def steps_per_epoch(n_examples: int, config: Config, world_size: int) -> int:
    """Optimizer steps of a whole epoch."""
    return len(EpochPlan(np.arange(n_examples), config, 0, world_size))


class PlannedStep(NamedTuple):
    """One optimizer step of one rank."""

    micro_batches: list[MicroBatch]
    n_examples: int  # over all ranks


class EpochPlan(Sequence):
    """What one rank does in an epoch (see `example_order`), or in the rest of it once the first `seen` examples have
    been trained on, by whatever number of ranks. A sequence of PlannedStep, each made when it is asked for.

    The examples of each step are cut into micro-batches that the ranks take in turn: the cuts, and so the gradients,
    are the same for every world size with the same global batch and the same size of a pass. The last step may be
    short: its loss is divided by its own number of examples, and a rank that would have none runs one of its examples
    with weight 0, because every rank has to join the passes.

    Weights: gradients are averaged over ranks and summed over a rank's micro-batches, so that
    weight = world_size x (examples in the micro-batch) / (examples in the step).
    """

    def __init__(self, order: np.ndarray, config: Config, rank: int, world_size: int, seen: int = 0):
        self.order, self.rank, self.world_size = order[seen:], rank, world_size
        accumulation, self.size = config.passes(world_size)
        self.per_step = accumulation * world_size * self.size

    def __len__(self) -> int:
        return -(-len(self.order) // self.per_step)

    def examples(self, step: int) -> list[int]:
        """The examples of a step over all ranks."""
        return self.order[step * self.per_step : (step + 1) * self.per_step].tolist()

    def __getitem__(self, step: int) -> PlannedStep:
        if not 0 <= step < len(self):
            raise IndexError(step)
        examples = self.examples(step)
        rounds = -(-len(examples) // (self.size * self.world_size))
        mine = []
        for place in range(self.rank, rounds * self.world_size, self.world_size):
            part = examples[place * self.size : (place + 1) * self.size]
            mine.append(MicroBatch(part or examples[:1], self.world_size * len(part) / len(examples)))
        return PlannedStep(mine, len(examples))


class PlannedBatches:
    """A batch sampler: the items of StageDataset that each micro-batch of a plan holds, as they are asked for."""

    def __init__(self, plan: EpochPlan, stages: Sequence[int]):
        self.plan, self.stages = plan, stages

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for stage, step in zip(self.stages, self.plan, strict=True):
            for micro in step.micro_batches:
                yield [(index, stage) for index in micro.indices]


def schedule(config: Config, world_size: int) -> str:
    """The whole plan as a table, a line an epoch: what `run.py FILE --schedule` prints.

    For icot the removed tokens are those at the end of the epoch, to within the rounding of an epoch's steps.
    """
    accumulation, size = config.passes(world_size)
    batch = accumulation * world_size * size
    lines = [f"{'epoch':>5} {'stage':>5} {'latents':>8} {'written reasoning':>20} {'optimizer':>10} {'batch':>6}"]
    for epoch in range(config.resume, config.num_epochs):
        stage = stage_of(config, epoch)
        fresh = epoch == config.resume or optimizer_is_reset(config, epoch)
        latents, dropped = thoughts_and_dropped(config.max_latent_stage, stage, config)
        if config.method == "icot":
            kept = "none" if stage == NO_REASONING else f"all but {stage} tokens"
        elif config.method == "no_cot" or (config.method != "cot" and stage > config.max_latent_stage):
            kept = "none"
        else:
            kept = f"all but {dropped} steps" if dropped else "all"
        optimizer = "new" if fresh else "kept"
        lines.append(f"{epoch:>5} {stage_name(stage):>5} {latents:>8} {kept:>20} {optimizer:>10} {batch:>6}")
    return "\n".join(lines)


def optimizer_is_reset(config: Config, epoch: int) -> bool:
    """Whether AdamW is made anew before this epoch. icot resets it within an epoch too."""
    if config.reset_optimizer == "stage":
        return epoch > 0 and stage_of(config, epoch) != stage_of(config, epoch - 1)
    return config.reset_optimizer == "epoch"


# ---------------------------------------------------------------------------------------------------------------
# Looking at a file: `python dataset.py FILE`
# ---------------------------------------------------------------------------------------------------------------

COLOURS = {"given": "0", "latent": "1;35", "supervised": "32"}  # of a terminal


def show_sequence(
    input_ids: list[int], labels: list[int], markers: Markers, tokenizer, coloured: bool = False
) -> list[str]:
    """A training sequence as lines of text, a line for each run of tokens of one kind: given, latent or supervised."""

    def kind(pair: tuple[int, int]) -> str:
        return "supervised" if pair[1] != IGNORE else "latent" if pair[0] == markers.latent else "given"

    lines = []
    for name, run in groupby(zip(input_ids, labels, strict=True), key=kind):
        texts = [tokenizer.decode([token]).replace("\n", "⏎") for token, _ in run]
        # a bar between tokens, for their spaces are part of them
        line = f"{name:>10} {len(texts):>4}  {f'{LATENT} x {len(texts)}' if name == 'latent' else '|'.join(texts)}"
        lines.append(f"\033[{COLOURS[name]}m{line}\033[0m" if coloured else line)
    return lines


def length_table(tokens: Tokens, stage: int, config: Config, markers: Markers) -> list[str]:
    """How many tokens the parts of a file's examples have, and its training sequences at a stage, as lines of text."""
    columns: dict[str, list[int]] = {
        "steps of an example": [],
        "tokens of the question": [],
        "tokens of all steps": [],
        "tokens of the answer": [],
        f"sequence at stage {stage}": [],
        "  of it supervised": [],
    }
    for number in range(len(tokens)):
        question, steps, answer = tokens[number]
        ids, labels = training_sequence(question, steps, answer, stage, config, markers)
        supervised = sum(label != IGNORE for label in labels)
        counts = (len(steps), len(question), sum(map(len, steps)), len(answer), len(ids), supervised)
        for column, count in zip(columns.values(), counts, strict=True):
            column.append(count)
    heads = ("mean", "min", "median", "99 %", "max", "example of max")
    lines = [f"{'':<24}" + "".join(f"{head:>9}" for head in heads[:-1]) + f"{heads[-1]:>16}"]
    for name, column in columns.items():
        low, middle, high, top = np.percentile(column, (0, 50, 99, 100), method="nearest")
        numbers = "".join(f"{value:>9}" for value in (low, middle, high, top))
        lines.append(f"{name:<24}{np.mean(column):>9.1f}{numbers}{int(np.argmax(column)):>16}")
    return lines


def look(path: str, config: Config, stage: int, n_examples: int, coloured: bool) -> str:
    """What `python dataset.py` prints. Raises UserError."""
    if config.method in ("coconut", "no_thoughts") and stage > config.last_stage:
        raise UserError(f"there is no stage {stage}: the last one of this configuration is {config.last_stage}")
    examples = load_examples(path)
    tokenizer = load_tokenizer(config)
    markers = mark(tokenizer, config.method)
    tokens = tokenize(examples, tokenizer, show_progress=len(examples) > 20_000)
    lines = [f"{path}: {len(examples):,} examples; method {config.method}, stage {stage}, model {config.model_id}"]
    for number in range(min(n_examples, len(examples))):
        ids, labels = training_sequence(*tokens[number], stage, config, markers)
        lines += ["", f"example {number}: {len(ids)} tokens"]
        lines += show_sequence(ids, labels, markers, tokenizer, coloured)
    return "\n".join([*lines, "", *length_table(tokens, stage, config, markers)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Shows a data file as the model sees it at a stage.")
    parser.add_argument("file", help="JSON list of {question, answer, steps}")
    parser.add_argument("--model", metavar="ID", help="whose tokenizer (default: model_id of the configuration)")
    parser.add_argument("--config", metavar="YAML", help="method and stages (default: Coconut, c_thought 1)")
    parser.add_argument("--stage", type=int, metavar="S", help="(default: that of the run's first epoch)")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="show the first N (default: %(default)s)")
    options = parser.parse_args(arguments)
    if (options.stage or 0) < 0 or options.examples < 0:
        parser.error("--stage and --examples must not be negative")
    try:
        config = Config.from_file(options.config, needs_files=False) if options.config else Config()
        config.model_id = options.model or config.model_id
        stage = stage_of(config, config.resume) if options.stage is None else options.stage
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(look(options.file, config, stage, options.examples, coloured))
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
