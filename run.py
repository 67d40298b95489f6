"""Trains and evaluates Coconut, and the methods it is compared with, as one YAML file says.

    torchrun --nproc_per_node 4 run.py args/gsm_coconut.yaml
    python run.py args/quickstart.yaml num_epochs=1               # one process; any key can be set like this

A run continues from the newest checkpoint in its folder, save_path/name, where there is one.
"""

import sys

from dataset import schedule
from utils import configure

if __name__ == "__main__":
    CONFIG = configure(__doc__, schedule)  # --help and mistakes are answered before the slow imports below

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.utils import logging

from checkpoint import (
    Progress,
    checkpoints,
    differences,
    load_model,
    load_optimizer,
    load_random_state,
    read_description,
    read_progress,
    resolve,
    save,
)
from coconut import Coconut
from dataset import (
    Markers,
    MicroBatch,
    StageDataset,
    Tokens,
    cache_tokens,
    collate_for_device,
    epoch_plan,
    examples_of_steps,
    kept_reasoning,
    load_examples,
    longest_sequence,
    optimizer_is_reset,
    stage_name,
    stage_of,
    stage_of_example,
    stage_of_step,
)
from evaluate import as_files, autocast, evaluate, summary
from utils import (
    Config,
    RunLogger,
    UserError,
    World,
    cleanup_distributed,
    on_main_rank,
    progress_bar,
    report,
    seed_everything,
    setup_distributed,
    write_config,
)

DEBUG_EXAMPLES = {"train": 5000, "val": 32}


@dataclass
class Data:
    """What is trained or evaluated on: tokens of either file, and the examples themselves for the evaluation."""

    val_examples: list[dict]
    val: Tokens
    train: Tokens | None = None


@dataclass
class Run:
    """All that the steps of a run share."""

    config: Config
    world: World
    model: Coconut
    tokenizer: object
    markers: Markers
    data: Data
    logger: RunLogger
    progress: Progress
    wrapped: torch.nn.Module | None = None  # the model as it is called in training: DDP's, or the model itself
    optimizer: torch.optim.Optimizer | None = None
    # (loss, lr, stage) of the steps since the last write to the log
    unlogged: list[tuple[torch.Tensor, float, int]] = field(default_factory=list)


def main(config: Config) -> int:
    """Trains, or evaluates only; returns the exit code."""
    try:
        world = setup_distributed()
        if config.only_eval:
            evaluate_only(config, world)
        else:
            train(config, world)
    except UserError as error:
        return report(error)
    finally:
        cleanup_distributed()
    return 0


def train(config: Config, world: World) -> None:
    """The whole curriculum: train an epoch, validate, save; from the newest checkpoint where there is one."""
    checkpoint = find_checkpoint(config, world)
    if checkpoint is not None and (others := differences(config, checkpoint)):
        raise UserError(f"{checkpoint} is of another configuration ({'; '.join(others.values())}): choose another name")
    progress = read_progress(checkpoint) if checkpoint is not None else Progress()
    run = prepare(config, world, checkpoint or find_weights(config, world), progress)
    wrap(run)
    seed_everything(config.seed, world.rank)  # ranks draw different dropout
    restore(run, checkpoint)
    announce(run, checkpoint)
    for epoch in range(run.progress.epoch, config.num_epochs):
        stage, trained = train_epoch(run, epoch)
        metrics, predictions = validate(run, epoch, stage, trained)
        save_if_due(run, epoch, stage, metrics, predictions)
    finish(run)


def evaluate_only(config: Config, world: World) -> None:
    """Evaluates load_model_path on val_path; results go to save_path/name/eval."""
    source = find_weights(config, world)
    others = differences(config, source)
    if {"method", "thought"} & others.keys():
        raise UserError(f"{source} is of another configuration ({'; '.join(others.values())})")
    run = prepare(config, world, source, Progress())
    for text in others.values():
        run.logger.say(f"warning: {source} is of another configuration: {text}")
    description = read_description(source) or {}
    stage = stage_to_evaluate(config, description, run.logger)
    run.logger.say(f"evaluating {source} at stage {stage} on {config.val_path} ({len(run.data.val)} examples)")
    metrics, predictions = evaluate(
        run.model, run.tokenizer, run.data.val_examples, run.data.val, stage, config, run.markers, world, "evaluating"
    )
    metrics |= {"stage": stage, "checkpoint": str(source), "file": config.val_path}
    if world.is_main:
        for name, text in as_files(metrics, predictions).items():
            (config.run_dir / "eval" / name).write_text(text, encoding="utf-8")
    run.logger.log("eval", **metrics)
    finish(run)


# ---------------------------------------------------------------------------------------------------------------
# Before the first step
# ---------------------------------------------------------------------------------------------------------------


def find_checkpoint(config: Config, world: World) -> Path | None:
    """The newest whole checkpoint of this run, which wins over load_model_path; all ranks get the same."""
    return on_main_rank(world, lambda: next(reversed(checkpoints(config.run_dir)), None))


def find_weights(config: Config, world: World) -> Path | None:
    """What load_model_path points to, if it is set; all ranks get the same."""
    return on_main_rank(world, lambda: config.load_model_path and resolve(config.load_model_path))


def prepare(config: Config, world: World, source: Path | None, progress: Progress) -> Run:
    """Model, data and log of a run. The run's folder is touched only when all else has succeeded."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    seed_everything(config.seed)  # every rank makes the same new weights
    model, tokenizer, markers = load_model(config, source)
    model.to(world.device)
    data = load_data(config, world, tokenizer)
    check_lengths(config, model.max_positions, data)
    folder = config.run_dir / "eval" if config.only_eval else config.run_dir
    if world.is_main:
        write_config(config, folder, world.size)
    logger = RunLogger(config, world, folder, progress.wandb_id)
    progress.wandb_id = logger.wandb_id
    return Run(config, world, model, tokenizer, markers, data, logger, progress)


def load_data(config: Config, world: World, tokenizer) -> Data:
    """Rank 0 tokenizes, or finds the tokens of an earlier run; all ranks map the same files into memory."""
    cache = Path(config.save_path) / ".tokens"
    limits = {"train": config.max_train_examples, "val": config.max_eval_examples}
    if config.debug:
        limits = {name: min(limit or DEBUG_EXAMPLES[name], DEBUG_EXAMPLES[name]) for name, limit in limits.items()}
    val_examples = load_examples(config.val_path, limits["val"])

    def open_tokens(path: str, limit: int | None) -> Tokens:
        return Tokens.open(on_main_rank(world, lambda: cache_tokens(path, tokenizer, cache, limit)))

    data = Data(val_examples, open_tokens(config.val_path, limits["val"]))
    if not config.only_eval:
        data.train = open_tokens(config.train_path, limits["train"])
        if config.max_train_tokens is not None:
            data.train.leave_out_longer_than(config.max_train_tokens)
            if len(data.train) == 0:
                raise UserError(f"max_train_tokens {config.max_train_tokens} leaves no example of {config.train_path}")
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


def wrap(run: Run) -> None:
    """Puts the model under DDP where there are several ranks."""
    run.wrapped = run.model
    if run.world.size > 1:
        gpus = [run.world.local_rank] if run.world.device.type == "cuda" else None
        run.wrapped = DistributedDataParallel(run.model, device_ids=gpus)


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW with decay on every parameter, as in the reference."""
    config = run.config
    fused = run.world.device.type == "cuda"
    return torch.optim.AdamW(run.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def stage_to_evaluate(config: Config, description: dict, logger: RunLogger) -> int:
    """The checkpoint's own stage, unless `resume` names an epoch."""
    recorded = description.get("stage")
    scheduled = stage_of(config, config.resume)
    if recorded is None or (config.resume and recorded != scheduled):
        if recorded is not None:
            logger.say(
                f"warning: the checkpoint is of stage {recorded}, but resume {config.resume} asks for {scheduled}"
            )
        return scheduled
    return recorded


def restore(run: Run, checkpoint: Path | None) -> None:
    """Where the run goes on: optimizer and random state of its checkpoint, or the epoch that `resume` names."""
    run.optimizer = make_optimizer(run)
    if checkpoint is not None:
        load_optimizer(checkpoint, run.model, run.optimizer)
        load_random_state(checkpoint, run.world)
    elif run.config.resume:
        n_steps = len(epoch_plan(len(run.data.train), run.config, 0, 0, run.world.size))
        run.progress.epoch = run.config.resume
        run.progress.step = run.config.resume * n_steps  # so that curves and schedules are those of the whole run


def announce(run: Run, checkpoint: Path | None) -> None:
    """Says what is about to happen."""
    config, world, progress = run.config, run.world, run.progress
    accumulation, size = config.passes(world.size)
    n_steps = len(epoch_plan(len(run.data.train), config, 0, 0, world.size))
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    say = run.logger.say
    say(f"{config.name}: {config.method}, {parameters:,} parameters, on {world.size} x {world.device.type}")
    say(
        f"global batch {accumulation * world.size * size} = {world.size} ranks x "
        f"{size} examples x {accumulation} passes; {n_steps} steps an epoch, "
        f"{len(run.data.train)} training and {len(run.data.val)} validation examples"
    )
    if checkpoint is not None:
        say(f"continuing from {checkpoint}, after {progress.epoch} of {config.num_epochs} epochs")
        if config.load_model_path is not None:
            say("(load_model_path is where the run began; its own checkpoint is newer)")
    elif progress.epoch:
        if config.load_model_path is None:
            say("warning: resume skips epochs, but there is no load_model_path with a model that has had them")
        say(f"starting with epoch {progress.epoch}, stage {stage_of(config, progress.epoch)}, as resume says")


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------


def train_epoch(run: Run, epoch: int) -> tuple[int, dict]:
    """One pass over the training set. Returns the stage that it ended with, and train_loss, the mean of its steps,
    and train_seconds."""
    config, world, markers = run.config, run.world, run.markers
    plan = epoch_plan(len(run.data.train), config, epoch, world.rank, world.size)
    stages = [stage_of_step(config, epoch, step, len(plan)) for step in range(len(plan))]
    loader = DataLoader(
        StageDataset(run.data.train, config, markers, epoch),
        batch_sampler=[
            [(index, stage) for index in micro.indices]
            for stage, micro_batches in zip(stages, plan, strict=True)
            for micro in micro_batches
        ],
        collate_fn=partial(collate_for_device, pad_token_id=markers.eos, latent_token_id=markers.latent),
        num_workers=config.num_workers,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # the loader draws its workers' seeds: not from the stream that dropout uses
    )
    batches = iter(loader)
    begin, total = time.perf_counter(), 0.0
    run.wrapped.train()
    bar = progress_bar(plan, f"epoch {epoch} stage {stage_name(stages[-1])}", "step", shown=world.is_main)
    for step, micro_batches in enumerate(bar):
        if optimizer_is_due(run, epoch, step, len(plan)):
            run.optimizer = make_optimizer(run)
        lr = config.lr * lr_factor(config, epoch, step, len(plan))
        loss = train_step(run, micro_batches, batches, lr)
        run.unlogged.append((loss, lr, stages[step]))
        if run.progress.step % config.log_every_steps == 0 or step + 1 == len(plan):
            losses = log_steps(run, epoch)
            total += sum(losses)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return stages[-1], {"train_loss": total / len(plan), "train_seconds": time.perf_counter() - begin}


def optimizer_is_due(run: Run, epoch: int, step: int, n_steps: int) -> bool:
    """Whether AdamW is made anew before this step: with the epoch or the stage, as reset_optimizer says.

    icot's stage grows within an epoch; there it is made anew as long as the step before had reasoning tokens left.
    """
    config, train = run.config, run.data.train
    if config.method != "icot" or config.reset_optimizer != "stage":
        return step == 0 and optimizer_is_reset(config, epoch)
    last_epoch, last_step = (epoch, step - 1) if step else (epoch - 1, n_steps - 1)
    if last_epoch < 0:
        return False
    last_stage = stage_of_step(config, last_epoch, last_step, n_steps)
    if stage_of_step(config, epoch, step, n_steps) == last_stage:
        return False
    for index in examples_of_steps(len(train), config, last_epoch, run.world.size)[last_step]:
        steps = train[index][1]
        stage = stage_of_example(config, last_stage, last_epoch, index, len(steps))
        if kept_reasoning(steps, stage, config):
            return True
    return False


def train_step(run: Run, micro_batches: list[MicroBatch], batches, lr: float) -> torch.Tensor:
    """Forward and backward of each micro-batch, then one optimizer step. Gradients meet at the last backward.

    Returns this rank's share of the step's loss, a scalar that is still on the device.
    """
    config, world = run.config, run.world
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    step_loss = torch.zeros((), device=world.device)
    for number, micro in enumerate(micro_batches):
        batch = next(batches)
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = value.to(world.device, non_blocking=True)
        last = number + 1 == len(micro_batches)
        with nullcontext() if last or world.size == 1 else run.wrapped.no_sync():
            with autocast(config, world):
                loss = run.wrapped(**batch).loss * micro.weight
            loss.backward()  # all ranks, where it is the last: DDP averages the gradients
        step_loss += loss.detach()
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    return step_loss


def lr_factor(config: Config, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step of an epoch as a share of config.lr: linear warm-up from the first step that is
    trained, then constant, linear or cosine to 0."""
    step += (epoch - config.resume) * steps_per_epoch
    total_steps = (config.num_epochs - config.resume) * steps_per_epoch
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_scheduler]


def log_steps(run: Run, epoch: int) -> list[float]:
    """Writes the losses since the last call, each the mean over the step's examples on all ranks; returns them."""
    losses = torch.stack([loss for loss, _, _ in run.unlogged])
    dist.all_reduce(losses)  # all ranks: each holds its share of every step's loss
    losses = (losses / run.world.size).tolist()
    first = run.progress.step - len(losses) + 1
    for step, (loss, (_, lr, stage)) in enumerate(zip(losses, run.unlogged, strict=True), start=first):
        run.logger.log("step", step=step, epoch=epoch, stage=stage, loss=loss, lr=lr)
    run.unlogged.clear()
    return losses


def validate(run: Run, epoch: int, stage: int, trained: dict) -> tuple[dict, list[dict]]:
    """Evaluates after an epoch, and says and logs the result together with the epoch's training."""
    metrics, predictions = evaluate(
        run.model, run.tokenizer, run.data.val_examples, run.data.val, stage, run.config, run.markers, run.world
    )
    metrics = {"epoch": epoch, "stage": stage, **trained, **metrics}
    run.logger.log("epoch", step=run.progress.step, **metrics)
    run.logger.say(
        f"epoch {epoch:3} stage {stage_name(stage)}: train loss {metrics['train_loss']:.4f}, "
        f"validation loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, "
        f"tokens {metrics['generated_tokens']:.1f}, {metrics['train_seconds']:.0f} s + {metrics['seconds']:.0f} s"
    )
    return metrics, predictions


def save_if_due(run: Run, epoch: int, stage: int, metrics: dict, predictions: list[dict]) -> None:
    """Saves after every epoch; with save_only_improve, when accuracy is the best of its stage so far."""
    progress = run.progress
    progress.epoch = epoch + 1
    improved = metrics["accuracy"] > progress.best.get(stage, -1.0)
    if improved:
        progress.best[stage] = metrics["accuracy"]
    if run.config.debug or (run.config.save_only_improve and not improved):
        return
    save(
        run.config,
        run.world,
        progress,
        run.model,
        run.tokenizer,
        run.markers,
        stage,
        run.optimizer,
        as_files(metrics, predictions),
    )


def finish(run: Run) -> None:
    """Closes the log and prints the run's table."""
    run.logger.close()
    if run.world.is_main:
        print(summary(run.config.run_dir), flush=True)


if __name__ == "__main__":
    sys.exit(main(CONFIG))
