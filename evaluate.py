"""How good a model is: validation loss, accuracy, CoT match, token counts; predictions on disk; a run's summary.

python evaluate.py checkpoints/quickstart         # prints the table of a run again
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from coconut import Coconut
from dataset import Markers, StageDataset, Tokens, collate, collate_prompts, kept_reasoning, prompt, stage_name
from utils import IGNORE, Config, UserError, World, progress_bar, read_log


def extract_answer(text: str) -> str:
    """The answer in a generated text: what follows its last '#', without commas (the reference's rule)."""
    return text.split("#")[-1].replace(",", "").strip()


def extract_steps(text: str) -> str:
    """The written reasoning in a generated text: what precedes its first '#'."""
    return text.split("#")[0].strip()


def evaluate(
    model: Coconut,
    tokenizer,
    examples: list[dict],
    tokens: Tokens,
    stage: int,
    config: Config,
    markers: Markers,
    world: World,
    title: str = "validating",
) -> tuple[dict, list[dict]]:
    """Scores every example exactly once, whatever the world size. Collective: every rank must call it.

    Returns, on every rank, the metrics and, in the order of the data, the predictions:
        loss: mean cross-entropy of the supervised tokens of the stage, over all tokens of the set
        accuracy: share of answers that equal the gold answer, both without commas
        cot_match: share of generations whose written reasoning is exactly what the stage leaves of it
        generated_tokens: mean number of new tokens without EOS, plus latent thoughts, as Table 1 counts them; pause
            tokens are not counted, since nothing is generated for them
        seconds, seconds_per_example: of generation, by the clock of the slowest rank
    """
    model.eval()
    loss = validation_loss(model, tokens, stage, config, markers, world)
    begin = time.perf_counter()
    mine = _generate_share(model, tokenizer, tokens, stage, config, markers, world, title)
    seconds = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # all ranks: the slowest one decides
    shares: list = [None] * world.size
    dist.all_gather_object(shares, mine)  # all ranks
    outputs = {index: output for share in shares for index, output in share.items()}
    predictions = []
    for index, example in enumerate(examples):
        kept = tokenizer.decode(kept_reasoning(tokens[index][1], stage, config)).strip()
        predictions.append({"index": index, **_scored(example, kept, *outputs[index])})
    metrics = {
        "loss": loss,
        **{
            name: float(np.mean([prediction[key] for prediction in predictions]))
            for name, key in (
                ("accuracy", "correct"),
                ("cot_match", "cot_correct"),
                ("generated_tokens", "generated_tokens"),
            )
        },
        "examples": len(examples),
        "seconds": seconds.item(),
        "seconds_per_example": seconds.item() / len(examples),
    }
    return metrics, predictions


def _scored(example: dict, kept_reasoning: str, text: str, n_tokens: int, n_latents: int) -> dict:
    gold = example["answer"].replace(",", "").strip()
    answer = extract_answer(text)
    return {
        "question": example["question"],
        "gold": gold,
        "output": text,
        "answer": answer,
        "correct": answer == gold,
        "cot_correct": extract_steps(text) == kept_reasoning,
        "generated_tokens": n_tokens + n_latents,
    }


def _batches_of_rank(lengths: list[int], size: int, world: World) -> list[list[int]]:
    """This rank's batches of example indices: similar lengths together, so that little is padded."""
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return batches[world.rank :: world.size]


def _generate_share(
    model: Coconut, tokenizer, tokens: Tokens, stage: int, config: Config, markers: Markers, world: World, title: str
) -> dict[int, tuple[str, int, int]]:
    """This rank's generations: index -> (text, new tokens without EOS, latent thoughts)."""
    prompts = []
    for index in range(len(tokens)):
        question, steps, _ = tokens[index]
        prompts.append(prompt(question, steps, stage, config, markers))
    # as many batches for every rank as there is work for, however few examples there are
    size = min(config.eval_batch_size, -(-len(prompts) // world.size))
    outputs = {}
    batches = _batches_of_rank([len(ids) for ids in prompts], size, world)
    for indices in progress_bar(batches, title, "batch", shown=world.is_main):
        batch = collate_prompts([prompts[index] for index in indices], markers.eos)
        room = (model.max_positions or math.inf) - batch["input_ids"].shape[1]
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        with autocast(config, world):
            rows = model.generate(**batch, max_new_tokens=min(config.max_new_tokens, room)).tolist()
        for index, row in zip(indices, rows, strict=True):
            new = row[: row.index(markers.eos)] if markers.eos in row else row
            n_latents = prompts[index].count(markers.latent) if model.thought.sequential else 0
            outputs[index] = (tokenizer.decode(new, skip_special_tokens=True), len(new), n_latents)
    return outputs


@torch.no_grad()
def validation_loss(
    model: Coconut, tokens: Tokens, stage: int, config: Config, markers: Markers, world: World
) -> float:
    """Mean cross-entropy over all supervised tokens of the set. Collective: every rank must call it."""
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of tokens
    dataset = StageDataset(tokens, config, markers)
    rows = [dataset[index, stage] for index in range(len(tokens))]
    lengths = [len(input_ids) for input_ids, _ in rows]
    for indices in _batches_of_rank(lengths, config.batch_size_training, world):
        batch = collate([rows[index] for index in indices], markers.eos, markers.latent)
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        with autocast(config, world):
            total += torch.tensor([model(**batch).loss.item() * count, count], dtype=torch.float64)
    dist.all_reduce(total)  # all ranks
    return (total[0] / total[1]).item()


def autocast(config: Config, world: World) -> torch.autocast:
    """bf16 arithmetic with float32 weights, where the configuration asks for it."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.bf16)


def as_files(metrics: dict, predictions: list[dict]) -> dict[str, str]:
    """The contents of metrics.json and predictions.jsonl, name -> text."""
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    return {"metrics.json": json.dumps(metrics, indent=1) + "\n", "predictions.jsonl": "".join(lines)}


def summary(run_dir: Path) -> str:
    """The table of a run: each stage after its last epoch, then eval-only results where there are any.

    Raises UserError where the folder holds no finished epoch and no evaluation.
    """
    rows, stages, last_of_stage = [], {}, {}
    metrics_file, evaluation = run_dir / "metrics.jsonl", run_dir / "eval" / "metrics.json"
    # a restarted run repeats the epochs that it had lost: what was written last counts
    epochs = {record["epoch"]: record for record in read_log(metrics_file) if record["event"] == "epoch"}
    for _, record in sorted(epochs.items()):
        seconds = stages.get(record["stage"], (0, 0.0))
        stages[record["stage"]] = (seconds[0] + 1, seconds[1] + record["train_seconds"] + record["seconds"])
        last_of_stage[record["stage"]] = record
    for stage, record in last_of_stage.items():
        n_epochs, seconds = stages[stage]
        rows.append((f"validation, stage {stage_name(stage)}", n_epochs, record, f"{seconds:.0f}"))
    if evaluation.exists():
        record = json.loads(evaluation.read_text(encoding="utf-8"))
        rows.append(
            (
                f"{Path(record['file']).stem}, stage {stage_name(record['stage'])}",
                "",
                record,
                f"{record['seconds']:.1f}",
            )
        )
    if not rows:
        raise UserError(f"{run_dir} holds neither a finished epoch nor an evaluation")
    table = [f"{'':32}{'epochs':>7}{'accuracy':>10}{'tokens':>8}{'loss':>8}{'seconds':>9}"]
    for label, n_epochs, record, seconds in rows:
        table.append(
            f"{label:32}{n_epochs:>7}{record['accuracy']:>10.1%}{record['generated_tokens']:>8.1f}"
            f"{record['loss']:>8.3f}{seconds:>9}"
        )
    return "\n".join(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run: save_path/name")
    options = parser.parse_args(arguments)
    try:
        print(summary(options.run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
