"""How good a model is: validation loss, accuracy, CoT match, token counts; predictions on disk; the table of a run.

torch is imported where it is needed: the table of a run is printed without it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config import Config
from curriculum import IGNORE, Markers, kept_reasoning, prompt, stage_name
from dataset import StageDataset, collate, collate_prompts
from methods import rules_of
from preprocessing.tokens import Tokens
from trainer.data import Data
from trainer.distributed import World, barrier
from trainer.files import replaced
from trainer.logger import read_log
from trainer.run_folder import best, rating
from utils import UserError, as_json, progress_bar, read_object

if TYPE_CHECKING:
    import torch

    from trainer.pretrained import Pretrained

# a sign counts where no word, number or bracket precedes it: 12-3 holds 12 and 3; a point after the digits belongs to
# the number and may end a sentence
NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+])?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
TOLERANCE = 1e-3  # numbers that differ by less are the same


def extract_answer(text: str) -> str:
    """The answer in a generated text: what follows its last '#', without commas (the reference's rule)."""
    return text.split("#")[-1].replace(",", "").strip()


def extract_number(text: str) -> float | None:
    """The number that a generated text answers with: the last one after its last '#', or in all of it where there is
    no '#', commas taken out; None where there is none."""
    numbers = NUMBER.findall(extract_answer(text).replace("\N{MINUS SIGN}", "-"))
    return float(numbers[-1]) if numbers else None


def number_of(gold: str) -> float | None:
    """The number that a gold answer without commas is, and nothing beside it; None where it is none."""
    return float(gold) if NUMBER.fullmatch(gold) else None


def is_right(text: str, gold: str, answer_match: str) -> bool:
    """Whether a generated text has the gold answer (without commas), by the rule that `answer_match` names."""
    if answer_match == "text":
        return extract_answer(text) == gold
    answer, number = extract_number(text), number_of(gold)
    return None not in (answer, number) and abs(answer - number) < TOLERANCE


def extract_steps(text: str) -> str:
    """The written reasoning in a generated text: what precedes its first '#'."""
    return text.split("#")[0].strip()


def evaluate(
    pretrained: Pretrained, data: Data, stage: int, config: Config, world: World, title: str = "validating"
) -> tuple[dict, list[dict]]:
    """Scores every validation example exactly once, whatever the world size. Collective: every rank must call it.

    Returns, on every rank, the metrics and, in the order of the data, the predictions:
        loss: mean cross-entropy of the supervised tokens of the stage, over all tokens of the set
        accuracy: share of answers that are right by the rule of config.answer_match
        accuracy_text, accuracy_number: by either rule, where all gold answers are numbers
        cot_match: share of generations whose written reasoning is exactly what the stage leaves of it
        generated_tokens: mean number of new tokens without EOS, plus latent thoughts, as Table 1 counts them; pause
            tokens are not counted, since nothing is generated for them
        seconds, seconds_per_example: of generation, by the clock of the slowest rank
        with config.val_samples also those of `_evaluate_samples`
    """
    import torch
    import torch.distributed as dist

    pretrained.model.eval()
    loss = validation_loss(pretrained, data.val, stage, config, world)
    begin = time.perf_counter()
    mine = _generate_share(pretrained, data.val, stage, config, world, title)
    seconds = torch.tensor(time.perf_counter() - begin)
    barrier(world)  # all ranks, however much longer some have generated
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # all ranks: the slowest one decides
    outputs = _gathered(mine, world)  # all ranks
    predictions = []
    for index, example in enumerate(data.val_examples):
        kept = pretrained.tokenizer.decode(kept_reasoning(data.val[index][1], stage, config)).strip()
        predictions.append({"index": index, **_scored(example, kept, config.answer_match, *outputs[index])})
    means = {"accuracy": "correct", "cot_match": "cot_correct", "generated_tokens": "generated_tokens"}
    if all(number_of(prediction["gold"]) is not None for prediction in predictions):
        for rule in ("text", "number"):
            means[f"accuracy_{rule}"] = f"correct_{rule}"
            for prediction in predictions:
                prediction[f"correct_{rule}"] = is_right(prediction["output"], prediction["gold"], rule)
    metrics = {
        "loss": loss,
        **{name: float(np.mean([prediction[key] for prediction in predictions])) for name, key in means.items()},
        "examples": len(predictions),
        "seconds": seconds.item(),
        "seconds_per_example": seconds.item() / len(predictions),
    }
    if config.val_samples:
        metrics |= _evaluate_samples(pretrained, data, stage, config, world, title, predictions)  # all ranks
    return metrics, predictions


def _evaluate_samples(
    pretrained: Pretrained,
    data: Data,
    stage: int,
    config: Config,
    world: World,
    title: str,
    predictions: list[dict],
) -> dict:
    """Samples config.val_samples answers to each question; adds to its prediction `sample_answers` and
    `sample_correct`. Returns vote@N and pass@k (see `samples.measures`) with their 95 % intervals over the questions:
    Wilson's, which is too wide for pass@k with 1 <= k < N, whose values lie between 0 and 1. Collective."""
    from trainer import samples

    mine = _sample_share(pretrained, data.val, stage, config, world, f"{title}, {config.val_samples} samples")
    barrier(world)  # all ranks, however much longer some have generated
    texts, right = _gathered(mine, world), []  # all ranks
    for prediction in predictions:
        outputs = texts[prediction["index"]]
        prediction["sample_answers"] = [extract_answer(text) for text in outputs]
        prediction["sample_correct"] = [is_right(text, prediction["gold"], config.answer_match) for text in outputs]
        alike = [extract_number(text) for text in outputs] if config.answer_match == "number" else None
        right.append(prediction["sample_correct"][samples.vote(alike or prediction["sample_answers"])])
    found = samples.measures([prediction["sample_correct"] for prediction in predictions], right)
    return found | {f"{name}_95": wilson(value, len(predictions)) for name, value in found.items()}


def _gathered(mine: dict, world: World) -> dict:
    """What all ranks have found for their examples, by index. Collective."""
    import torch.distributed as dist

    shares: list = [None] * world.size
    dist.all_gather_object(shares, mine)  # all ranks
    return {index: found for share in shares for index, found in share.items()}


def _scored(example: dict, kept_reasoning: str, answer_match: str, text: str, n_tokens: int, n_latents: int) -> dict:
    gold = _gold(example)
    return {
        "question": example["question"],
        "gold": gold,
        "output": text,
        "answer": extract_answer(text),
        "correct": is_right(text, gold, answer_match),
        "cot_correct": extract_steps(text) == kept_reasoning,
        "generated_tokens": n_tokens + n_latents,
    }


def warn_unscorable_answers(tokenizer, data: Data, config: Config, stages: Iterable[int] = ()) -> list[str]:
    """What to warn of where even a perfect model would be marked wrong: gold answers that are not what is read back
    from their own tokens, because the tokenizer changes them, they hold a '#' themselves or are longer than
    max_new_tokens; and at these stages steps that leave no tokens for the answer, hold an EOS before it, or a '#', at
    which the reasoning ends that cot_match compares.

    Raises UserError where answers are to be compared as numbers, and one is none.
    """
    gold = [_gold(example) for example in data.val_examples]
    if config.answer_match == "number" and (none := [i for i, text in enumerate(gold) if number_of(text) is None]):
        raise UserError(
            f"answer_match number needs numbers, but the answer of record {none[0]} (counted from 0) of "
            f"{config.val_path} is {gold[none[0]]!r}"
        )

    def read_back(index: int, kept: Sequence[int] = ()) -> str:
        ids = [*kept, *data.val[index][2]][: config.max_new_tokens]
        return tokenizer.decode(_before(tokenizer.eos_token_id, ids), skip_special_tokens=True)

    def warning(found: dict[int, str], what: str) -> list[str]:
        """found: number of a record -> what is the matter with it."""
        return [
            f"{config.val_path}: {len(found)} of {len(gold)} {what}; the first is record {index} (counted from 0), "
            f"{text}"
            for index, text in list(found.items())[:1]
        ]

    alone = {}
    for index, wanted in enumerate(gold):
        if not is_right(text := read_back(index), wanted, config.answer_match):
            alone[index] = f"whose answer {wanted!r} is read back as {extract_answer(text)!r}"
    warnings = warning(alone, "answers cannot come out right, whatever the model generates")
    variants = [config] if config.only_eval else config.rules.variants(config)
    for stage, variant in product(dict.fromkeys(stages), variants):
        wrong, unmatched = {}, {}
        for index in [index for index in range(len(gold)) if index not in alone]:
            _, steps, answer = data.val[index]
            kept = kept_reasoning(steps, stage, variant)
            text, reasoning = read_back(index, kept), tokenizer.decode(kept).strip()
            if not is_right(text, gold[index], config.answer_match):
                wrong[index] = (
                    f"whose steps and answer, {len(kept) + len(answer)} tokens where max_new_tokens is "
                    f"{config.max_new_tokens}, are read back as {extract_answer(text)[-60:]!r}"
                )
            elif extract_steps(text) != reasoning:
                unmatched[index] = f"whose steps {reasoning[-60:]!r} are read back as {extract_steps(text)[-60:]!r}"
        at_stage = f"at stage {stage_name(stage)}"
        warnings += warning(wrong, f"answers cannot come out right {at_stage}, whatever the model generates")
        warnings += warning(unmatched, f"examples cannot have a cot_match {at_stage}")
    return warnings


def _before(eos: int, ids: list[int]) -> list[int]:
    """What of generated tokens precedes the EOS."""
    return ids[: ids.index(eos)] if eos in ids else ids


def _gold(example: dict) -> str:
    return example["answer"].replace(",", "").strip()


def _batches_of_rank(lengths: list[int], size: int, world: World) -> list[list[int]]:
    """This rank's batches of example indices: similar lengths together, so that little is padded."""
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return batches[world.rank :: world.size]


def _generate_share(
    pretrained: Pretrained, tokens: Tokens, stage: int, config: Config, world: World, title: str
) -> dict[int, tuple[str, int, int]]:
    """This rank's generations: index -> (text, new tokens without EOS, latent thoughts)."""
    model, tokenizer, markers = pretrained
    prompts = _prompts(tokens, stage, config, markers)
    # as many batches for every rank as there is work for, however few examples there are
    size = min(config.eval_batch_size, -(-len(prompts) // world.size))
    outputs = {}
    batches = _batches_of_rank([len(ids) for ids in prompts], size, world)
    for indices in progress_bar(batches, title, "batch", shown=world.is_main):
        batch = [prompts[index] for index in indices]
        with autocast(config, world):
            rows = generate_tokens(pretrained, config.method, batch, config.max_new_tokens, world.device)
        for index, new in zip(indices, rows, strict=True):
            n_latents = prompts[index].count(markers.latent) if model.thinks else 0
            outputs[index] = (tokenizer.decode(new, skip_special_tokens=True), len(new), n_latents)
    return outputs


def _prompts(tokens: Tokens, stage: int, config: Config, markers: Markers) -> list[list[int]]:
    examples = (tokens[index] for index in range(len(tokens)))
    return [prompt(question, steps, stage, config, markers) for question, steps, _ in examples]


def _sample_share(
    pretrained: Pretrained, tokens: Tokens, stage: int, config: Config, world: World, title: str
) -> dict[int, list[str]]:
    """This rank's samples: index -> N texts. Their random numbers are a function of (seed, index, sample)."""
    from trainer import samples

    model, _, markers = pretrained
    prompts, policy, found = _prompts(tokens, stage, config, markers), samples.Policy.of(config), {}
    most = max(config.eval_batch_size // config.val_samples, 1)  # questions; eval_batch_size counts rows
    batches = _batches_of_rank([len(ids) for ids in prompts], min(most, -(-len(prompts) // world.size)), world)
    for indices in progress_bar(batches, title, "batch", shown=world.is_main):
        keys = [(config.seed, index) for index in indices]
        with autocast(config, world):
            drawn = samples.generate(
                model, [prompts[i] for i in indices], keys, config.val_samples, policy, config.max_new_tokens
            )
        texts = texts_of(drawn.tokens, config.method, pretrained)
        for place, index in enumerate(indices):
            found[index] = texts[place * config.val_samples : (place + 1) * config.val_samples]
    return found


def texts_of(rows: list[list[int]], method: str, pretrained: Pretrained) -> list[str]:
    """The outputs in generated tokens, each row up to its EOS."""
    _, tokenizer, markers = pretrained
    outputs = [rules_of(method).output(_before(markers.eos, row), markers) for row in rows]
    return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]


def generate_tokens(
    pretrained: Pretrained,
    method: str,
    prompts: list[list[int]],
    max_new_tokens: int,
    device: torch.device,
    **sampling,
) -> list[list[int]]:
    """The generated tokens after each prompt, up to EOS, all in one batch. A prompt that leaves fewer of the model's
    positions than max_new_tokens has a batch of its own, since it ends earlier than the others."""
    model, _, markers = pretrained
    limit = model.max_positions or math.inf
    fits = [len(row) + max_new_tokens <= limit for row in prompts]
    alone = [[index] for index, fit in enumerate(fits) if not fit]
    together = [index for index, fit in enumerate(fits) if fit]
    found: dict[int, list[int]] = {}
    for indices in [together, *alone] if together else alone:
        batch = collate_prompts([prompts[index] for index in indices], markers.eos)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        left = min(max_new_tokens, limit - batch["input_ids"].shape[1])
        rows = model.generate(**batch, max_new_tokens=left, **sampling).tolist()
        for index, row in zip(indices, rows, strict=True):
            new = _before(markers.eos, row)
            found[index] = rules_of(method).output(new, markers)
    return [found[index] for index in range(len(prompts))]


def validation_loss(pretrained: Pretrained, tokens: Tokens, stage: int, config: Config, world: World) -> float:
    """Mean cross-entropy over all supervised tokens of the set. Collective: every rank must call it."""
    import torch
    import torch.distributed as dist

    model, _, markers = pretrained
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of tokens
    dataset = StageDataset(tokens, config, markers)
    rows = [dataset[index, stage] for index in range(len(tokens))]
    lengths = [len(input_ids) for input_ids, _ in rows]
    for indices in _batches_of_rank(lengths, config.batch_size_training, world):
        batch = collate([rows[index] for index in indices], markers.eos, markers.latent)
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        with torch.no_grad(), autocast(config, world):
            total += torch.tensor([model(**batch).loss.item() * count, count], dtype=torch.float64)
    barrier(world)  # all ranks, however much slower some are
    dist.all_reduce(total)  # all ranks
    return (total[0] / total[1]).item()


def autocast(config: Config, world: World) -> torch.autocast:
    """bf16 arithmetic with float32 weights, where the configuration asks for it."""
    import torch

    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.bf16)


def as_files(metrics: dict, predictions: list[dict]) -> dict[str, str]:
    """The contents of metrics.json and predictions.jsonl, name -> text."""
    return {"metrics.json": as_json(metrics), "predictions.jsonl": _lines(predictions)}


def of_sets(results: dict[str, tuple[dict, list[dict]]]) -> tuple[dict, dict[str, str]]:
    """What `evaluate` has returned for each set of a run, by the sets' names -> (metrics, the run's files).

    A single path has the name "": its metrics and files are as they are. Of several sets the metrics are {"sets":
    {name: metrics}}, with the accuracy's 95 % interval, and the files are metrics.json and predictions_NAME.jsonl each.
    """
    if "" in results:
        return results[""][0], as_files(*results[""])
    sets, files = {}, {}
    for name, (metrics, predictions) in results.items():
        interval = wilson(metrics["accuracy"], metrics["examples"])
        sets[name] = {**metrics, "accuracy_95": interval}
        files[f"predictions_{name}.jsonl"] = _lines(predictions)
    metrics = {"sets": sets}
    return metrics, {"metrics.json": as_json(metrics), **files}


def _lines(predictions: list[dict]) -> str:
    return "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)


def write_results(folder: Path, files: dict[str, str]) -> None:
    """Writes the files of `of_sets`, none of them before all are whole, and removes predictions for other sets. Raises
    UserError."""
    with ExitStack() as together:
        for name, text in files.items():
            together.enter_context(replaced(folder / name)).write_text(text, encoding="utf-8")
    for path in folder.glob("predictions*.jsonl"):
        if path.name not in files:
            path.unlink()  # their metrics are no longer beside them


# ---------------------------------------------------------------------------------------------------------------
# The table of a run
# ---------------------------------------------------------------------------------------------------------------


def summary(run_dir: Path, evaluation: dict | None = None) -> str:
    """The table of a run: each stage after its last epoch, then the results of an evaluation where there are any, those
    that are given or those in the run's folder; of several sets in a table of their own.

    Raises UserError where the folder holds no finished epoch and no evaluation, or something damaged.
    """
    try:
        return _summary(run_dir, evaluation)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"metrics.jsonl or eval/metrics.json in {run_dir} is damaged: {error!r}") from None


def _summary(run_dir: Path, evaluation: dict | None) -> str:
    rows, stages, last_of_stage = [], {}, {}
    evaluation_file = run_dir / "eval" / "metrics.json"
    # a restarted run repeats the epochs that it had lost: what was written last counts
    epochs = {record["epoch"]: record for record in read_log(run_dir / "metrics.jsonl") if record["event"] == "epoch"}
    for _, record in sorted(epochs.items()):
        n_epochs, seconds = stages.get(record["stage"], (0, 0.0))
        stages[record["stage"]] = (n_epochs + 1, seconds + record["train_seconds"] + record["seconds"])
        last_of_stage[record["stage"]] = record
    for stage, record in last_of_stage.items():
        n_epochs, seconds = stages[stage]
        rows.append((f"validation, stage {stage_name(stage)}", n_epochs, record, f"{seconds:.0f}"))
    if evaluation is None and evaluation_file.exists():
        evaluation = read_object(evaluation_file)
    sets = (evaluation or {}).get("sets")
    if evaluation is not None and not sets:
        title = f"{Path(evaluation['file']).stem}, stage {stage_name(evaluation['stage'])}"
        rows.append((title, "", evaluation, f"{evaluation['seconds']:.1f}"))
    if not rows and not sets:
        raise UserError(f"{run_dir} holds neither a finished epoch nor an evaluation")
    tables = [[HEADER, *(row_of(*row) for row in rows)]] if rows else []
    if sets:
        tables.append([SETS_HEADER, *(row_of_set(*found) for found in sets.items())])
    for title, record in [*((row[0], row[2]) for row in rows), *(sets or {}).items()]:
        if any("@" in key for key in record):
            tables.append(samples_table(title, record))
    return "\n\n".join("\n".join(lines) for lines in tables)


HEADER = f"{'':32}{'epochs':>7}{'accuracy':>10}{'tokens':>8}{'loss':>8}{'seconds':>9}"


def row_of(title: str, n_epochs: int | str, record: dict, seconds: str) -> str:
    """A line of the table: `record` holds the metrics of an evaluation."""
    return (
        f"{title:32}{n_epochs:>7}{record['accuracy']:>10.1%}{record['generated_tokens']:>8.1f}"
        f"{record['loss']:>8.3f}{seconds:>9}"
    )


SETS_HEADER = f"{'':32}{'n':>7}{'accuracy':>10}{'95 %':>16}{'tokens':>8}{'loss':>8}{'seconds':>9}"


def row_of_set(name: str, record: dict) -> str:
    """A line of the table of an evaluation on several sets: `record` holds the metrics of one."""
    title = f"{name}, stage {stage_name(record['stage'])}"
    low, high = record["accuracy_95"]
    return (
        f"{title:32}{record['examples']:>7,}{record['accuracy']:>10.1%}{f'{low:.1%} to {high:.1%}':>16}"
        f"{record['generated_tokens']:>8.1f}{record['loss']:>8.3f}{record['seconds']:>9.1f}"
    )


def samples_table(title: str, record: dict) -> list[str]:
    """The lines of a table: accuracy, vote@N and pass@k of an evaluation, with 95 % intervals over its questions."""
    names = ["accuracy", *(key for key in record if "@" in key and not key.endswith("_95"))]
    lines = [f"{title:32}{record['examples']:>7,}{'95 %':>26}"]
    for name in names:
        low, high = wilson(record[name], record["examples"])
        lines.append(f"  {name:37}{record[name]:>10.1%}{f'{low:.1%} to {high:.1%}':>16}")
    return lines


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n questions (Wilson's score interval), also of 0 and 100 %."""
    z = 1.959964  # the normal distribution's 97.5 % point
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def named_best(run_dir: Path) -> str | None:
    """A line on the checkpoint that RUN@best stands for; None where there is none."""
    found = best(run_dir)
    if found is None:
        return None
    stage, accuracy = rating(found)
    return (
        f"best in validation: {found.name}, stage {stage_name(stage)}, {accuracy:.1%} (load_model_path={run_dir}@best)"
    )
