"""From tokens to batches: the sequences of a stage, padding, each rank's share of an epoch, prefetching.

Legend: Q question, S_i written step i, A answer, n number of written steps; B rows of a batch, T columns.

Sequences are built from the cached tokens (preprocessing/tokens.py) when a batch needs them: an epoch starts at once.
All randomness is a function of (seed, epoch, example): neither the number of ranks nor a restart changes it. torch is
imported inside functions, so that data can be read without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import Config
from curriculum import IGNORE, Markers, stage_of_example, training_sequence
from preprocessing.tokens import Tokens
from utils import under_debugger

if TYPE_CHECKING:
    import torch


# --- Batches ---


class StageDataset:
    """Item (i, s) is the training sequence of example i at the scheduled stage s: (input_ids, labels), lists of int.

    With an epoch (training) `stage_of_example` may change the stage of an example; without one (validation) it is s.
    """

    # True: batches have `loss_counts`, {"auxiliary": number of terms in the auxiliary loss, a sum}. If it also has
    # "loss", the number of supervised tokens, the main loss is a mean over a step's tokens (run.weighted_batches).
    counts_loss_terms = False

    def __init__(self, tokens: Tokens, config: Config, markers: Markers, epoch: int | None = None):
        self.tokens, self.config, self.markers, self.epoch = tokens, config, markers, epoch

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int]]:
        question, steps, answer = self.tokens[key[0]]
        return training_sequence(question, steps, answer, self.stage_of(key, len(steps)), self.config, self.markers)

    def stage_of(self, key: tuple[int, int], n_steps: int) -> int:
        """Returns the stage of an item with n_steps written steps."""
        index, stage = key
        return stage if self.epoch is None else stage_of_example(self.config, stage, self.epoch, index, n_steps)

    def collate(self, rows: list[tuple]) -> dict:
        """Returns the model's keyword arguments for a list of items."""
        return collate_for_device(rows, self.markers.eos, self.markers.latent)

    def micro_batch(self, micro: MicroBatch, stage: int) -> dict:
        """Collates the items of a micro-batch and adds its `weight`."""
        return self.collate([self[index, stage] for index in micro.indices]) | {"weight": self.weight(micro, stage)}

    def weight(self, micro: MicroBatch, stage: int) -> float:
        """Returns the factor of the micro-batch's mean loss in the step's loss (see EpochPlan)."""
        if not micro.group or not micro.weight:
            return micro.weight
        counts = {i: sum(label != IGNORE for label in self.sequence(self[i, stage])[1]) for i in micro.group}
        return float(micro.weight * np.mean([counts[i] for i in micro.indices]) / np.mean(list(counts.values())))

    def sequence(self, item) -> tuple[list[int], list[int]]:
        """Returns (input_ids, labels) of an item."""
        return item[:2]

    def others(self, item, words) -> list[str | tuple[str, list[int], list[int]]]:
        """Returns what tools/show_data.py prints of an item beside `sequence`: lines of text, and further sequences as
        (title, input_ids, labels). words(ids) decodes tokens."""
        return []


def collate(rows: list[tuple[list[int], list[int]]], pad_token_id: int, latent_token_id: int | None) -> dict:
    """Pads (input_ids, labels) pairs to input_ids, attention_mask, position_ids and labels, each (B, T) int64.

    Padding between the question and the latents puts the first latents of all rows in one column, so that the rows
    share the latent passes; rows are then padded on the right. Padding has attention 0, position 0 and label IGNORE.
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
    """`collate`, with facts about the batch that spare the model device syncs.

    latent_columns: list of int, the columns with a latent in at least one row.
    prefix_lengths: (B,) int64, the number of tokens before the first latent column; None if none of them is padding.
    supervised: (S,) int64, the positions in the flattened (B, T) that predict a supervised token.
    """
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
    """Pads prompts to input_ids, attention_mask and position_ids, each (B, T) int64; on the left by default, so that
    generation continues every row in the same column."""
    width = max(len(row) for row in prompts) if on_the_left else 0
    return _padded(prompts, pad_token_id, [0] * len(prompts), [max(width - len(row), 0) for row in prompts])


def _padded(rows: list[Sequence[int]], fill: int, begins: list[int], gaps: list[int]) -> dict[str, torch.Tensor]:
    """Inserts gaps[i] padding positions before token begins[i] of row i, then pads all rows on the right."""
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
    """Concatenates rows to one int64 array."""
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)


def latent_columns(input_ids: torch.Tensor, latent_token_id: int | None) -> list[int]:
    """Returns the columns of (B, T) in which at least one row has a latent."""
    if latent_token_id is None:
        return []
    return (input_ids == latent_token_id).any(dim=0).nonzero().flatten().tolist()


# --- The examples of each rank and step ---


class MicroBatch(NamedTuple):
    """The examples of one forward and backward pass on one rank."""

    indices: list[int]
    weight: float  # the factor of its mean loss in the step's loss, before `StageDataset.weight` corrects it by group
    group: Sequence[int] = ()  # the examples, of several micro-batches, that share one mean over tokens (see EpochPlan)


def example_order(n_examples: int, config: Config, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Returns the order of an epoch's examples, (n_examples,) int64: a permutation drawn from (seed, epoch).

    lengths: of all sequences, to group similar lengths. Windows of 50 batches are sorted by length and cut into
        batches, and all batches are shuffled: a step has little padding, but its examples and their order stay random.
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
    # a short batch stays last: earlier, it would shift the bounds of the following steps
    full = len(batches) - (len(batches[-1]) < batch)
    return np.concatenate([batches[i] for i in (*random.permutation(full), *range(full, len(batches)))])


def steps_per_epoch(n_examples: int, config: Config, world_size: int) -> int:
    """Returns the number of optimizer steps of a whole epoch."""
    return len(EpochPlan(np.arange(n_examples), config, 0, world_size))


class PlannedStep(NamedTuple):
    """One optimizer step of one rank."""

    micro_batches: list[MicroBatch]
    n_examples: int  # over all ranks


class EpochPlan(Sequence):
    """The steps of one rank in an epoch, or in what is left of it after `seen` examples: a sequence of PlannedStep.

    A step's examples are cut into micro-batches, which the ranks take in turn: for a given micro-batch size the cuts,
    and so the gradients, do not depend on the world size. A short last step is divided by its own number of examples; a
    rank without a share runs one of these with weight 0, because every rank must join the collectives.

    Gradients are averaged over ranks and summed over a rank's micro-batches, so a micro-batch weighs
    world_size x (its examples) / (the step's examples). If many ranks make micro-batches smaller than
    batch_size_training, the loss is still one mean over the supervised tokens of batch_size_training examples, or of
    the whole step: their `group`, by which `StageDataset.weight` corrects the weight.
    """

    def __init__(self, order: np.ndarray, config: Config, rank: int, world_size: int, seen: int = 0):
        self.order, self.rank, self.world_size = order[seen:], rank, world_size
        accumulation, self.size = config.micro_batches(world_size)
        self.per_step = accumulation * world_size * self.size
        whole = min(config.batch_size_training, self.per_step)
        self.group_size = whole if self.size < whole else 0

    def __len__(self) -> int:
        return -(-len(self.order) // self.per_step)

    def examples(self, step: int) -> list[int]:
        """Returns the examples of a step over all ranks."""
        return self.order[step * self.per_step : (step + 1) * self.per_step].tolist()

    def __getitem__(self, step: int) -> PlannedStep:
        if not 0 <= step < len(self):
            raise IndexError(step)
        examples = self.examples(step)
        rounds = -(-len(examples) // (self.size * self.world_size))
        mine = []
        for number in range(self.rank, rounds * self.world_size, self.world_size):
            begin = number * self.size
            part = examples[begin : begin + self.size]
            group = examples[begin - begin % self.group_size :][: self.group_size] if self.group_size else ()
            mine.append(MicroBatch(part or examples[:1], self.world_size * len(part) / len(examples), group))
        return PlannedStep(mine, len(examples))


@contextmanager
def batches_of(dataset: StageDataset, plan: EpochPlan, stages: Sequence[int]) -> Iterator[Iterator[dict]]:
    """Yields an iterator over the collated micro-batches of a plan, whose steps have these `stages`.

    A thread prepares the next batch; its exceptions are raised here. Under a debugger there is no thread, since
    breakpoints would not stop it.
    """
    import torch

    def prepare(micro: MicroBatch, stage: int) -> dict:
        batch = dataset.micro_batch(micro, stage)
        return _map(batch, lambda tensor: tensor.pin_memory()) if torch.cuda.is_available() else batch

    planned = ((micro, stage) for step, stage in zip(plan, stages, strict=True) for micro in step.micro_batches)
    if under_debugger():
        yield (prepare(micro, stage) for micro, stage in planned)
        return
    with ThreadPoolExecutor(1, "batches") as pool:
        futures = (pool.submit(prepare, micro, stage) for micro, stage in planned)
        # pairwise submits the next batch before it hands out this one
        yield (future.result() for future, _ in pairwise(chain(futures, [None])))


def to_device(batch: dict, device: torch.device) -> dict:
    """Copies the tensors of a batch to a device, asynchronously."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _map(batch: dict, function) -> dict:
    """Applies a function to each tensor of a batch and of the batches nested in it."""
    import torch

    def one(value):
        if isinstance(value, dict):
            return _map(value, function)
        return function(value) if isinstance(value, torch.Tensor) else value

    return {name: one(value) for name, value in batch.items()}


def sequences_in(batch: dict) -> Iterator[dict]:
    """Yields a batch and the batches nested in it: some methods have several sequences per example."""
    yield batch
    for part in batch.values():
        if isinstance(part, dict) and "input_ids" in part:
            yield from sequences_in(part)
