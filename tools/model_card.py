"""Makes the model card of an exported checkpoint from the checkpoint, its run's folder and the exported files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from config import GENERATION_KEYS, Config
from curriculum import stage_name
from methods import implementation
from trainer.files import file_digest
from trainer.logger import latest, read_log
from trainer.run_folder import evaluations_in, read_config
from utils import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = """\
# {name}

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
questions = tokenizer(["..."], padding=True, return_tensors="pt")
rows = model.generate(**questions)
print(tokenizer.batch_decode(rows[:, questions["input_ids"].shape[1] :], skip_special_tokens=True))
```

`generate` appends to each question what training appended: {appended}. `modeling_coconut.py` and `thought.py` are the
whole code. SHA-256 of the weights, for `sha256sum -c`:

{digests}
"""
METHODS = {  # of the paper
    "coconut": "Coconut (chain of continuous thought, [arXiv 2412.06769](https://arxiv.org/abs/2412.06769))",
    "cot": "chain of thought in words",
    "no_cot": "answers without reasoning",
    "no_thoughts": "Coconut's curriculum without latent thoughts",
}
RULES = ("text", "number")  # accuracy_RULE scores the same outputs by another rule; accuracy_MODE scores other outputs


def make_card(checkpoint: Path, name: str, folder: Path, exported: PreTrainedModel, license: str | None) -> ModelCard:
    """Returns the model card of a checkpoint.

    Args:
        checkpoint: folder, inside its run's folder or alone.
        name: of the exported folder.
        folder: with the weights of the model `exported`.
        license: of the weights; None: the one in the base model's card.
    """
    description = read_object(checkpoint / "coconut.json")
    method, settings = description["method"], exported.config
    appended, n_latents = "a newline", settings.appended.count(settings.latent_token_id)
    if n_latents:
        most = "" if settings.stop_threshold is None else "at most "
        appended += f", then {most}{n_latents} latent positions (thought `{description.get('thought', 'last')}`)"
        n_markers = len(settings.appended) - n_latents
        appended += {0: "", 1: " after a start marker", 2: " between a start and an end marker"}[n_markers]
    elif settings.appended:
        appended += f", then {len(settings.appended)} markers"
    size, stage = f"{exported.num_parameters():,}", stage_name(description["stage"])
    what = f"A model of {size} parameters, trained by the method `{method}`: {_about(method)}. Its stage is {stage}."
    digests = "\n".join(f"    {file_digest(path)}  {path.name}" for path in sorted(folder.glob("*.safetensors")))
    parts = [CARD.format(name=name, what=what, appended=appended, digests=digests)]
    tags = ["coconut", "latent-reasoning", method.replace("_", "-")]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, license=license)
    run_dir = checkpoint.parent
    config_file = run_dir / "config.yaml"
    if re.fullmatch(r"checkpoint_\d+(_step_\d+)?", checkpoint.name) and config_file.is_file():
        config, notes = read_config(config_file)
        results = list(_results(checkpoint, config))
        model_id, scratch = str(config.get("model_id")), config.get("from_scratch")
        if not scratch and _is_on_hub(model_id, notes):
            data.base_model = model_id
        data.license = license or (None if scratch else _license_of(model_id))
        if config.get("train_path"):
            data.datasets = [Path(config["train_path"]).stem]
        data.model_name, data.eval_results = name, [_eval_result(*result) for result in results] or None
        parts += [_training(checkpoint, config, notes), _accuracies(results)]
    else:
        parts.append("## Training\n\nNothing is known of the run: the checkpoint is not in its folder.\n")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(part for part in parts if part))


def _about(method: str) -> str:
    """Returns what the method is: for other methods than the paper's, the first line of their file."""
    return METHODS.get(method) or implementation(method).__doc__.splitlines()[0].rstrip(".")


def _is_on_hub(model_id: str, notes: dict[str, str]) -> bool:
    """Returns whether a run's model_id is a hub id, and not a folder here or where it was trained."""
    with suppress(HFValidationError):
        validate_repo_id(model_id)
        return notes.get("base model") is None and not Path(model_id).exists()
    return False


def _license_of(model_id: str) -> str | None:
    """Returns the license in the base model's card, from its folder or the hub's cache."""
    path = Path(model_id) / "README.md"
    if not path.is_file():
        with suppress(HFValidationError):  # model_id is the path of a folder that is gone
            path = try_to_load_from_cache(model_id, "README.md")
    return ModelCard.load(path).data.license if isinstance(path, str | Path) and Path(path).is_file() else None


def _training(checkpoint: Path, config: dict, notes: dict[str, str]) -> str:
    state = read_object(checkpoint / "trainer" / "state.json")
    rows = {
        "method": f"`{config.get('method')}`, thought `{config.get('thought')}`, c_thought {config.get('c_thought')}",
        "starts from": f"`{state.get('started_from') or config.get('load_model_path') or config.get('model_id')}`"
        + (", its shape only" if config.get("from_scratch") and not config.get("load_model_path") else ""),
        "data": f"`{config.get('train_path')}`",
        "SHA-256 of the data": notes.get("SHA-256 of train_path", "unknown"),
        "epochs, optimizer steps": _trained(state),
        "seed": config.get("seed"),
        "hours": _hours(checkpoint.parent, range(state.get("begun") or 0, state.get("epoch", 0))),
        "hardware": f"{notes.get('hardware', 'unknown')}; ranks: {notes.get('world size', 'unknown')}",
        "commit of the trainer": notes.get("git commit", "unknown"),
        "versions": ", ".join(f"{name} {notes[name]}" for name in ("python", "torch", "transformers") if name in notes),
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return f"## Training\n\n`config.yaml` is the configuration of the run.\n\n| | |\n|---|---|\n{table}"


def _trained(state: dict) -> str:
    """Returns the numbers of epochs and optimizer steps that a run has trained; its state counts from epoch 0."""
    if "step" not in state:
        return "unknown"
    counted = state["epoch"] - state.get("passed_over", 0)
    epochs = counted - (state.get("begun") or 0)
    return f"{epochs}, {state['step'] * epochs // counted if counted else state['step']}"


def _hours(run_dir: Path, trained: range) -> str:
    """Returns the hours of training and validation in these epochs, counted from 0, as text."""
    epochs = latest(read_log(run_dir / "metrics.jsonl"), "epoch")  # not all, if advance_at has skipped some
    seconds = [r["train_seconds"] + r["seconds"] for epoch, r in epochs.items() if epoch in trained]
    return f"{sum(seconds) / 3600:.2f}, of {len(seconds)} epochs with their validations" if seconds else "unknown"


def _results(checkpoint: Path, config: dict) -> Iterator[tuple[dict, str, str, str, str]]:
    """Yields (metrics, data file, split, rule, how it was asked) of the validation at the checkpoint, and of each
    evaluation of it in the run's folder, by `only_eval` or by `python -m tools.evaluate --all`."""
    evaluations, described, listed = [], read_object(checkpoint / "coconut.json"), []
    validated = (described.get("validated_on") or {}).get("file", config.get("val_path"))
    splits = (("train", config.get("train_path")), ("validation", config.get("val_path")), ("validation", validated))
    seen = {os.path.abspath(path): split for split, path in splits if isinstance(path, str)}
    if (checkpoint / "metrics.json").is_file():
        found, state = read_object(checkpoint / "metrics.json"), read_object(checkpoint / "trainer" / "state.json")
        how = {"answer_match": config.get("answer_match")} | (state.get("scored_by") or {})  # config.yaml may be newer
        evaluations.append((found, str(validated), "validation", how))
    for folder, found in evaluations_in(checkpoint.parent, checkpoint.name):
        if Path(found["checkpoint"]).name == checkpoint.name:
            file = folder / "config.yaml"
            how = read_config(file)[0] if file.is_file() else {}
            split = seen.get(os.path.abspath(found["file"]), "test")
            evaluations.append((found, found["file"], split, how))
    for found, file, split, how in evaluations:
        modes = [key.removeprefix("accuracy") for key in found if re.fullmatch(r"accuracy_[a-z]+", key)]
        # with several modes `accuracy` is their mean, so each mode has a row; older runs have the other metrics only of
        # the latent mode
        for suffix in [mode for mode in modes if mode[1:] not in RULES] or [""]:
            metrics = {key: found.get(key + suffix) for key in ("accuracy", "cot_match", "generated_tokens")}
            asked = ", ".join([f"in mode {suffix[1:]}"] * bool(suffix) + list(ways(how, found, described)))
            result = ({**metrics, "examples": found["examples"]}, file, split, how.get("answer_match") or "text", asked)
            if result not in listed:  # only_eval and tools.evaluate may have read the same file
                listed.append(result)
                yield result


def ways(how: dict, found: dict, described: dict) -> Iterator[str]:
    """Yields how an evaluation, with the keys `how` and the metrics `found`, asked otherwise than a checkpoint with the
    coconut.json `described` is asked by default."""
    if how.get("mode", Config.mode) != Config.mode:
        yield f"in mode {how['mode']}"
    if how.get("eval_latents") is not None:
        yield f"with {how['eval_latents']} thoughts"
    if how.get("eval_latents_from_steps"):
        yield "with as many thoughts as its steps need"
    if (stage := found.get("stage", described["stage"])) != described["stage"]:
        yield f"at stage {stage_name(stage)}"
    for name, default in GENERATION_KEYS.items():
        own = described.get(name, default)
        if how.get(name, own) != own:
            yield f"with {name} {how[name]}"


def _eval_result(found: dict, file: str, split: str, rule: str, asked: str) -> EvalResult:
    name = f"accuracy ({rule}){f', {asked}' if asked else ''}"
    return EvalResult(
        task_type="text-generation",
        dataset_type=Path(file).stem,
        dataset_name=Path(file).name,
        dataset_split=split,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(found["accuracy"], 4),
    )


def _accuracies(results: list) -> str:
    if not results:
        return ""
    lines = ["| data | n | accuracy | compared as | CoT match | generated tokens |", "|---|---|---|---|---|---|"]
    for found, file, split, rule, asked in results:
        title = f"`{file}`{' (validation)' if split == 'validation' else ''}{f', asked {asked}' if asked else ''}"
        match, tokens = found["cot_match"], found["generated_tokens"]
        match, tokens = "" if match is None else f"{match:.1%}", "" if tokens is None else f"{tokens:.1f}"
        lines.append(f"| {title} | {found['examples']} | {found['accuracy']:.1%} | {rule} | {match} | {tokens} |")
    how = "Greedy decoding. The answer is the text after the last `#`, without commas; compared as text it must equal "
    how += "the gold answer, as a number its last number must be less than 0.001 from the gold answer."
    return "\n".join(["## Accuracy", "", *lines, "", how, ""])
