"""Trains and evaluates Coconut, and the methods it is compared with, as a YAML file configures.

    torchrun --nproc_per_node 4 run.py args/gsm_coconut.yaml
    python run.py args/quickstart.yaml num_epochs=1               # one process; key=value sets any key

A run continues from the newest checkpoint in its folder, save_path/name, if there is one.
"""

from config import Config, configure
from curriculum import schedule
from trainer.distributed import StopSignal
from trainer.plan import explains_out_of_memory, plan

if __name__ == "__main__":
    STOP = StopSignal.early()  # a cluster may send a signal during the slow imports below
    CONFIG = configure(__doc__, schedule, plan)  # before them, so that --help and configuration errors appear at once

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import curriculum
import dataset
from dataset import EpochPlan, PlannedStep
from trainer import checkpoint, evaluate, parallel
from trainer import data as data_files
from trainer import distributed as ranks
from trainer.checkpoint import Progress
from trainer.distributed import World
from trainer.only_eval import evaluate_only
from trainer.setup import Run, Step, announce, setup_run
from trainer.step_log import log_steps
from trainer.throughput import FlopCounter, Throughput, peak_flops
from utils import UserError, log, print_error, print_result, progress_bar, seed_everything


@record
def main(config: Config, stop: StopSignal | None = None) -> int:
    """Trains, or evaluates if only_eval is set; returns the exit code. stop: a StopSignal that is already active."""
    code = 1
    try:
        world = ranks.setup_distributed()
        ranks.check_same(world, vars(config))
        ranks.check_shared(world, Path(config.save_path))
        lock, memory = ranks.lock_run_dir(world, config.run_dir), explains_out_of_memory(config, world)
        with ranks.exits_with_others(world), lock, memory:
            if config.only_eval:
                evaluate_only(config, world)
            else:
                stop = stop or StopSignal()
                stop.world = world
                train(config, world, stop)
        code = 0
    except UserError as error:
        code = print_error(error)
    finally:
        ranks.cleanup_distributed(orderly=code == 0)
    return code


def train(config: Config, world: World, stop: StopSignal) -> None:
    """Runs the curriculum: trains, validates and saves each epoch, from the newest checkpoint if there is one."""
    newest = checkpoint.find_newest(config, world)
    progress = checkpoint.read_progress(newest) if newest is not None else Progress()
    run = setup_run(config, world, newest or checkpoint.find_weights(config, world), progress)
    run.stop, run.saved, run.logger.signalled = stop, newest, lambda: stop.received
    with stop, run.logger:  # an earlier signal ends the program (but see StopSignal.early)
        run.throughput = Throughput(FlopCounter.of(run.model), peak_flops(ranks.hardware(world), config.arithmetic))
        ranks.barrier(world)  # all ranks
        run.wrapped = parallel.wrap(run.model, world)
        resume(run, newest)
        announce(run, newest)
        ranks.barrier(world)  # all ranks: reading may take some longer
        while (epoch := run.progress.epoch) < config.num_epochs:
            if stop.requested(wait=True):  # all ranks
                announce_stop(run)
                return
            stage = train_epoch(run, epoch)
            save_checkpoint(run, stage)  # before the validation: a kill during it must not cost the epoch
            if stop.requested(wait=True):  # all ranks
                announce_stop(run)
                return
            metrics, predictions = validate(run, epoch, stage)
            save_epoch(run, epoch, stage, metrics, predictions)
        finish(run)


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """Returns AdamW with weight decay on every parameter, as in the reference."""
    config = run.config
    fused = run.world.device.type == "cuda"
    return torch.optim.AdamW(run.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def resume(run: Run, newest: Path | None) -> None:
    """Loads optimizer and random state of the newest checkpoint or, without one, skips to the epoch of `resume`."""
    run.optimizer = make_optimizer(run)
    # different dropout on each rank, and after a restart on another number of ranks, which loads no random state
    seed_everything(run.config.seed, run.world.rank, run.progress.step)
    if newest is not None:
        checkpoint.load_optimizer(newest, run.model, run.optimizer)  # all ranks
        for name in checkpoint.load_companions(newest, run.model):  # all ranks
            log.info(f"{newest} has no {name}: it is re-initialised")
        if not checkpoint.load_random_state(newest, run.world):
            log.info("the number of ranks has changed: dropout continues with new random numbers")
    elif run.config.resume:
        run.progress.epoch = run.config.resume
        run.progress.step = run.config.resume * run.steps_per_epoch  # curves start at this epoch's step


def train_epoch(run: Run, epoch: int) -> int:
    """Trains on the training set once, or on what is left of an interrupted epoch; returns the stage of the last step.
    Returns early when the ranks have agreed to stop (see StopSignal)."""
    config, progress, n_steps = run.config, run.progress, run.steps_per_epoch
    plan = plan_of_epoch(run, epoch, run.world.rank, progress.seen)
    first = n_steps - len(plan)
    stages = [curriculum.stage_of_step(config, epoch, step, n_steps) for step in range(n_steps)]
    examples = run.parts.dataset(run.data.train, config, run.pretrained.markers, epoch)
    run.wrapped.train()
    title = f"epoch {epoch} stage {curriculum.stage_name(stages[-1])}"
    with (
        dataset.batches_of(examples, plan, stages[first:]) as batches,
        progress_bar(plan, title, "step", shown=run.world.is_main) as bar,
    ):
        begin, before = time.perf_counter(), progress.seconds
        run.throughput.start()
        for step, planned in enumerate(bar, start=first):
            partly = step == 0 and progress.seen  # trained on fewer ranks, before a restart
            if not partly and curriculum.should_reset_optimizer(config, epoch, step, n_steps, partial(trained_on, run)):
                run.optimizer = make_optimizer(run)
            lr = config.lr * curriculum.lr_factor(config, progress.begun, epoch - progress.passed_over, step, n_steps)
            losses = train_step(run, planned, batches, lr)
            run.unlogged.append(Step(losses, run.grad_norm, lr, stages[step], plan.examples(step - first)))
            progress.seen += planned.n_examples
            is_last = step + 1 == n_steps
            save_now = not is_last and config.save_every_steps and progress.step % config.save_every_steps == 0
            stop_now = run.stop.requested()  # all ranks
            if progress.step % config.log_every_steps == 0 or is_last or save_now or stop_now:
                loss = log_steps(run, epoch)  # all ranks
                progress.seconds = before + time.perf_counter() - begin
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if stop_now:
                return stages[step]
            if save_now:
                save_checkpoint(run, stages[step])
                run.throughput.start()
    return stages[-1]


def plan_of_epoch(run: Run, epoch: int, rank: int, seen: int = 0) -> EpochPlan:
    """Returns the steps of a rank in an epoch, after the first `seen` examples."""
    config, train = run.config, run.data.train
    stage = curriculum.stage_of(config, epoch)
    lengths = data_files.sequence_lengths(train, config, stage) if config.group_by_length else None
    order = dataset.example_order(len(train), config, epoch, lengths)
    return EpochPlan(order, config, rank, run.world.size, seen)


def trained_on(run: Run, epoch: int, step: int):
    """Yields (index, [S_1..S_n]) of each example of a step, over all ranks."""
    for index in plan_of_epoch(run, epoch, rank=0).examples(step):
        yield index, run.data.train[index][1]


def train_step(run: Run, planned: PlannedStep, batches: Iterator[dict], lr: float) -> torch.Tensor:
    """Runs forward and backward of each micro-batch, then one optimizer step. Gradients are averaged across ranks in
    the last micro-batch's backward.

    Returns this rank's share of the step's losses, (2,) on the device: main and auxiliary; (1,) without the latter.
    """
    total = torch.zeros(2, device=run.world.device)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    for number, (batch, weights) in enumerate(weighted_batches(run, planned, batches), start=1):
        with parallel.sync_gradients(run.wrapped, now=number == len(planned.micro_batches)):
            with evaluate.autocast(run.config, run.world):
                output = run.wrapped(**batch)
            losses = [output.loss * weights[0]]
            if output.auxiliary is not None:
                losses.append(output.auxiliary * weights[1])
            sum(losses).backward()  # all ranks, in the last micro-batch
        for index, loss in enumerate(losses):
            total[index] += loss.detach()
    update_weights(run, total.sum())
    return total[: len(losses)]


def weighted_batches(run: Run, planned: PlannedStep, batches: Iterator[dict]) -> Iterator[tuple[dict, tuple]]:
    """Yields each micro-batch of a step, on the device, with the weights of its (main, auxiliary) loss.

    The weighted losses, summed over micro-batches and averaged over ranks, are a mean over the step's examples or, for
    a method that counts its losses' terms (StageDataset.counts_loss_terms), over these terms.
    """
    world, micro_batches = run.world, planned.micro_batches
    if not run.parts.dataset.counts_loss_terms:
        for _ in micro_batches:
            batch = next_batch(run, batches)
            weight = batch.pop("weight")
            yield batch, (weight, weight)
        return
    drawn = [next_batch(run, batches) for _ in micro_batches]
    counts = [batch.pop("loss_counts") for batch in drawn]
    # a rank without a share of the step runs an example that does not count
    counted = [count for count, micro in zip(counts, micro_batches, strict=True) if micro.weight]
    totals = [sum(count.get(name, 0) for count in counted) for name in ("loss", "auxiliary")]
    totals = torch.tensor(totals, dtype=torch.float32)  # on the CPU: a copy to a GPU would wait for it
    ranks.all_reduce(totals)  # all ranks
    for batch, count, micro in zip(drawn, counts, micro_batches, strict=True):
        main, auxiliary = world.size * (micro.weight > 0) / totals.clamp(min=1)
        weight = batch.pop("weight")
        yield batch, (count["loss"] * main if "loss" in count else weight, auxiliary)


def next_batch(run: Run, batches: Iterator[dict]) -> dict:
    """Returns the next micro-batch on the device, after the method's own `on_device` (methods.implementation)."""
    begin = time.perf_counter()
    batch = next(batches)
    run.throughput.waiting += time.perf_counter() - begin
    for sequences in dataset.sequences_in(batch) if batch["weight"] else ():
        run.throughput.add(sequences["attention_mask"].sum(dim=1).tolist(), len(sequences["supervised"]))
    return run.parts.on_device(run, dataset.to_device(batch, run.world.device))


def update_weights(run: Run, loss: torch.Tensor) -> None:
    """Clips the gradient and steps the optimizer. With skip_nonfinite, skips a non-finite loss or gradient instead."""
    config, run.grad_norm = run.config, None
    if config.max_grad_norm or config.skip_nonfinite:
        run.grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
    if config.skip_nonfinite and not parallel.step_is_finite(run.grad_norm, loss):
        run.progress.skipped += 1
    else:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1


def validate(run: Run, epoch: int, stage: int) -> tuple[dict, list[dict]]:
    """Evaluates after an epoch; logs the result together with the epoch's training loss and time."""
    progress = run.progress
    n_scored = progress.seen - progress.lost
    trained = {"train_loss": progress.losses / (n_scored or math.nan), "train_seconds": progress.seconds}
    trained |= {"skipped": progress.skipped} if run.config.skip_nonfinite else {}
    validate_epoch = run.parts.validate or evaluate.evaluate
    with parallel.gathered(run.model):  # all ranks: inside it they need no common pace
        metrics, predictions = validate_epoch(run.pretrained, run.data, stage, run.config, run.world)  # all ranks
    metrics = {"epoch": epoch, "stage": stage, **trained, **metrics}
    with ranks.agree(run.world):  # all ranks
        run.logger.log("epoch", step=progress.step, **metrics)  # writes on rank 0 only
    parts = ", ".join(f"{key[9:]} {value:.1%}" for key, value in metrics.items() if key.startswith("accuracy_"))
    log.info(
        f"epoch {epoch:3} stage {curriculum.stage_name(stage)}: train loss {metrics['train_loss']:.4f}, "
        f"validation loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}{parts and f' ({parts})'}, "
        f"tokens {metrics['generated_tokens']:.1f}, {metrics['train_seconds']:.0f} s + {metrics['seconds']:.0f} s"
    )
    return metrics, predictions


def save_epoch(run: Run, epoch: int, stage: int, metrics: dict, predictions: list[dict]) -> None:
    """Saves a finished epoch. With save_only_improve, one that is not the best of its stage gets a checkpoint for
    a restart only. Collective."""
    progress = run.progress
    progress.epoch, progress.at_goal = curriculum.next_epoch(run.config, epoch, metrics["accuracy"], progress.at_goal)
    progress.passed_over += progress.epoch - epoch - 1
    progress.seen, progress.losses, progress.lost, progress.seconds = 0, 0.0, 0, 0.0
    improved = metrics["accuracy"] > progress.best.get(stage, -1.0)
    if improved:
        progress.best[stage] = metrics["accuracy"]
    keep = improved or not run.config.save_only_improve
    save_checkpoint(run, stage, evaluate.as_files(metrics, predictions) if keep else None)


def save_checkpoint(run: Run, stage: int, files: dict[str, str] | None = None) -> None:
    """Saves a checkpoint for a restart or, with `files` (metrics and predictions), of a finished epoch. Collective."""
    if run.config.debug:
        return
    if files is None and run.saved is not None and run.saved.name == checkpoint.step_checkpoint_name(run.progress):
        return  # it is already saved
    if not run.config.skip_nonfinite and not parallel.weights_are_finite(run.model):  # all ranks
        raise UserError.of_all(
            f"the weights after step {run.progress.step} are not finite and not saved; the last good checkpoint is "
            f"{run.saved or 'none'}; try a lower lr, max_grad_norm, or skip_nonfinite=true"
        )
    run.wait_for_digests()
    run.saved = checkpoint.save(run.config, run.world, run.pretrained, run.optimizer, run.progress, stage, files)
    run.start_digests()


def announce_stop(run: Run) -> None:
    """Logs how to continue a run that a signal has stopped, and creates the file that slurm/common.sh checks."""
    run.logger.interrupted = True
    run.wait_for_digests()
    if not run.config.debug:
        then = f"continue from {run.saved}" if run.saved is not None else "begin"
        log.info(f"stopped by a signal; start the same command again to {then}")
        if run.world.is_main and (file := os.environ.get("INTERRUPTED_FILE")):
            with suppress(OSError):
                Path(file).touch()


def finish(run: Run) -> None:
    """Removes the checkpoints for a restart and prints the run's table."""
    run.wait_for_digests()
    if run.world.is_main:
        checkpoint.remove_step_checkpoints(run.config.run_dir)
        try:
            print_result(evaluate.summary(run.config.run_dir))
        except UserError as error:  # a damaged log must not fail a finished training
            log.warning(f"there is no table: {error}")


if __name__ == "__main__":
    ranks.run_main(main, CONFIG, STOP)
