"""Predicts a run's memory, disk, tokens, FLOPs and hours without loading weights; `run.py FILE --plan` prints them.

torch is imported inside functions, because run.py imports this module before it answers --help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import Config
from curriculum import IGNORE, Markers, prompt, stage_name, stage_of, stage_of_step
from dataset import StageDataset
from preprocessing.examples import load_examples
from preprocessing.tokens import tokenize
from trainer.data import Data, check_lengths, load_data, sequence_lengths
from trainer.distributed import World
from trainer.files import free_bytes, reason_of
from utils import UserError, launched_ranks

if TYPE_CHECKING:
    from trainer.memory import Need

GIB = 2**30
SAMPLE = 200  # number of examples from which `cost_of` extrapolates
UTILISATION = 0.3  # share of a GPU's peak FLOP/s
GPU, GPU_GIB = "H100", 80  # for --gpus on a machine without GPUs
LARGEST_BATCH = 4096


# --- Tokens, FLOPs, disk ---


class Cost(NamedTuple):
    epochs: int
    tokens: float  # in training
    flops: float  # in training and evaluation
    disk: int  # bytes of checkpoints


@cache
def _data(path: str, model_id: str, trusts: bool, separator: str) -> tuple[int, object, object]:
    from trainer.pretrained import load_tokenizer

    examples = load_examples(path)
    tokenizer = load_tokenizer(Config(model_id=model_id, trust_remote_code=trusts))
    return len(examples), tokenizer, tokenize(examples[:SAMPLE], tokenizer, step_separator=separator)


def cost_of(config: Config, epochs: Sequence[int] | None = None, test_path: str | None = None) -> Cost:
    """Returns the cost of a run's epochs, by default of all, with their validations and the test, but without what a
    method adds to Coconut.

    An evaluation counts as two forward passes: the loss, and a generation as long as the gold answer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from coconut import Coconut
    from trainer.pretrained import add_marker_tokens, shape_of
    from trainer.setup import checkpoint_bytes
    from trainer.throughput import FlopCounter

    epochs = range(config.resume, config.num_epochs) if epochs is None else epochs
    tokenized_by = config.model_id, config.trust_remote_code, config.step_separator
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape_of(config, None), trust_remote_code=config.trust_remote_code)
    markers = add_marker_tokens(_data(config.train_path, *tokenized_by)[1], config.method)
    counter = FlopCounter.of(Coconut(base, markers.latent, markers.start, markers.end, markers.eos, config.thought))

    def count(path: str, limit: int | None, config: Config, epoch: int, trains: bool = False) -> tuple[float, float]:
        """Returns (tokens, FLOPs) of training on a file once, at this epoch's stage or, if it `trains`, at the stages
        of its steps."""
        n_examples, _, tokens = _data(path, *tokenized_by)
        n_examples = min(n_examples, limit or n_examples)
        n_tried = min(len(tokens), n_examples)
        tried = np.flatnonzero(tokens.written_lengths()[:n_tried] <= (config.max_train_tokens or np.inf))
        rows, scale = StageDataset(tokens, config, markers, epoch), n_examples / n_tried
        stages = [stage_of_step(config, epoch, step, len(tried)) for step in range(len(tried))]
        stages = stages if trains else [stage_of(config, epoch)] * len(tried)
        pairs = [rows[key] for key in zip(tried.tolist(), stages, strict=True)]
        lengths = [len(ids) for ids, _ in pairs]
        supervised = sum(label != IGNORE for _, labels in pairs for label in labels)
        return scale * sum(lengths), scale * counter.training(lengths, supervised)

    trained = [count(config.train_path, config.max_train_examples, config, epoch, True) for epoch in epochs]
    at_stage = replace(config, uniform_prob=0.0, max_train_tokens=None)
    evaluated = [count(config.val_path, config.max_eval_examples, at_stage, epoch) for epoch in epochs]
    if test_path is not None:
        evaluated.append(count(test_path, config.max_eval_examples, at_stage, config.num_epochs - 1))
    flops = sum(flops for _, flops in trained) + sum(flops for _, flops in evaluated) * 2 / 3
    weights = sum(parameter.numel() for parameter in base.parameters()) * (2 if config.bf16_weights else 4)
    beside = weights * config.rules.n_companions
    disk = checkpoint_bytes(config, weights + beside, beside if config.lora_rank else weights + beside)
    return Cost(len(epochs), sum(tokens for tokens, _ in trained), flops, disk)


def is_counted_in_part(config: Config) -> bool:
    """Whether the method does more work than `cost_of` counts."""
    return config.has_latents and config.method != "coconut"


# --- Memory ---


class Machine(NamedTuple):
    """The hardware of a planned run."""

    ranks: int
    gpu: str | None  # the GPU's name; None: CPUs
    memory: int | None = None  # bytes of a GPU


class Batches:
    """Makes the run's batches with the longest sequences, which need the most memory."""

    def __init__(self, config: Config, data: Data, markers: Markers):
        from trainer.pretrained import parts_of

        self.config, self.data, self.markers = config, data, markers
        self.dataset = parts_of(config).dataset(data.train, config, markers)
        stages = list(dict.fromkeys(stage_of(config, epoch) for epoch in range(config.resume, config.num_epochs)))
        # the first stage has the longest reasoning; the last two have the most latents, with and without steps
        self.stages = list(dict.fromkeys([stages[0], *stages[-2:]]))

    def training(self, stage: int, size: int) -> dict:
        """Returns a micro-batch of the `size` longest sequences of a stage. With uniform_prob it includes stage 0's
        longest sequence, which any example may draw."""
        indices = self._longest(self.data.train, stage, size)
        items = [self.dataset[index, stage] for index in indices]
        if self.config.uniform_prob:
            items[0] = self.dataset[self._longest(self.data.train, 0, 1)[0], 0]
        batch = self.dataset.collate(items)
        batch.pop("loss_counts", None)
        return batch

    def validation(self, stage: int, n_ranks: int) -> tuple[list[tuple], list[list[int]]]:
        """Returns the longest (rows of a batch for the loss, prompts of a batch for generation)."""
        rows = StageDataset(self.data.val, self.config, self.markers)
        size, n_examples = self.config.batch_size_training, len(self.data.val)
        pairs = [rows[index, stage] for index in self._longest(self.data.val, stage, min(size, n_examples))]
        prompts = [prompt(*self.data.val[index][:2], stage, self.config, self.markers) for index in range(n_examples)]
        size = min(self.config.eval_batch_size, -(-n_examples // n_ranks))
        return pairs, sorted(prompts, key=len)[-size:]

    def _longest(self, tokens, stage: int, size: int) -> list[int]:
        variants = self.config.rules.variants(self.config)
        lengths = np.max([sequence_lengths(tokens, variant, stage) for variant in variants], axis=0)
        return np.resize(np.argsort(-lengths, kind="stable"), size).tolist()


class Estimate(NamedTuple):
    """Memory of one rank, and sizes."""

    parameters: int
    trained: int
    training: Need
    stage: int  # the stage whose step needs the most memory
    columns: int  # of its batch
    validation: Need
    largest: int | None  # largest batch_size_training that fits; None: the memory is unknown


class Source(NamedTuple):
    """A run's inputs without weights."""

    shape: object  # transformers' configuration
    batches: Batches


def read_source(config: Config) -> Source:
    """Reads the model's configuration and tokenizer and the data's tokens. Raises UserError if any is missing."""
    import torch
    from transformers.utils import logging

    from trainer.pretrained import add_marker_tokens, load_tokenizer, shape_of

    logging.set_verbosity_error()
    tokenizer, shape = load_tokenizer(config), shape_of(config, None)
    markers = add_marker_tokens(tokenizer, config.method)
    text = shape.get_text_config(decoder=True)
    text.vocab_size = max(text.vocab_size, len(tokenizer))  # rows for the markers
    shape.dtype = torch.bfloat16 if config.bf16_weights else torch.float32
    data = load_data(config, World(0, 0, 1, torch.device("cpu")), tokenizer)
    return Source(shape, Batches(config, data, markers))


def estimate(config: Config, machine: Machine, strategy: str, source: Source) -> Estimate:
    """Counts a rank's memory: see trainer/memory.py."""
    from trainer.memory import SHARE_OF_GPU, fake_rank, largest_that_fits

    shapes = [source.shape] * (1 + config.rules.n_companions)
    is_on_gpu, batches, n_ranks = machine.gpu is not None, source.batches, machine.ranks
    _, size = config.micro_batches(n_ranks)
    with fake_rank(config, n_ranks, strategy, is_on_gpu, shapes, batches.markers) as rank:
        check_lengths(config, rank.model.max_positions, batches.data)

        @cache
        def train(stage: int, size: int) -> Need:
            accumulation, _ = replace(config, batch_size_training=size).micro_batches(n_ranks)
            return rank.train(batches.training(stage, size), accumulation)

        needs = {stage: train(stage, size) for stage in batches.stages}
        stage = max(needs, key=lambda stage: needs[stage].total)
        validation = rank.validate(*batches.validation(stage, n_ranks))
        largest = None
        if machine.memory is not None:
            sizes, limit = sizes_of_a_pass(config, n_ranks), int(machine.memory * SHARE_OF_GPU)
            largest = largest_that_fits(lambda size: train(stage, size).total, limit, sizes, first=size)
        parameters = list(rank.model.parameters())
        columns = batches.training(stage, size)["input_ids"].shape[1]
    n_parameters = sum(parameter.numel() for parameter in parameters)
    n_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Estimate(n_parameters, n_trained, needs[stage], stage, columns, validation, largest)


def sizes_of_a_pass(config: Config, n_ranks: int) -> list[int]:
    """Returns the values of batch_size_training that divide a rank's share of the global batch."""
    if config.global_batch_size is None:
        return list(range(1, LARGEST_BATCH + 1))
    share = config.global_batch_size // n_ranks
    return [size for size in range(1, share + 1) if share % size == 0]


# --- Text ---


def plan(config: Config, gpus: int | None = None, gpu_memory: float | None = None) -> str:
    """Returns the text of `run.py FILE --plan` for this number of GPUs and GiB per GPU, by default those of this
    machine. Raises UserError if data or model are missing."""
    from trainer.parallel import strategy_of
    from trainer.throughput import peak_flops

    if config.only_eval:
        raise UserError("--plan is for training runs: leave only_eval out")
    if config.rules.generates:
        raise UserError(f"--plan cannot count the steps of method {config.method}, which generate answers")
    if missing := list(config.missing_files(but_weights=True)):  # an earlier run may still have to make the weights
        raise UserError("; ".join(missing))
    machine = machine_of(gpus, gpu_memory)
    source = read_source(config)
    strategy, why = strategy_of(config, machine.ranks, machine.memory, source.shape)
    found, cost = estimate(config, machine, strategy, source), cost_of(config)
    n_ranks, (accumulation, size) = machine.ranks, config.micro_batches(machine.ranks)
    beside = f" and {config.rules.n_companions} more beside it" if config.rules.n_companions else ""
    training, more = found.training, ", and what the method adds to Coconut" if is_counted_in_part(config) else ""
    lines = {
        "model": f"{config.model_id}{beside}: {found.parameters:,} parameters, {found.trained:,} trained",
        "strategy": f"{strategy} on {n_ranks} x {machine.gpu or 'CPU'} ({why})",
        "batch": f"{accumulation * n_ranks * size} = {n_ranks} ranks x {size} examples x {accumulation} passes",
        "training": f"{_gib(training.total)} a rank at the peak (stage {stage_name(found.stage)}, {found.columns} "
        f"columns): {_parts(training)}",
        "validation": f"{_gib(found.validation.total)} a rank at the peak",
    }
    if machine.memory is not None:
        lines["fits"] = _what_fits(config, machine, found)
    lines["disk"] = _disk(config, found, cost)
    lines["work"] = f"{cost.epochs} epochs, {cost.tokens:,.0f} tokens, {cost.flops:.2e} FLOPs{more}"
    if machine.gpu is not None and (peak := peak_flops(machine.gpu, config.arithmetic)):
        hours = cost.flops / (peak * UTILISATION * n_ranks) / 3600
        speed = f"{UTILISATION:.0%} of {peak:.3g} FLOP/s, the peak of {machine.gpu} in {config.arithmetic}"
        lines["time"] = f"{hours:.3g} hours at {speed}"
    return "\n".join(f"{title:<11}{text}" for title, text in lines.items())


def machine_of(gpus: int | None, gpu_memory: float | None) -> Machine:
    """Returns the hardware to plan for."""
    import torch

    n_ranks = gpus or launched_ranks()[1]
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        return Machine(n_ranks, here.name, int(gpu_memory * GIB) if gpu_memory else here.total_memory)
    if gpus is None and gpu_memory is None:
        return Machine(n_ranks, None)
    return Machine(n_ranks, GPU, int((gpu_memory or GPU_GIB) * GIB))


def _parts(need: Need) -> str:
    parts = {"weights": need.weights, "gathered weights": need.gathered, "gradients": need.gradients}
    parts |= {"AdamW": need.optimizer, "activations and the rest": need.rest}
    return ", ".join(f"{name} {n_bytes / GIB:.3g}" for name, n_bytes in parts.items() if n_bytes)


def _what_fits(config: Config, machine: Machine, found: Estimate) -> str:
    from trainer.memory import SHARE_OF_GPU

    share = f"{SHARE_OF_GPU:.0%} of a GPU's {_gib(machine.memory)}"
    if not found.largest:
        return f"not even one example fits {share}: see gradient_checkpointing, bf16, strategy"
    cut = ", of those that divide a rank's share of global_batch_size" if config.global_batch_size else ""
    fits = f"batch_size_training {found.largest} is the largest that fits {share}{cut}"
    is_too_large = found.validation.total > SHARE_OF_GPU * machine.memory
    return f"{fits}; the validation needs a smaller eval_batch_size" if is_too_large else fits


def _disk(config: Config, found: Estimate, cost: Cost) -> str:
    n_kept = config.keep_checkpoints
    kept = f"the newest {n_kept} and the best are kept" if n_kept else "all are kept: see keep_checkpoints"
    gb = (2 if config.bf16_weights else 4) / 1e9  # a parameter
    return (
        f"a checkpoint {gb * found.parameters:.3g} GB, with its optimizer "
        f"{gb * (found.parameters + 2 * found.trained):.3g} GB; the run "
        f"{cost.disk / 1e9:.3g} GB at most ({kept}), {free_bytes(Path(config.save_path)) / 1e9:.3g} GB are free"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.3g} GiB"


# --- Out of memory ---


@contextmanager
def explains_out_of_memory(config: Config, world: World) -> Iterator[None]:
    """Turns a lack of memory into a UserError that names settings that need less, on CUDA those that would fit."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        of_cpu = "can't allocate memory" in str(error)  # in a plain RuntimeError
        if not (of_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        advice = "try a smaller batch_size_training (the global batch stays) or gradient_checkpointing=true"
        with suppress(Exception):  # a family may fail on fake tensors, which must not hide the lack of memory
            memory = torch.cuda.get_device_properties(world.device).total_memory
            machine = Machine(world.size, torch.cuda.get_device_name(world.device), memory)
            # in another process, since this one has a process group
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                advice = pool.submit(what_would_fit, config, machine).result()
        raise UserError(f"{world.device.type.upper()} is out of memory: {advice} ({reason_of(error)})") from None


def what_would_fit(config: Config, machine: Machine) -> str:
    """Returns a sentence with settings that fit into the machine's memory."""
    from trainer.parallel import strategy_of

    source = read_source(config)
    strategy, _ = strategy_of(config, machine.ranks, machine.memory, source.shape)
    found = estimate(config, machine, strategy, source)
    size = config.micro_batches(machine.ranks)[1]
    if found.largest >= size:
        return (
            f"batch_size_training {size} should have fitted, with {_gib(found.training.total)} in training and "
            f"{_gib(found.validation.total)} in validation of {_gib(machine.memory)}: see whether another program uses "
            "the GPU, and try a smaller eval_batch_size"
        )
    fits = [f"batch_size_training={found.largest}"] if found.largest else []
    if not config.gradient_checkpointing:
        saving = replace(config, gradient_checkpointing=True, compile=False)
        largest = estimate(saving, machine, strategy, source).largest
        fits += [f"gradient_checkpointing=true with batch_size_training={min(largest, size)}"] if largest else []
    needs = f"batch_size_training {size} needs {_gib(found.training.total)} of {_gib(machine.memory)}"
    return f"{needs}; {' or '.join(fits) or 'strategy=fsdp on more GPUs'} would fit"
