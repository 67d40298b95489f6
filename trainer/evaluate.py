"""Evaluates a model: validation loss, accuracy, CoT match, token counts; writes predictions; prints a run's table.

torch is imported inside functions, so that a run's table is printed without it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import Config
from curriculum import kept_reasoning, prompt, stage_name
from dataset import StageDataset, collate_for_device, collate_prompts, to_device
from methods import rules_of
from preprocessing.tokens import Tokens, batched
from trainer.data import Data
from trainer.distributed import World, all_reduce, barrier, on_every_rank
from trainer.files import parsing, replaced
from trainer.logger import latest, read_log
from trainer.run_folder import best_with_warnings, rating
from utils import UserError, as_json, progress_bar, read_object

if TYPE_CHECKING:
    import torch

    from trainer.pretrained import Pretrained

# a sign counts only without a word, number or bracket before it: 12-3 holds 12 and 3; a point after the digits belongs
# to the number and may end a sentence
NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+])?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
TOLERANCE = 1e-3  # numbers that differ by less are equal


def extract_answer(text: str) -> str:
    """Returns the answer in a generated text: the part after its last '#', without commas (the reference's rule)."""
    return text.split("#")[-1].replace(",", "").strip()


def extract_number(text: str) -> float | None:
    """Returns the last number of `extract_answer`; None if it holds no number."""
    numbers = NUMBER.findall(extract_answer(text).replace("\N{MINUS SIGN}", "-"))
    return float(numbers[-1]) if numbers else None


def number_of(gold: str) -> float | None:
    """Returns a gold answer without commas as a number; None if it holds anything else."""
    return float(gold) if NUMBER.fullmatch(gold) else None


def is_right(text: str, gold: str, answer_match: str) -> bool:
    """Whether a generated text has the gold answer (without commas), by the rule `answer_match`: text or number."""
    if answer_match == "text":
        return extract_answer(text) == gold
    answer, number = extract_number(text), number_of(gold)
    return None not in (answer, number) and abs(answer - number) < TOLERANCE


def extract_steps(text: str) -> str:
    """Returns the reasoning in a generated text: the part before its first '#'."""
    return text.split("#")[0].strip()


def evaluate(
    pretrained: Pretrained, data: Data, stage: int, config: Config, world: World, title: str = "validating"
) -> tuple[dict, list[dict]]:
    """Scores every validation example exactly once, whatever the world size. Collective: every rank must call it.

    Returns, on every rank, the metrics and the predictions, the latter in the order of the data. The metrics are
        loss: mean cross-entropy of the stage's supervised tokens, over all tokens of the set
        accuracy: share of right answers by the rule config.answer_match
        accuracy_text, accuracy_number: by either rule, if all gold answers are numbers
        cot_match: share of outputs whose reasoning steps equal those that the stage leaves
        generated_tokens: mean number of new tokens without EOS, plus latent thoughts, as Table 1 counts them; pause
            tokens do not count, since the model generates nothing for them
        seconds: of the whole evaluation, until the slowest rank is done
        seconds_per_example: of greedy generation, likewise
        those of `_add_samples`, if config.val_samples is set
    """
    model, tokenizer, markers = pretrained
    start = time.perf_counter()
    model.eval()
    loss = validation_loss(pretrained, data.val, stage, config, world)  # all ranks

    def generate(_, prompts: list[list[int]]) -> list[tuple[str, int]]:
        rows = generate_tokens(pretrained, config.method, prompts, config.n_new_tokens)
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        n_latents = [ids.count(markers.latent) if model.thinks else 0 for ids in prompts]
        return [(text, len(row) + n) for text, row, n in zip(texts, rows, n_latents, strict=True)]

    prompts = [prompt(*data.val[index][:2], stage, config, markers) for index in range(len(data.val))]
    begin = time.perf_counter()
    share = _share_of_rank(generate, prompts, config.eval_batch_size, config, world, title)
    seconds = time.perf_counter() - begin
    outputs = _gathered(share, world)  # all ranks
    generating = max(on_every_rank(world, lambda: seconds))  # all ranks
    predictions = _predictions(outputs, tokenizer, data, stage, config)
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
        "seconds_per_example": generating / len(predictions),
    }
    if config.val_samples:
        metrics |= _add_samples(predictions, prompts, pretrained, config, world, title)  # all ranks
    metrics["seconds"] = max(on_every_rank(world, lambda: time.perf_counter() - start))  # all ranks
    return metrics, predictions


def _predictions(outputs: dict[int, tuple[str, int]], tokenizer, data: Data, stage: int, config: Config) -> list[dict]:
    """Scores the outputs, index of the example -> (text, number of tokens); returns a prediction for each example."""
    predictions = []
    for index, example in enumerate(data.val_examples):
        (text, n_tokens), gold = outputs[index], gold_answer(example)
        kept = tokenizer.decode(kept_reasoning(data.val[index][1], stage, config)).strip()
        prediction = {"index": index, "question": example["question"], "gold": gold, "output": text}
        prediction |= {"answer": extract_answer(text), "correct": is_right(text, gold, config.answer_match)}
        prediction |= {"cot_correct": extract_steps(text) == kept, "generated_tokens": n_tokens}
        predictions.append(prediction)
    return predictions


def _add_samples(
    predictions: list[dict], prompts: list[list[int]], pretrained: Pretrained, config: Config, world: World, title: str
) -> dict:
    """Samples config.val_samples answers to each question and adds `sample_answers` and `sample_correct` to its
    prediction. Collective: every rank must call it.

    Returns vote@N and pass@k (see `samples.measures`) with their 95 % intervals over the questions: Wilson's, which is
    too wide for pass@k with 1 <= k < N, whose values lie between 0 and 1.
    """
    from trainer import samples

    size = max(config.eval_batch_size // config.val_samples, 1)  # questions; eval_batch_size counts rows
    draw, title = partial(draw_samples, pretrained, config), f"{title}, {config.val_samples} samples"
    texts, votes = _gathered(_share_of_rank(draw, prompts, size, config, world, title), world), []  # all ranks
    for index, prediction in enumerate(predictions):
        prediction["sample_answers"] = [extract_answer(text) for text in texts[index]]
        right = [is_right(text, prediction["gold"], config.answer_match) for text in texts[index]]
        numbers = [extract_number(text) for text in texts[index]] if config.answer_match == "number" else None
        votes.append(right[samples.vote(numbers or prediction["sample_answers"])])
        prediction["sample_correct"] = right
    found = samples.measures([prediction["sample_correct"] for prediction in predictions], votes)
    return found | {f"{name}_95": wilson(value, len(predictions)) for name, value in found.items()}


def draw_samples(
    pretrained: Pretrained, config: Config, indices: list[int], prompts: list[list[int]]
) -> list[list[str]]:
    """Samples config.val_samples texts for each prompt. The random numbers are a function of (seed, index, sample)."""
    from trainer import samples

    keys = [(config.seed, index) for index in indices]
    policy = samples.Policy(config.temperature, config.thought_noise, config.thought_dropout)
    drawn = samples.generate(pretrained.model, prompts, keys, config.val_samples, policy, config.n_new_tokens)
    return list(batched(texts_of(drawn.tokens, config.method, pretrained), config.val_samples))


def _share_of_rank(
    generate: Callable, prompts: list[list[int]], size: int, config: Config, world: World, title: str
) -> dict[int, Any]:
    """Returns what `generate`, called with (indices, their prompts), makes of each prompt of this rank, by index. The
    ranks share the batches, of at most `size` prompts."""
    size = min(size, -(-len(prompts) // world.size))  # the ranks share a small set too
    found, batches = {}, _batches_of_rank([len(ids) for ids in prompts], size, world)
    for indices in progress_bar(batches, title, "batch", shown=world.is_main):
        with autocast(config, world):
            results = generate(indices, [prompts[index] for index in indices])
        found |= zip(indices, results, strict=True)
    return found


def _gathered(share: dict, world: World) -> dict:
    """Merges the results of all ranks, by index. Collective: every rank must call it."""
    shares = on_every_rank(world, lambda: share)  # all ranks
    return {index: result for share in shares for index, result in share.items()}


def gold_answers(examples: list[dict], answer_match: str, file: str) -> list[str]:
    """Returns the gold answers. Raises UserError if answer_match is number and one is none."""
    gold = [gold_answer(example) for example in examples]
    if answer_match == "number" and (others := [i for i, text in enumerate(gold) if number_of(text) is None]):
        raise UserError(
            f"answer_match number needs numbers, but the answer of record {others[0]} (counted from 0) of {file} is "
            f"{gold[others[0]]!r}"
        )
    return gold


def warn_unscorable_answers(tokenizer, data: Data, config: Config, stages: Iterable[int] = ()) -> list[str]:
    """Returns warnings about examples on which even a perfect model would be scored as wrong.

    Checked are the gold answers, decoded again from their tokens: the tokenizer may change them, they may hold a '#'
    or be longer than max_new_tokens. At each of `stages` the kept steps are checked too: they may leave no tokens for
    the answer or hold an EOS, and a '#' in them ends the reasoning that cot_match compares.

    Raises UserError if answer_match is number and a gold answer is none.
    """
    gold = gold_answers(data.val_examples, config.answer_match, config.val_path)
    warnings: list[str] = []

    def decode(index: int, kept: Sequence[int] = ()) -> str:
        ids = [*kept, *data.val[index][2]][: config.n_new_tokens]
        return tokenizer.decode(before_eos(tokenizer.eos_token_id, ids), skip_special_tokens=True)

    def warn(problem: str, found: dict[int, str]) -> None:  # found: index of a record -> its problem
        if found:
            index, text = next(iter(found.items()))
            counts = f"{config.val_path}: {len(found)} of {len(gold)}"
            warnings.append(f"{counts} {problem}; the first is record {index} (counted from 0), {text}")

    alone = {}
    for index, wanted in enumerate(gold):
        if not is_right(text := decode(index), wanted, config.answer_match):
            is_cut = len(data.val[index][2]) > config.n_new_tokens
            cut = f" (max_new_tokens {config.n_new_tokens} cuts it)" if is_cut else ""
            alone[index] = f"whose answer {wanted!r} is decoded from its tokens as {extract_answer(text)!r}{cut}"
    warn("answers cannot be right, whatever the model generates", alone)
    variants = [config] if config.only_eval else config.rules.variants(config)
    for stage, variant in product(dict.fromkeys(stages), variants):
        wrong, unmatched = {}, {}
        for index in [index for index in range(len(gold)) if index not in alone]:
            _, steps, answer = data.val[index]
            kept = kept_reasoning(steps, stage, variant)
            text, reasoning = decode(index, kept), tokenizer.decode(kept).strip()
            if not is_right(text, gold[index], config.answer_match):
                wrong[index] = (
                    f"whose steps and answer, {len(kept) + len(answer)} tokens with max_new_tokens "
                    f"{config.n_new_tokens}, are decoded as {extract_answer(text)[-60:]!r}"
                )
            elif extract_steps(text) != reasoning:
                unmatched[index] = f"whose steps {reasoning[-60:]!r} are decoded as {extract_steps(text)[-60:]!r}"
        warn(f"answers cannot be right at stage {stage_name(stage)}, whatever the model generates", wrong)
        warn(f"examples cannot have a cot_match at stage {stage_name(stage)}", unmatched)
    return warnings


def before_eos(eos: int, ids: list[int]) -> list[int]:
    """Returns the ids before the first EOS."""
    return ids[: ids.index(eos)] if eos in ids else ids


def gold_answer(example: dict) -> str:
    """Returns the answer of a data file's record without commas."""
    return example["answer"].replace(",", "").strip()


def _batches_of_rank(lengths: list[int], size: int, world: World) -> list[list[int]]:
    """Returns this rank's batches of example indices. A batch holds similar lengths, for little padding."""
    order = np.argsort(lengths, kind="stable").tolist()
    return list(batched(order, size))[world.rank :: world.size]


def texts_of(rows: list[list[int]], method: str, pretrained: Pretrained) -> list[str]:
    """Decodes generated tokens, each row up to its EOS."""
    _, tokenizer, markers = pretrained
    outputs = [rules_of(method).output(before_eos(markers.eos, row), markers) for row in rows]
    return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]


def generate_tokens(
    pretrained: Pretrained, method: str, prompts: list[list[int]], max_new_tokens: int, **sampling
) -> list[list[int]]:
    """Generates up to max_new_tokens tokens, without EOS, after each prompt. One batch holds all prompts; those that
    leave fewer of the model's positions are in further batches, since their generations end earlier."""
    model, _, markers = pretrained
    batches: dict[int, list[int]] = {}  # number of new tokens -> indices of prompts
    for index, ids in enumerate(prompts):
        batches.setdefault(min(max_new_tokens, (model.max_positions or math.inf) - len(ids)), []).append(index)
    found: dict[int, list[int]] = {}
    for n_new, indices in batches.items():
        batch = collate_prompts([prompts[index] for index in indices], markers.eos)
        batch = to_device(batch, model.base_causallm.device)
        rows = model.generate(**batch, max_new_tokens=n_new, **sampling).tolist()
        for index, row in zip(indices, rows, strict=True):
            found[index] = rules_of(method).output(before_eos(markers.eos, row), markers)
    return [found[index] for index in range(len(prompts))]


def validation_loss(pretrained: Pretrained, tokens: Tokens, stage: int, config: Config, world: World) -> float:
    """Returns the mean cross-entropy of all supervised tokens of the set. Collective: every rank must call it."""
    import torch

    model, _, markers = pretrained
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of tokens
    dataset = StageDataset(tokens, config, markers)
    rows = [dataset[index, stage] for index in range(len(tokens))]
    lengths = [len(input_ids) for input_ids, _ in rows]
    for indices in _batches_of_rank(lengths, config.batch_size_training, world):
        batch = collate_for_device([rows[index] for index in indices], markers.eos, markers.latent)
        batch, count = to_device(batch, world.device), len(batch["supervised"])
        with torch.no_grad(), autocast(config, world):
            total += torch.tensor([model(**batch).loss.item() * count, count], dtype=torch.float64)
    barrier(world)  # all ranks: some may take longer than a collective's timeout
    all_reduce(total)  # all ranks
    return (total[0] / total[1]).item()


def autocast(config: Config, world: World) -> torch.autocast:
    """Returns the context of bf16 arithmetic with float32 weights, enabled by the key bf16."""
    import torch

    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.bf16)


def as_files(metrics: dict, predictions: list[dict]) -> dict[str, str]:
    """Returns the contents of metrics.json and predictions.jsonl by file name."""
    return {"metrics.json": as_json(metrics), "predictions.jsonl": _lines(predictions)}


def of_sets(results: dict[str, tuple[dict, list[dict]]]) -> tuple[dict, dict[str, str]]:
    """Combines the results of `evaluate`, by set name, into (metrics, files).

    The only set of a run has the name "": its metrics and files stay unchanged. For several sets the metrics are
    {"sets": {name: metrics}}, with the accuracy's 95 % interval, and each set has a file predictions_NAME.jsonl.
    """
    if "" in results:
        return results[""][0], as_files(*results[""])
    sets = {
        name: {**metrics, "accuracy_95": wilson(metrics["accuracy"], metrics["examples"])}
        for name, (metrics, _) in results.items()
    }
    files = {f"predictions_{name}.jsonl": _lines(predictions) for name, (_, predictions) in results.items()}
    return {"sets": sets}, {"metrics.json": as_json({"sets": sets}), **files}


def _lines(predictions: list[dict]) -> str:
    return "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)


def write_results(folder: Path, files: dict[str, str]) -> None:
    """Writes the files of `of_sets`, all of them or none, and removes the predictions of other sets. Raises
    UserError."""
    with ExitStack() as together:
        for name, text in files.items():
            together.enter_context(replaced(folder / name)).write_text(text, encoding="utf-8")
    for path in folder.glob("predictions*.jsonl"):
        if path.name not in files:
            path.unlink()  # metrics.json no longer holds their set


# --- The table of a run ---


def summary(run_dir: Path, evaluation: dict | None = None) -> str:
    """Returns a run's table: each stage after its last epoch, then an evaluation, by default the one in the run's
    folder; several sets have a table of their own.

    Raises UserError if the folder holds no finished epoch and no evaluation, or a damaged file.
    """
    with parsing(f"metrics.jsonl or eval/metrics.json in {run_dir}"):
        return _summary(run_dir, evaluation)


def _summary(run_dir: Path, evaluation: dict | None) -> str:
    by_stage: dict[int, list[dict]] = {}
    for record in latest(read_log(run_dir / "metrics.jsonl"), "epoch").values():
        by_stage.setdefault(record["stage"], []).append(record)
    rows = []
    for stage, records in by_stage.items():
        seconds = sum(record["train_seconds"] + record["seconds"] for record in records)
        rows.append((f"validation, stage {stage_name(stage)}", len(records), records[-1], f"{seconds:.0f}"))
    if evaluation is None and (file := run_dir / "eval" / "metrics.json").exists():
        evaluation = read_object(file)
    sets = (evaluation or {}).get("sets", {})
    if evaluation is not None and not sets:
        title = f"{Path(evaluation['file']).stem}, stage {stage_name(evaluation['stage'])}"
        rows.append((title, "", evaluation, f"{evaluation['seconds']:.1f}"))
    if not rows and not sets:
        raise UserError(f"{run_dir} holds neither a finished epoch nor an evaluation")
    tables = [[HEADER, *(row_of(*row) for row in rows)]] if rows else []
    if sets:
        tables.append([SETS_HEADER, *(_row_of_set(*item) for item in sets.items())])
    for title, record in [*((title, record) for title, _, record, _ in rows), *sets.items()]:
        if any("@" in key for key in record):
            tables.append(_samples_table(title, record))
    return "\n\n".join("\n".join(lines) for lines in tables)


HEADER = f"{'':32}{'epochs':>7}{'accuracy':>10}{'tokens':>8}{'loss':>8}{'seconds':>9}"


def row_of(title: str, n_epochs: int | str, record: dict, seconds: str) -> str:
    """Formats a line below HEADER. record: the metrics of an evaluation."""
    return (
        f"{title:32}{n_epochs:>7}{record['accuracy']:>10.1%}{record['generated_tokens']:>8.1f}"
        f"{record['loss']:>8.3f}{seconds:>9}"
    )


SETS_HEADER = f"{'':32}{'n':>7}{'accuracy':>10}{'95 %':>16}{'tokens':>8}{'loss':>8}{'seconds':>9}"


def _row_of_set(name: str, record: dict) -> str:
    """Formats a line below SETS_HEADER. record: the metrics of one set."""
    title = f"{name}, stage {stage_name(record['stage'])}"
    low, high = record["accuracy_95"]
    return (
        f"{title:32}{record['examples']:>7,}{record['accuracy']:>10.1%}{f'{low:.1%} to {high:.1%}':>16}"
        f"{record['generated_tokens']:>8.1f}{record['loss']:>8.3f}{record['seconds']:>9.1f}"
    )


def _samples_table(title: str, record: dict) -> list[str]:
    """Formats accuracy, vote@N and pass@k of an evaluation, with 95 % intervals over its questions."""
    lines = [f"{title:32}{record['examples']:>7,}{'95 %':>26}"]
    for name in ("accuracy", *(key for key in record if "@" in key and not key.endswith("_95"))):
        low, high = wilson(record[name], record["examples"])
        lines.append(f"  {name:37}{record[name]:>10.1%}{f'{low:.1%} to {high:.1%}':>16}")
    return lines


def wilson(share: float, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % score interval of a share of n questions; it also holds for shares of 0 and 1."""
    z = 1.959964  # the normal distribution's 97.5 % point
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def named_best(run_dir: Path) -> str | None:
    """Returns a line about the checkpoint RUN@best; None if the run has none."""
    if (found := best_with_warnings(run_dir)) is None:
        return None
    stage, accuracy = rating(found)
    name = f"{found.name}, stage {stage_name(stage)}, {accuracy:.1%}"
    return f"best in validation: {name} (load_model_path={run_dir}@best)"
