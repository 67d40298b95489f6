"""From tokens to batches: sequences of a stage, padding, this rank's share, one batch ahead.

Legend: Q question, S_i written step i, A answer, n number of written steps; B rows of a batch, T columns.

The sequence of a stage is built from the tokens (preprocessing/tokens.py) when a batch needs it, so that an epoch
starts at once whatever the size of the data. Everything random is a function of (seed, epoch, example): no number of
ranks or restarts changes it. torch is imported late: data can be read without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import Config
from curriculum import IGNORE, Markers, stage_of_example, training_sequence
from preprocessing.tokens import Tokens
from utils import under_debugger

if TYPE_CHECKING:
    import torch


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


class StageDataset:
    """Training sequences: item (i, s) is example i at the scheduled stage s, as (input_ids, labels), lists of int.

    With an epoch, single examples depart from that stage as `stage_of_example` says (training); without one they never
    do (validation).
    """

    # whether batches have `loss_counts`: {"auxiliary": the number of terms in the model's auxiliary loss}, and with
    # "loss" the number of tokens that its loss is a mean of, where it is to be a mean over a whole step's
    counts_loss_terms = False

    def __init__(self, tokens: Tokens, config: Config, markers: Markers, epoch: int | None = None):
        self.tokens, self.config, self.markers, self.epoch = tokens, config, markers, epoch

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int]]:
        question, steps, answer = self.tokens[key[0]]
        return training_sequence(question, steps, answer, self.stage_of(key, len(steps)), self.config, self.markers)

    def stage_of(self, key: tuple[int, int], n_steps: int) -> int:
        """The stage at which an item, with n_steps written steps, is seen."""
        index, stage = key
        return stage if self.epoch is None else stage_of_example(self.config, stage, self.epoch, index, n_steps)

    def collate(self, rows: list[tuple]) -> dict:
        """Items -> the arguments of the model's forward."""
        return collate_for_device(rows, self.markers.eos, self.markers.latent)

    def micro_batch(self, micro: MicroBatch, stage: int) -> dict:
        """The collated items of a micro-batch, with its `weight`."""
        return self.collate([self[index, stage] for index in micro.indices]) | {"weight": self.weight(micro, stage)}

    def weight(self, micro: MicroBatch, stage: int) -> float:
        """Of a micro-batch, by its share of the supervised tokens of its group."""
        if not micro.group or not micro.weight:
            return micro.weight
        counts = {i: sum(label != IGNORE for label in self.sequence(self[i, stage])[1]) for i in micro.group}
        return float(micro.weight * np.mean([counts[i] for i in micro.indices]) / np.mean(list(counts.values())))

    def sequence(self, item) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of an item, for tools/show_data.py."""
        return item[:2]

    def others(self, item, words) -> list[str | tuple[str, list[int], list[int]]]:
        """What an item holds beside it: lines of text, and (title, input_ids, labels) of further sequences. words(ids)
        is their text."""
        return []


def collate(rows: list[tuple[list[int], list[int]]], pad_token_id: int, latent_token_id: int | None) -> dict:
    """(input_ids, labels) pairs -> input_ids, attention_mask, position_ids, labels, each (B, T) int64.

    The first latents of all rows stand in one column, which is what lets rows share the latent passes: in rows with
    latents, padding follows the question; more of it fills up rows on the right. Pads have attention 0, position 0 and
    label IGNORE.
    """
    import torch

    first = [ids.index(latent_token_id) if latent_token_id in ids else len(ids) for ids, _ in rows]  # (B,)
    column = max((begin for begin, (ids, _) in zip(first, rows, strict=True) if begin < len(ids)), default=0)
    gaps = [column - begin if begin < len(ids) else 0 for begin, (ids, _) in zip(first, rows, strict=True)]
    batch = _padded([ids for ids, _ in rows], pad_token_id, first, gaps)
    labels = np.full(batch["input_ids"].shape, IGNORE, dtype=np.int64)
    labels[batch["attention_mask"].numpy() == 1] = _flat(labels for _, labels in rows)
    return batch | {"labels": torch.from_numpy(labels)}


def collate_for_device(rows: list[tuple[list[int], list[int]]], pad_token_id: int, latent_token_id: int | None) -> dict:
    """`collate`, with what the model would otherwise wait for the device to know: `latent_columns`, a list of int;
    `prefix_lengths`, (B,) int64, the tokens of each row before the first latent column, or None where no padding
    follows them; and `supervised`, (S,) int64, the positions in the flattened (B, T) that predict a supervised
    token."""
    import torch

    batch = collate(rows, pad_token_id, latent_token_id)
    predicting = torch.zeros_like(batch["labels"], dtype=torch.bool)
    predicting[:, :-1] = batch["labels"][:, 1:] != IGNORE
    batch["supervised"] = predicting.flatten().nonzero().flatten()
    columns = batch["latent_columns"] = latent_columns(batch["input_ids"], latent_token_id)
    prefix = batch["attention_mask"][:, : columns[0]] if columns else None
    batch["prefix_lengths"] = None if prefix is None or prefix.all() else prefix.sum(dim=1)
    return batch


def collate_prompts(prompts: list[Sequence[int]], pad_token_id: int, on_the_left: bool = True) -> dict:
    """Prompts -> input_ids, attention_mask, position_ids, each (B, T) int64, padded on the left: generation
    continues every row in the same column."""
    width = max(len(row) for row in prompts) if on_the_left else 0
    return _padded(prompts, pad_token_id, [0] * len(prompts), [max(width - len(row), 0) for row in prompts])


def _padded(rows: list[Sequence[int]], fill: int, begins: list[int], gaps: list[int]) -> dict[str, torch.Tensor]:
    """Rows of int with gaps[i] paddings before the token begins[i], and as many on the right as it takes."""
    import torch

    begin, gap = np.array(begins)[:, None], np.array(gaps)[:, None]  # (B, 1)
    end = gap + np.array([len(row) for row in rows])[:, None]
    column = np.arange(end.max())  # (T,)
    mask = (column < end) & ((column < begin) | (column >= begin + gap))  # (B, T)
    input_ids = np.full(mask.shape, fill, dtype=np.int64)
    input_ids[mask] = _flat(rows)
    positions = np.where(mask, column - gap * (column >= begin), 0)
    arrays = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _flat(rows: Iterable[Sequence[int]]) -> np.ndarray:
    """All numbers of all rows, int64."""
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)


def latent_columns(input_ids: torch.Tensor, latent_token_id: int | None) -> list[int]:
    """The columns of (B, T) in which at least one row has a latent."""
    if latent_token_id is None:
        return []
    return (input_ids == latent_token_id).any(dim=0).nonzero().flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------
# What a rank does in an epoch
# ---------------------------------------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    """One forward pass of one rank: the examples, and the factor of its mean loss in the step's loss."""

    indices: list[int]
    weight: float
    group: Sequence[int] = ()  # the examples of several micro-batches whose loss is one mean over tokens


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
    weight = world_size x (examples in the micro-batch) / (examples in the step). On so many ranks that a pass has fewer
    than batch_size_training examples, these many stay the group whose loss is one mean over tokens.
    """

    def __init__(self, order: np.ndarray, config: Config, rank: int, world_size: int, seen: int = 0):
        self.order, self.rank, self.world_size = order[seen:], rank, world_size
        accumulation, self.size = config.micro_batches(world_size)
        self.per_step = accumulation * world_size * self.size
        whole = config.batch_size_training
        self.group_size = whole if self.size < whole and whole % self.size == 0 else 0

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
            begin = place * self.size
            part = examples[begin : begin + self.size]
            group = examples[begin - begin % self.group_size :][: self.group_size] if self.group_size else ()
            mine.append(MicroBatch(part or examples[:1], self.world_size * len(part) / len(examples), group))
        return PlannedStep(mine, len(examples))


@contextmanager
def batches_of(dataset: StageDataset, plan: EpochPlan, stages: Sequence[int]) -> Iterator[Iterator[dict]]:
    """The batches of a plan, a micro-batch each, as the dataset collates them; its steps have these `stages`. A thread
    makes them one ahead; under a debugger, whose breakpoints it would pass, nothing is ahead. What it raises, the
    iterator raises."""
    import torch

    def make(micro: MicroBatch, stage: int) -> dict:
        batch = dataset.micro_batch(micro, stage)
        return _map(batch, lambda tensor: tensor.pin_memory()) if torch.cuda.is_available() else batch

    def ahead(pool: ThreadPoolExecutor) -> Iterator[dict]:
        pending = None
        for stage, step in zip(stages, plan, strict=True):
            for micro in step.micro_batches:
                pending, earlier = pool.submit(make, micro, stage), pending
                if earlier is not None:
                    yield earlier.result()
        if pending is not None:
            yield pending.result()

    if under_debugger():
        yield (make(micro, stage) for stage, step in zip(stages, plan, strict=True) for micro in step.micro_batches)
        return
    with ThreadPoolExecutor(1, "batches") as pool:
        yield ahead(pool)


def on_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on a device, without waiting for them."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _map(batch: dict, function) -> dict:
    """A batch, and batches within it, with another tensor in place of each."""
    import torch

    def one(value):
        if isinstance(value, dict):
            return _map(value, function)
        return function(value) if isinstance(value, torch.Tensor) else value

    return {name: one(value) for name, value in batch.items()}


def sequences_in(batch: dict) -> Iterator[dict]:
    """A batch and those within it: some methods see an example more than once."""
    yield batch
    for part in batch.values():
        if isinstance(part, dict) and "input_ids" in part:
            yield from sequences_in(part)
