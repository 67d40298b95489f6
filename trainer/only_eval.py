"""Runs with only_eval: evaluation without training."""

from __future__ import annotations

import torch

import curriculum
from config import Config
from trainer import checkpoint, evaluate, parallel
from trainer import distributed as ranks
from trainer.distributed import World
from trainer.pretrained import read_description
from trainer.setup import setup_run
from utils import UserError, log, print_result


def evaluate_only(config: Config, world: World) -> None:
    """Evaluates load_model_path on each file of val_path; writes the results to save_path/name/eval."""
    source = checkpoint.find_weights(config, world)
    warnings = checkpoint.check_method(config, source)
    stage, more = stage_to_evaluate(config, read_description(source))
    run = setup_run(config, world, source, checkpoint.Progress(), stage)
    if not parallel.weights_are_finite(run.model):  # all ranks
        raise UserError.of_all(f"the weights of {source} are not finite")
    sets, results, evaluate_set = config.by_set(), {}, run.parts.validate or evaluate.evaluate
    warnings += more + checkpoint.warn_if_seen(source, {sets[n].val_path: run.sets[n].val_digest for n in sets})
    with run.logger:
        for text in warnings:
            log.warning(text)
        parallel.gather_weights(run.model)  # all ranks
        if parallel.is_sharded(run.model):  # FSDP's first pass must be a whole one, also of a rank without questions
            run.model.generate(torch.zeros((1, 1), dtype=torch.int64, device=world.device), max_new_tokens=0)
        for name, set_config in sets.items():  # all ranks evaluate their share of each set
            data = run.sets[name]
            where = f"at stage {curriculum.stage_name(stage)} on {set_config.val_path} ({len(data.val)} examples)"
            log.info(f"evaluating {source} {where}")
            metrics, predictions = evaluate_set(run.pretrained, data, stage, set_config, world, "evaluating")
            metrics |= {"stage": stage, "checkpoint": str(source), "file": set_config.val_path}
            results[name] = metrics, predictions
        with ranks.agree(world):  # all ranks
            if world.is_main:
                metrics, files = evaluate.of_sets(results)
                try:
                    evaluate.write_results(config.run_dir / "eval", files)
                finally:  # printed even if the disk is full
                    print_result(evaluate.summary(config.run_dir, metrics))
                for name, (metrics, _) in results.items():
                    run.logger.log(f"eval/{name}" if name else "eval", **metrics)


def stage_to_evaluate(config: Config, description: dict) -> tuple[int, list[str]]:
    """Returns the stage to evaluate at, and warnings: the checkpoint's own stage, unless `resume` names an epoch. A
    folder or file without a stage, such as a reference checkpoint, is evaluated at the last one."""
    recorded, scheduled = description.get("stage"), curriculum.stage_of(config, config.resume)
    if config.resume:
        if recorded in (None, scheduled):
            return scheduled, []
        theirs, asked = curriculum.stage_name(recorded), curriculum.stage_name(scheduled)
        return scheduled, [f"the checkpoint's stage is {theirs}, but resume={config.resume} asks for {asked}"]
    if recorded is not None:
        return recorded, []
    last = curriculum.stage_of(config, config.num_epochs - 1)
    text = (
        f"{config.load_model_path} records no stage: evaluating at the last one of this configuration, "
        f"{curriculum.stage_name(last)}; resume=EPOCH chooses the stage of that epoch"
    )
    return last, [] if config.method in ("cot", "no_cot") else [text]
