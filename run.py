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

import json
import math
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader
from transformers.utils import logging

from checkpoint import (
    Progress,
    changes,
    damage,
    differences,
    load_optimizer,
    load_random_state,
    newest_whole,
    read_description,
    read_progress,
    remove_restarts,
    resolve,
    restart_name,
    save,
)
from coconut import Coconut
from dataset import (
    EpochPlan,
    Markers,
    MicroBatch,
    PlannedBatches,
    StageDataset,
    Tokens,
    cache_tokens,
    collate_for_device,
    example_order,
    kept_reasoning,
    load_examples,
    longest_sequence,
    optimizer_is_reset,
    sequence_lengths,
    stage_name,
    stage_of,
    stage_of_example,
    stage_of_step,
    steps_per_epoch,
)
from evaluate import as_files, autocast, evaluate, summary
from parallel import gather_weights, gradients_meet, is_sharded, load, whole_weights, wrap
from throughput import FlopCounter, Throughput, peak_flops
from utils import (
    Config,
    Interruption,
    RunLogger,
    UserError,
    World,
    cleanup_distributed,
    folder_of_one,
    ignore_signals,
    leave,
    on_main_rank,
    progress_bar,
    report,
    seed_everything,
    setup_distributed,
    under_debugger,
    write_config,
)

DEBUG_EXAMPLES = {"train": 5000, "val": 32}
INTERRUPTED_FILE = "INTERRUPTED_FILE"  # a run that a signal has stopped creates the file that this variable names


@dataclass
class Data:
    """What is trained or evaluated on: tokens of either file, and the examples themselves for the evaluation."""

    val_examples: list[dict]
    val: Tokens
    train: Tokens | None = None
    train_digest: str | None = None


class Step(NamedTuple):
    """A step that has not been written to the log: what is still on the device, and what it was made of."""

    loss: torch.Tensor  # this rank's share, scalar
    lr: float
    stage: int
    passes: list[tuple[list[int], torch.Tensor]]  # (examples, mean loss) of each of this rank's micro-batches


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
    interruption: Interruption | None = None
    throughput: Throughput | None = None
    wrapped: torch.nn.Module | None = None  # the model as it is called in training: DDP's, or the model itself
    optimizer: torch.optim.Optimizer | None = None
    unlogged: list[Step] = field(default_factory=list)  # since the last write to the log
    saved: Path | None = None  # the newest checkpoint


@record
def main(config: Config) -> int:
    """Trains, or evaluates only; returns the exit code."""
    try:
        world = setup_distributed()
        if config.only_eval:
            evaluate_only(config, world)
        else:
            with folder_of_one(world, config.run_dir), Interruption(world) as interruption:
                train(config, world, interruption)
    except UserError as error:
        return report(error)
    finally:
        cleanup_distributed()
    return 0


def train(config: Config, world: World, interruption: Interruption) -> None:
    """The whole curriculum: train an epoch, validate, save; from the newest checkpoint where there is one."""
    checkpoint = find_checkpoint(config, world)
    progress = read_progress(checkpoint) if checkpoint is not None else Progress()
    run = prepare(config, world, checkpoint or find_weights(config, world), progress)
    run.interruption, run.saved = interruption, checkpoint
    run.throughput = Throughput(FlopCounter.of(run.model), peak_flops(world.device))
    run.wrapped = wrap(run.model, world)
    restore(run, checkpoint)
    announce(run, checkpoint)
    for epoch in range(run.progress.epoch, config.num_epochs):
        stage = train_epoch(run, epoch)
        if interruption.settle():
            stop(run, stage)
            return
        if config.save_every_steps:
            save_checkpoint(run, stage)  # validation may take long
        metrics, predictions = validate(run, epoch, stage)
        save_if_due(run, epoch, stage, metrics, predictions)
        if epoch + 1 < config.num_epochs and interruption.asked() | interruption.settle():
            say_interrupted(run)
            return
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
    gather_weights(run.model)  # all ranks
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
    """The newest whole checkpoint of this run, which wins over load_model_path; all ranks get the same.

    Raises UserError where it is of a run with another configuration.
    """

    def find() -> Path | None:
        checkpoint = newest_whole(config.run_dir, lambda text: print(text, file=sys.stderr, flush=True))
        if checkpoint is None:
            return None
        others = differences(config, checkpoint)
        if not config.continue_changed:
            others = changes(config, config.run_dir) | others
        if others:
            hint = "" if differences(config, checkpoint) else ", or set continue_changed=true"
            raise UserError(
                f"{checkpoint} is of another configuration ({'; '.join(others.values())}): choose another name{hint}"
            )
        return checkpoint

    return on_main_rank(world, find)


def find_weights(config: Config, world: World) -> Path | None:
    """What load_model_path points to, if it is set; all ranks get the same."""

    def find() -> Path | None:
        path = resolve(config.load_model_path) if config.load_model_path else None
        if path is not None and (path / "trainer").is_dir() and (problem := damage(path)):
            raise UserError(f"load_model_path {str(path)!r} is damaged: {problem}")
        return path

    return on_main_rank(world, find)


def prepare(config: Config, world: World, source: Path | None, progress: Progress) -> Run:
    """Model, data and log of a run. The run's folder is touched only when all else has succeeded."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    seed_everything(config.seed)  # every rank makes the same new weights
    model, tokenizer, markers = load(config, world, source)
    data = load_data(config, world, tokenizer)
    check_lengths(config, model.max_positions, data)
    if progress.data not in (None, data.train_digest) and not config.continue_changed:
        raise UserError(
            f"{source} was trained on other data than {config.train_path} now holds: choose another name, or set "
            f"continue_changed=true"
        )
    progress.data = data.train_digest
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

    def tokens_of(path: str, limit: int | None) -> Path:
        return on_main_rank(world, lambda: cache_tokens(path, tokenizer, cache, limit))

    data = Data(val_examples, Tokens.open(tokens_of(config.val_path, limits["val"])))
    if not config.only_eval:
        folder = tokens_of(config.train_path, limits["train"])
        data.train, data.train_digest = Tokens.open(folder), folder.name
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
    # ranks draw different dropout, and other than before where a checkpoint has no random state for so many ranks
    seed_everything(run.config.seed, run.world.rank, run.progress.step)
    if checkpoint is not None:
        load_optimizer(checkpoint, run.model, run.optimizer)
        for group in run.optimizer.param_groups:
            group["weight_decay"] = run.config.weight_decay  # may differ where continue_changed is set
        if not load_random_state(checkpoint, run.world):
            run.logger.say("the number of ranks has changed: dropout goes on with new random numbers")
    elif run.config.resume:
        n_steps = steps_per_epoch(len(run.data.train), run.config, run.world.size)
        run.progress.epoch = run.config.resume
        run.progress.step = run.config.resume * n_steps  # so that curves and schedules are those of the whole run


def announce(run: Run, checkpoint: Path | None) -> None:
    """Says what is about to happen."""
    config, world, progress = run.config, run.world, run.progress
    accumulation, size = config.passes(world.size)
    n_steps = steps_per_epoch(len(run.data.train), config, world.size)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    say = run.logger.say
    how = "fsdp" if is_sharded(run.model) else "ddp" if world.size > 1 else "one process"
    say(f"{config.name}: {config.method}, {parameters:,} parameters, on {world.size} x {world.device.type} ({how})")
    say(
        f"global batch {accumulation * world.size * size} = {world.size} ranks x "
        f"{size} examples x {accumulation} passes; {n_steps} steps an epoch, "
        f"{len(run.data.train)} training and {len(run.data.val)} validation examples"
    )
    if checkpoint is not None:
        within = f" and {progress.seen} examples" if progress.seen else ""
        say(f"continuing from {checkpoint}, after {progress.epoch} of {config.num_epochs} epochs{within}")
        if config.load_model_path is not None:
            say("(load_model_path is where the run began; its own checkpoint is newer)")
    elif progress.epoch:
        if config.load_model_path is None:
            say("warning: resume skips epochs, but there is no load_model_path with a model that has had them")
        say(f"starting with epoch {progress.epoch}, stage {stage_of(config, progress.epoch)}, as resume says")


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------


def train_epoch(run: Run, epoch: int) -> int:
    """One pass over the training set, or over what an interrupted one has left of it. Returns the stage that it ended
    with. It ends early where the ranks have agreed to stop (see Interruption)."""
    config, world, markers, progress = run.config, run.world, run.markers, run.progress
    n_steps = steps_per_epoch(len(run.data.train), config, world.size)
    plan = EpochPlan(order_of_epoch(run, epoch), config, world.rank, world.size, progress.seen)
    first = n_steps - len(plan)
    stages = [stage_of_step(config, epoch, step, n_steps) for step in range(n_steps)]
    loader = DataLoader(
        StageDataset(run.data.train, config, markers, epoch),
        batch_sampler=PlannedBatches(plan, stages[first:]),
        collate_fn=partial(collate_for_device, pad_token_id=markers.eos, latent_token_id=markers.latent),
        num_workers=0 if under_debugger() else config.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # the loader draws its workers' seeds: not from the stream that dropout uses
    )
    batches = iter(loader)
    begin, before = time.perf_counter(), progress.seconds
    run.throughput.start()
    run.wrapped.train()
    bar = progress_bar(plan, f"epoch {epoch} stage {stage_name(stages[-1])}", "step", shown=world.is_main)
    for step, planned in enumerate(bar, start=first):
        if optimizer_is_due(run, epoch, step, n_steps):
            run.optimizer = make_optimizer(run)
        lr = config.lr * lr_factor(config, epoch, step, n_steps)
        loss, passes = train_step(run, planned.micro_batches, batches, lr)
        run.unlogged.append(Step(loss, lr, stages[step], passes))
        progress.seen += planned.n_examples
        is_last = step + 1 == n_steps
        save_now = not is_last and config.save_every_steps and progress.step % config.save_every_steps == 0
        stop_now = run.interruption.asked()
        if progress.step % config.log_every_steps == 0 or is_last or save_now or stop_now:
            losses = log_steps(run, epoch)
            progress.losses += sum(loss for loss in losses if math.isfinite(loss))
            progress.seconds = before + time.perf_counter() - begin
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        if stop_now:
            break
        if save_now:
            save_checkpoint(run, stages[step])
            run.throughput.start()
    bar.close()
    return stages[-1]


def order_of_epoch(run: Run, epoch: int) -> np.ndarray:
    """The training examples as an epoch takes them: in random order, or with group_by_length in random groups."""
    config, train = run.config, run.data.train
    lengths = sequence_lengths(train, config, stage_of(config, epoch)) if config.group_by_length else None
    return example_order(len(train), config, epoch, lengths)


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
    for index in EpochPlan(order_of_epoch(run, last_epoch), config, 0, run.world.size).examples(last_step):
        steps = train[index][1]
        stage = stage_of_example(config, last_stage, last_epoch, index, len(steps))
        if kept_reasoning(steps, stage, config):
            return True
    return False


def train_step(run: Run, micro_batches: list[MicroBatch], batches, lr: float) -> tuple[torch.Tensor, list]:
    """Forward and backward of each micro-batch, then one optimizer step. Gradients meet at the last backward.

    Returns this rank's share of the step's loss, and of each micro-batch its examples and its own loss: scalars that
    are still on the device.
    """
    config, world = run.config, run.world
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    step_loss, passes = torch.zeros((), device=world.device), []
    for number, micro in enumerate(micro_batches):
        begin = time.perf_counter()
        batch = next(batches)
        run.throughput.waiting += time.perf_counter() - begin
        run.throughput.add(batch["attention_mask"].sum(dim=1).tolist(), len(batch["supervised"]))
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = value.to(world.device, non_blocking=True)
        with gradients_meet(run.wrapped, now=number + 1 == len(micro_batches)):
            with autocast(config, world):
                loss = run.wrapped(**batch).loss
            (loss * micro.weight).backward()  # all ranks, where it is the last: gradients are averaged
        passes.append((micro.indices, loss.detach()))
        step_loss += loss.detach() * micro.weight
    norm = None
    if config.max_grad_norm is not None or config.skip_nonfinite:
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
    if config.skip_nonfinite and not is_finite(norm, step_loss):
        run.progress.skipped += 1
    else:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    return step_loss, passes


def is_finite(norm: torch.Tensor, loss: torch.Tensor) -> bool:
    """Whether the gradient and all ranks' losses are. Collective, and it waits for the device."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # all ranks, where it is sharded
    both = loss + norm
    dist.all_reduce(both)  # all ranks
    return bool(both.isfinite())


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
    """Writes the losses since the last call, each the mean over the step's examples on all ranks; returns them.

    Raises UserError on every rank where one is not finite, unless skip_nonfinite is set.
    """
    losses = torch.stack([step.loss for step in run.unlogged])
    dist.all_reduce(losses)  # all ranks: each holds its share of every step's loss
    losses = (losses / run.world.size).tolist()
    speed = run.throughput.report(run.world.size)  # all ranks
    first = run.progress.step - len(losses) + 1
    for number, (loss, step) in enumerate(zip(losses, run.unlogged, strict=True), start=first):
        if not math.isfinite(loss):
            report_nonfinite(run, epoch, number, loss, step)
        run.logger.log("step", step=number, epoch=epoch, stage=step.stage, loss=loss, lr=step.lr, **speed)
    run.unlogged.clear()
    return losses


def report_nonfinite(run: Run, epoch: int, number: int, loss: float, step: Step) -> None:
    """Writes down which examples made the loss of a step NaN or infinite, and stops the run, or not: skip_nonfinite.
    Collective: every rank must call it."""
    mine = [index for indices, value in step.passes if not value.isfinite() for index in indices]
    shares: list = [None] * run.world.size
    dist.all_gather_object(shares, mine)  # all ranks
    examples = sorted(index for share in shares for index in share)
    file = run.config.run_dir / "nonfinite.jsonl"
    if run.world.is_main:
        record = {"epoch": epoch, "step": number, "loss": str(loss), "examples": examples}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
    if run.config.skip_nonfinite:
        run.logger.say(f"warning: the loss of step {number} is {loss}: left out, its examples are in {file}")
        return
    raise UserError(
        f"the loss of step {number}, in epoch {epoch}, is {loss}; the examples of its passes are in {file}; "
        f"the last good checkpoint is {run.saved or 'none'}; try a lower lr, max_grad_norm, or skip_nonfinite=true"
    )


def validate(run: Run, epoch: int, stage: int) -> tuple[dict, list[dict]]:
    """Evaluates after an epoch, and says and logs the result together with the epoch's training."""
    progress = run.progress
    n_steps = steps_per_epoch(len(run.data.train), run.config, run.world.size)
    trained = {"train_loss": progress.losses / n_steps, "train_seconds": progress.seconds}
    if run.config.skip_nonfinite:
        trained["skipped"] = progress.skipped
    gather_weights(run.model)  # all ranks: what follows they do at their own pace
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
    """Saves after every epoch. With save_only_improve, an epoch whose accuracy is not the best of its stage so far
    leaves a checkpoint for a restart only."""
    progress = run.progress
    progress.epoch = epoch + 1
    progress.seen, progress.losses, progress.seconds = 0, 0.0, 0.0
    improved = metrics["accuracy"] > progress.best.get(stage, -1.0)
    if improved:
        progress.best[stage] = metrics["accuracy"]
    keep = improved or not run.config.save_only_improve
    save_checkpoint(run, stage, as_files(metrics, predictions) if keep else None)


def save_checkpoint(run: Run, stage: int, files: dict[str, str] | None = None) -> None:
    """Saves this moment; with `files`, that of a finished epoch. Collective: every rank must call it."""
    if run.config.debug:
        return
    if files is None and run.saved is not None and run.saved.name == restart_name(run.progress):
        return  # nothing has happened since
    if not run.config.skip_nonfinite and not weights_are_finite(run):
        raise UserError(
            f"the weights after step {run.progress.step} are not finite and not saved; the last good checkpoint is "
            f"{run.saved or 'none'}; try a lower lr, max_grad_norm, or skip_nonfinite=true"
        )
    weights = whole_weights(run.model)  # all ranks
    run.saved = save(
        run.config, run.world, run.progress, run.model, weights, run.tokenizer, run.markers, stage, run.optimizer, files
    )


def weights_are_finite(run: Run) -> bool:
    """Whether all ranks' weights are. A loss tells of the weights before its step only. Collective."""
    shares = [getattr(parameter, "_local_tensor", parameter) for parameter in run.model.parameters()]
    finite = torch.stack([share.isfinite().all() for share in shares]).all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)  # all ranks
    return bool(finite)


def stop(run: Run, stage: int) -> None:
    """Saves, because a signal has announced the end of this job; the next one goes on from here."""
    save_checkpoint(run, stage)
    say_interrupted(run)


def say_interrupted(run: Run) -> None:
    """Ends the log of a run that has been saved and is to be continued."""
    if run.saved is not None:
        run.logger.say(f"stopped by a signal; start the same command again to continue from {run.saved}")
        if run.world.is_main and (file := os.environ.get(INTERRUPTED_FILE)):
            Path(file).touch()
    run.logger.close()


def finish(run: Run) -> None:
    """Closes the log, removes what only a restart would need, and prints the run's table."""
    run.logger.close()
    if run.world.is_main:
        if not run.config.only_eval:
            remove_restarts(run.config.run_dir)
        print(summary(run.config.run_dir), flush=True)


if __name__ == "__main__":
    leave(main(CONFIG))
