"""Sets up a run: model, data, log. `Run` is the state that the training loop shares."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging as transformers_logging

import curriculum
import dataset
from config import GENERATION_KEYS, Config
from preprocessing.examples import content_digest
from trainer import data as data_files
from trainer import distributed as ranks
from trainer import evaluate, parallel
from trainer.checkpoint import Progress, add_digests
from trainer.data import Data
from trainer.distributed import StopSignal, World
from trainer.files import free_bytes
from trainer.logger import RunLogger
from trainer.pretrained import Parts, Pretrained, parts_of
from trainer.run_folder import keep_results, write_config
from trainer.throughput import Throughput
from utils import UserError, log, seed_everything


class Step(NamedTuple):
    """A finished step that is not yet in the log."""

    losses: torch.Tensor  # this rank's share of the step's (main, auxiliary) loss, (1,) or (2,), on the device
    grad_norm: torch.Tensor | None  # of all ranks' gradient before clipping; FSDP shards it. None if not computed
    lr: float
    stage: int
    examples: list[int]  # their indices, over all ranks


@dataclass
class Run:
    """The state of a run, which its steps share."""

    config: Config
    world: World
    pretrained: Pretrained
    sets: dict[str, Data]  # by the names in val_path; "" if val_path is a single path
    logger: RunLogger
    progress: Progress
    stop: StopSignal | None = None
    throughput: Throughput | None = None
    wrapped: torch.nn.Module | None = None  # the model that training calls: wrapped in DDP, or the model itself
    optimizer: torch.optim.Optimizer | None = None
    grad_norm: torch.Tensor | None = None  # of the last step (see Step)
    unlogged: list[Step] = field(default_factory=list)  # steps since the last write to the log
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (sum, count) since then
    saved: Path | None = None  # the newest checkpoint
    hashing: threading.Thread | None = None  # runs `add_digests` on it, on rank 0

    @property
    def model(self) -> torch.nn.Module:
        return self.pretrained.model

    def measure(self, name: str, total: float, number: float) -> None:
        """Adds `number` terms with this total to a mean over all ranks in the next log record."""
        before = self.measured.get(name, (0.0, 0.0))
        self.measured[name] = before[0] + total, before[1] + number

    @cached_property
    def parts(self) -> Parts:
        """The method's dataset class, validation and hooks."""
        return parts_of(self.config)

    def start_digests(self) -> None:
        """Starts a thread, on rank 0, that adds the SHA-256 digests of the newest checkpoint."""
        if self.world.is_main:
            self.hashing = threading.Thread(target=add_digests, args=[self.saved])
            self.hashing.start()

    def wait_for_digests(self) -> None:
        if self.hashing is not None:
            self.hashing.join()

    @property
    def data(self) -> Data:
        """The data of a training run, which has a single val_path."""
        return self.sets[""]

    @property
    def steps_per_epoch(self) -> int:
        return dataset.steps_per_epoch(len(self.data.train), self.config, self.world.size)


def setup_run(config: Config, world: World, source: Path | None, progress: Progress, stage: int | None = None) -> Run:
    """Loads the model and the data, and opens the log. Writes to the run's folder last, when all else has succeeded.

    stage: the stage that an only_eval run evaluates at; None for a training run.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    seed_everything(config.seed)  # all ranks initialise new weights alike
    loaded = parallel.load(config, world, source)
    sets, by_set = {}, config.by_set()
    for name, set_config in by_set.items():
        sets[name] = data = data_files.load_data(set_config, world, loaded.tokenizer)  # a training run has one set
    ranks.check_same(world, read_by_rank(config, loaded, sets) if world.size > 1 else {})  # all ranks
    for name, set_config in by_set.items():
        data_files.check_ids(set_config, len(loaded.model.base_causallm.get_input_embeddings().weight), sets[name])
        data_files.check_lengths(set_config, loaded.model.max_positions, sets[name], stage)
    if progress.token_ids not in (None, data.train_digest) and not config.continue_changed:
        raise UserError(
            f"{source} was trained on other data than {config.train_path} now holds: choose another name, or set "
            f"continue_changed=true"
        )
    progress.token_ids = data.train_digest
    _forget_other_scores(progress, config, data.val_digest)
    progress.begun = config.resume if progress.begun is None else progress.begun
    if source is not None and not progress.step:
        progress.started_from = str(source)
    logger = RunLogger(config.run_dir / "eval" if config.only_eval else config.run_dir)
    # before the log is opened: an exception after that would have to close it
    ends = (max(progress.epoch, config.resume), config.num_epochs - 1)  # epochs of the longest and shortest reasoning
    stages = [curriculum.stage_of(config, epoch) for epoch in ends] if stage is None else [stage]
    for name, set_config in by_set.items():
        with ranks.agree(world):  # all ranks
            if world.is_main:
                for text in evaluate.warn_unscorable_answers(loaded.tokenizer, sets[name], set_config, stages):
                    log.warning(text)

    def open_log() -> str | None:
        values = dataclasses.asdict(config)
        notes = versions(source, sets) if config.only_eval else notes_of_training(config)
        if config.only_eval:
            keep_results(logger.folder, values, str(source), notes)
        write_config(values, logger.folder, world.size, ranks.hardware(world), **notes)
        return logger.open(values, progress.wandb_id)

    progress.wandb_id = ranks.on_main_rank(world, open_log)  # all ranks
    return Run(config, world, loaded, sets, logger, progress)


def _forget_other_scores(progress: Progress, config: Config, val_digest: str | None) -> None:
    """Clears the accuracies in `progress` if they were measured otherwise than from now on, with a warning."""
    names = ["answer_match", "max_eval_examples", "eval_latents_from_steps", *GENERATION_KEYS]
    now = {"val_path": val_digest, **{name: getattr(config, name) for name in names}}
    now["max_new_tokens"] = config.n_new_tokens
    before, progress.scored_by = progress.scored_by or now, now
    if changed := [name for name in now if name in before and before[name] != now[name]]:
        progress.best, progress.at_goal = {}, 0
        log.warning(
            f"{' and '.join(changed)} changed: accuracies differ from those of earlier epochs. save_only_improve "
            f"and advance_at begin anew, but RUN@best compares all of them"
        )


def versions(source: Path, sets: dict[str, Data]) -> dict[str, str]:
    """Returns what identifies the files of an evaluation beside their names: they may change."""
    weights = [*source.glob("*.safetensors")] if source.is_dir() else [source]
    changed = max((path.stat().st_mtime for path in weights), default=0.0)
    found = {f"SHA-256 of val_path {name}".strip(): data.val_digest for name, data in sets.items()}
    return {"weights changed at": f"{changed:.6f}", **found}


def notes_of_training(config: Config) -> dict[str, str]:
    """Returns what a model card says of a training run's files, which may be elsewhere by then."""
    found = {"SHA-256 of train_path": content_digest(config.train_path)}
    return found | ({"base model": "a folder"} if Path(config.model_id).exists() else {})


def read_by_rank(config: Config, loaded: Pretrained, sets: dict[str, Data]) -> dict[str, str]:
    """Returns short digests of the files that this rank has read. Sharded weights come from rank 0; other weights are
    compared by a few digits, because different processors may round the rows of new tokens differently."""
    found = {f"the SHA-256 of val_path {name}".strip(): data.val_digest for name, data in sets.items()}
    if not config.only_eval:
        files = [key.name for key in dataclasses.fields(Config) if key.metadata["file"]]
        for name in ["train_path", *(name for name in files if Path(getattr(config, name)).is_file())]:
            found[f"the SHA-256 of {name}"] = content_digest(getattr(config, name))
    shape = loaded.model.base_causallm.config.to_dict() | {"_name_or_path": None}
    for name, value in (("vocabulary", loaded.tokenizer.get_vocab()), ("model's config.json", shape)):
        found[f"the SHA-256 of the {name}"] = hashlib.sha256(repr(sorted(value.items())).encode()).hexdigest()
    found = {name: digest[:16] for name, digest in found.items()}
    found["the ids of markers and EOS"] = str(tuple(loaded.markers))
    if not parallel.is_sharded(loaded.model):
        norm, sums = 0.0, 0.0  # the sums depend on signs and order
        for weight in loaded.model.parameters():
            rows = weight.detach().reshape(len(weight), -1) if weight.ndim else weight.detach().reshape(1, 1)
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            signed = norms + rows.sum(dim=1, dtype=torch.float64)
            norm, sums = norm + norms.norm(), sums + signed @ torch.arange(len(rows), device=rows.device).double().cos()
        found["the norm of the weights"] = f"{norm:.9e} {sums / norm:.5f}"
    return found


def announce(run: Run, newest: Path | None) -> None:
    """Logs model, device, batch arithmetic, data and starting point of a training run."""
    config, world, progress = run.config, run.world, run.progress
    accumulation, size = config.micro_batches(world.size)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    how = "fsdp" if parallel.is_sharded(run.model) else "ddp" if world.size > 1 else "one process"
    log.info(
        f"{config.name}: {config.method}, {parameters:,} parameters, on {world.size} x {world.device.type} ({how}): "
        f"{world.reason}"
    )
    log.info(
        f"global batch {accumulation * world.size * size} = {world.size} ranks x "
        f"{size} examples x {accumulation} micro-batches; {run.steps_per_epoch} steps an epoch, "
        f"{len(run.data.train)} training and {len(run.data.val)} validation examples"
    )
    if world.is_main and not config.debug:
        announce_disk(run)
    if newest is not None:
        within = f" and {progress.seen} examples" if progress.seen else ""
        log.info(f"continuing from {newest}, after {progress.epoch} of {config.num_epochs} epochs{within}")
        if config.load_model_path is not None:
            log.info("(ignoring load_model_path, from which the run began: its own checkpoint is newer)")
    elif progress.started_from is not None:
        log.info(f"starting from the weights of {progress.started_from}")
    if newest is None and progress.epoch:
        if config.load_model_path is None:
            log.warning("resume skips epochs, but no load_model_path names a model that was trained for them")
        stage = curriculum.stage_name(curriculum.stage_of(config, progress.epoch))
        log.info(f"starting with epoch {progress.epoch}, stage {stage} (resume)")


def announce_disk(run: Run) -> None:
    """Logs the disk space of the run's checkpoints; warns if the disk has less."""
    sizes = [(weight.numel() * weight.itemsize, weight.requires_grad) for weight in run.model.parameters()]
    weights, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    needed = checkpoint_bytes(run.config, weights, trained)
    there = sum(path.stat().st_size for path in run.config.run_dir.rglob("*") if path.is_file())
    free = free_bytes(run.config.run_dir)
    log.info(f"checkpoints take at most {needed / 1e9:.3g} GB")
    if needed - there > free:
        log.warning(
            f"{run.config.save_path} has {free / 1e9:.3g} GB free, and the checkpoints of this run may take "
            f"{(needed - there) / 1e9:.3g} GB more: see keep_checkpoints"
        )


def checkpoint_bytes(config: Config, weights: int, trained: int) -> int:
    """Returns the most disk space that a run's checkpoints take, in bytes, given the bytes of all and of the trained
    weights: the epoch checkpoints, two of them with AdamW's two averages, two step checkpoints, and a new one.
    """
    finished = config.num_epochs - config.resume
    kept = min(finished, config.keep_checkpoints + 2) if config.keep_checkpoints else finished
    return (kept + 3) * weights + 5 * 2 * trained
