"""From examples to batches: sequences, padding, this rank's share.

Legend: Q question, S_i written step i, A answer, n number of written steps; B rows of a batch, T columns.

The sequence of a stage is built from the tokens (tokens.py) when it is asked for, so that an epoch starts at once
whatever the size of the data. Everything random here is a function of (seed, epoch, example): no number of ranks,
workers or restarts changes it.

All is numpy until the last moment, when `padded` makes tensors: data can be read without waiting for torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import Config
from curriculum import (
    IGNORE,
    MODES,
    AuxiliaryTexts,
    Markers,
    auxiliary_texts,
    stage_of_example,
    thoughts_and_dropped,
    training_sequence,
)
from preprocessing.examples import content_digest, load_examples
from preprocessing.tokens import ANSWER_PREFIX, Tokens, cache_tokens
from trainer.distributed import World, ignore_signals, on_main_rank, under_debugger
from utils import UserError

if TYPE_CHECKING:
    import torch

DEBUG_EXAMPLES = {"train": 5000, "val": 32}


@dataclass
class Data:
    """What is trained or evaluated on: tokens of either file, and the examples themselves for the evaluation."""

    val_examples: list[dict]
    val: Tokens
    val_digest: str | None = None  # of the file's bytes
    train: Tokens | None = None
    train_digest: str | None = None


def load_data(config: Config, world: World, tokenizer) -> Data:
    """Rank 0 tokenizes, or finds the tokens of an earlier run; all ranks map the same files into memory. Collective."""
    cache = Path(config.save_path) / ".tokens"
    limits = {"train": config.max_train_examples, "val": config.max_eval_examples}
    if config.debug:
        limits = {name: min(limit or DEBUG_EXAMPLES[name], DEBUG_EXAMPLES[name]) for name, limit in limits.items()}

    def tokens_of(path: str, limit: int | None, auxiliary: AuxiliaryTexts | None = None) -> Path:
        options = {"step_separator": config.step_separator if auxiliary is None else "", "auxiliary": auxiliary}
        return on_main_rank(world, lambda: cache_tokens(path, tokenizer, cache, limit, **options))

    val = Tokens.open(tokens_of(config.val_path, limits["val"]))
    # after rank 0 has read them, and complained where there is reason to
    data = Data(load_examples(config.val_path, limits["val"]), val, content_digest(config.val_path))
    if not config.only_eval:
        folder = tokens_of(config.train_path, limits["train"])
        data.train, data.train_digest = Tokens.open(folder), folder.name
        if config.max_train_tokens is not None:
            data.train.leave_out_longer_than(config.max_train_tokens)
            if len(data.train) == 0:
                raise UserError(f"max_train_tokens {config.max_train_tokens} leaves no example of {config.train_path}")
        if (auxiliary := auxiliary_texts(config)) is not None:
            data.train.auxiliary = Tokens.open(tokens_of(config.train_path, limits["train"], auxiliary))
            data.train.answer_prefix = tokenizer(ANSWER_PREFIX, add_special_tokens=False)["input_ids"]
            data.train.auxiliary.chosen = data.train.chosen
    return data


def check_lengths(config: Config, max_positions: int | None, data: Data) -> None:
    """Raises UserError where an example does not fit the model: better now than in the middle of an epoch."""
    for path, tokens in ((config.train_path, data.train), (config.val_path, data.val)):
        if tokens is None or max_positions is None:
            continue
        length, index = longest_sequence(tokens, config)
        if length > max_positions:
            raise UserError(
                f"{path}: record {index} (counted from 0) makes {length} tokens, but {config.model_id} has only "
                f"{max_positions} positions" + ("; see max_train_tokens" if tokens is data.train else "")
            )


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


class StageDataset:
    """Training sequences: item (i, s) is example i at the scheduled stage s, as (input_ids, labels), lists of int.

    With an epoch, single examples depart from that stage as `stage_of_example` says (training); without one they never
    do (validation).
    """

    # whether batches have `units`: {"auxiliary": over how many things the model's auxiliary loss is a sum}, and with
    # "loss" how many tokens its loss is a mean of, where it is to be a mean over a whole step's, not a mean of means
    counts_loss_terms = False

    def __init__(self, tokens: Tokens, config: Config, markers: Markers, epoch: int | None = None):
        self.tokens, self.config, self.markers, self.epoch = tokens, config, markers, epoch

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int]]:
        index, stage = key
        question, steps, answer = self.tokens[index]
        if self.epoch is not None:
            stage = stage_of_example(self.config, stage, self.epoch, index, len(steps))
        return training_sequence(question, steps, answer, stage, self.config, self.markers)

    def collate(self, rows: list[tuple]) -> dict:
        """Items -> the arguments of the model's forward."""
        return collate_for_device(rows, self.markers.eos, self.markers.latent)


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


def collate_prompts(prompts: list[Sequence[int]], pad_token_id: int) -> dict:
    """Prompts -> input_ids, attention_mask, position_ids, each (B, T) int64, padded on the left: generation
    continues every row in the same column."""
    width = max(len(row) for row in prompts)
    return _padded(prompts, pad_token_id, [0] * len(prompts), [width - len(row) for row in prompts])


def padded(rows: list[Sequence[int]], fill: int) -> torch.Tensor:
    """Rows of int, padded on the right, as one (B, T) int64 tensor."""
    return _padded(rows, fill, [0] * len(rows), [0] * len(rows))["input_ids"]


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
    if config.has_latents and config.latent_markers == "both":
        latents = latents + 2
    return question + latents + reasoning + answer


def longest_sequence(tokens: Tokens, config: Config) -> tuple[int, int]:
    """(length, index in the file) of the longest training sequence of any stage, or of the thoughts that an evaluation
    forces and an answer."""
    stages = range(config.last_stage + 1) if config.has_latents or config.method == "no_thoughts" else [0]
    modes = MODES if config.method == "multi_mode" else [config.mode]
    of_stages = [sequence_lengths(tokens, replace(config, mode=mode), stage) for mode in modes for stage in stages]
    if config.eval_latents is not None:
        forced = replace(config, c_thought=1, max_latent_stage=config.eval_latents, pad_latent_to_max=True)
        of_stages.append(sequence_lengths(tokens, forced, forced.last_stage))
    lengths = np.max(of_stages, axis=0)
    index = int(lengths.argmax())
    return int(lengths[index]), index if tokens.chosen is None else int(tokens.chosen[index])


# ---------------------------------------------------------------------------------------------------------------
# What a rank does in an epoch
# ---------------------------------------------------------------------------------------------------------------


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


@contextmanager
def batches_of(dataset: StageDataset, plan: EpochPlan, stages: Sequence[int]) -> Iterator[Iterator[dict]]:
    """The batches of a plan, a micro-batch each, as the dataset collates them; its steps have these `stages`.

    The loader processes end with the context, whatever ends it: left to themselves they would hold up the program's
    exit for ever, since they do not heed SIGTERM.
    """
    import torch
    from torch.utils.data import DataLoader

    config = dataset.config
    loader = DataLoader(
        dataset,
        batch_sampler=PlannedBatches(plan, stages),
        collate_fn=dataset.collate,
        num_workers=0 if under_debugger() or why_no_loader_processes(config) else config.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws its workers' seeds: not from the stream that dropout uses
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # torch has no public call for this


def why_no_loader_processes(config: Config) -> str | None:
    """Why there can be no loader processes here, whatever num_workers says; None where there can.

    They hand over their tensors through a socket in the folder for temporary files, whose path the system allows 107
    characters.
    """
    socket_path = os.path.join(tempfile.gettempdir(), "pymp-" + 8 * "x", "listener-" + 8 * "x")
    if config.num_workers == 0 or len(os.fsencode(socket_path)) <= 107:
        return None
    return (
        f"the folder for temporary files, {tempfile.gettempdir()}, has too long a path for loader processes: batches "
        f"are made by the ranks themselves; a shorter TMPDIR mends that"
    )
