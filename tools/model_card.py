"""The model card of an exported checkpoint: what its folder and that of its run say of it, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from curriculum import MODES, stage_name
from trainer.logger import read_log
from trainer.run_folder import notes_of
from utils import UserError, read_object

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- coconut
- latent-reasoning
---
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

`generate` adds to each question what training put there: {added}. `modeling_coconut.py` is all of the code.
"""
METHODS = {
    "coconut": "Coconut (chain of continuous thought, [arXiv 2412.06769](https://arxiv.org/abs/2412.06769))",
    "multi_mode": "multi-mode training (direct, written and latent reasoning in one model, arXiv 2604.04902)",
    "codi": "CODI (self-distillation into latent thoughts, [arXiv 2502.21074](https://arxiv.org/abs/2502.21074))",
    "pccot": "PCCoT (CODI with all thoughts at once, [arXiv 2506.18582](https://arxiv.org/abs/2506.18582))",
    "sim_cot": "SIM-CoT on Coconut ([arXiv 2509.20317](https://arxiv.org/abs/2509.20317))",
    "lotus": "LOTUS ([arXiv 2606.31779](https://arxiv.org/abs/2606.31779))",
    "parallel_latents": "Coconut with all thoughts at once (the loop of [arXiv 2506.18582](https://arxiv.org/abs/2506.18582))",
    "cot": "chain of thought in words",
    "no_cot": "answers without reasoning",
    "no_thoughts": "Coconut's curriculum without latent thoughts",
    "icot": "iCoT ([arXiv 2405.14838](https://arxiv.org/abs/2405.14838))",
}


def card(checkpoint: Path, name: str, n_parameters: int, n_latents: int, n_markers: int) -> str:
    """The text of README.md.

    Args:
        checkpoint: its folder; that of its run is the one that it is in.
        name: of the folder that the card is for.
        n_latents, n_markers: what stands between a question and what is generated.

    Raises UserError where a file that it reads is damaged.
    """
    try:
        return _card(checkpoint, name, n_parameters, n_latents, n_markers)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"a file of {checkpoint.parent} is damaged, and cannot be put into the model card: {error!r}"
        ) from None


def _card(checkpoint: Path, name: str, n_parameters: int, n_latents: int, n_markers: int) -> str:
    description = read_object(checkpoint / "coconut.json")
    method, stage = description["method"], stage_name(description["stage"])
    added = "a newline"
    if n_latents:
        added += f", then {n_latents} latent positions (thought `{description.get('thought', 'last')}`)"
        added += {0: "", 1: " after a start marker", 2: " between a start and an end marker"}[n_markers]
    what = f"A model of {n_parameters:,} parameters, trained by the method `{method}`: {METHODS[method]}. Its stage is "
    parts = [CARD.format(name=name, what=f"{what}{stage}.", added=added)]
    run_dir = checkpoint.parent
    config_file = run_dir / "config.yaml"
    if re.fullmatch(r"checkpoint_\d+(_step_\d+)?", checkpoint.name) and config_file.is_file():
        text = config_file.read_text(encoding="utf-8", errors="replace")
        config, notes = _config(config_file, text)
        parts.append(_training(checkpoint, config, notes))
        parts.append(_accuracies(checkpoint, config))
        parts.append(_repeating(checkpoint, name, config, notes, text))
    else:
        parts.append("## Training\n\nNothing is known of the run: the checkpoint is not in its folder.\n")
    return "\n".join(part for part in parts if part)


def _training(checkpoint: Path, config: dict, notes: dict[str, str]) -> str:
    state = read_object(checkpoint / "trainer" / "state.json")
    rows = {
        "method": f"`{config.get('method')}`, thought `{config.get('thought')}`, c_thought {config.get('c_thought')}"
        + "".join(
            f", {name} {config[name]}"
            for name, usual in (("latent_passes", "sequential"), ("latent_labels", 0), ("step_decoder", "none"))
            if config.get(name, usual) != usual
        ),
        "starts from": f"`{state.get('started_from') or config.get('load_model_path') or config.get('model_id')}`"
        + (", its shape only" if config.get("from_scratch") and not config.get("load_model_path") else ""),
        "data": f"`{config.get('train_path')}`",
        "digest of the data": f"`{state.get('data', 'unknown')}` (with tokenizer and limits)",
        "epochs, optimizer steps": f"{state.get('epoch', 'unknown')}, {state.get('step', 'unknown')}",
        "seed": config.get("seed"),
        "hours": _hours(checkpoint.parent, range(config.get("resume") or 0, state.get("epoch", 0))),
        "hardware": f"{notes.get('hardware', 'unknown')}; ranks: {notes.get('world size', 'unknown')}",
        "commit of the trainer": notes.get("git commit", "unknown"),
        "versions": ", ".join(f"{name} {notes[name]}" for name in ("python", "torch", "transformers") if name in notes),
    }
    return "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _hours(run_dir: Path, trained: range) -> str:
    """Of these epochs, from 0, with their validations."""
    # a restarted run repeats the epochs that it had lost: what was written last counts
    epochs = {r["epoch"]: r for r in read_log(run_dir / "metrics.jsonl") if r["event"] == "epoch"}
    seconds = [r["train_seconds"] + r["seconds"] for epoch, r in epochs.items() if epoch in trained]
    # advance_at passes over epochs
    return f"{sum(seconds) / 3600:.2f}, of {len(seconds)} epochs with their validations" if seconds else "unknown"


def _accuracies(checkpoint: Path, config: dict) -> str:
    """A row for the validation after the checkpoint's epoch, and one for each evaluation of this checkpoint that its
    run's folder holds: of `only_eval` under the run's name, and of `python -m tools.evaluate RUN --all`."""
    rows = []
    if (checkpoint / "metrics.json").is_file():
        found = read_object(checkpoint / "metrics.json")
        rows += _rows(found, f"`{config.get('val_path')}` (validation)", config.get("answer_match"))
    run_dir = checkpoint.parent
    for folder in [run_dir / "eval", *sorted(run_dir.glob(f"evaluations/*/{checkpoint.name}/eval"))]:
        if not (folder / "metrics.json").is_file():
            continue
        found = read_object(folder / "metrics.json")
        file = folder / "config.yaml"
        how = _config(file, file.read_text(encoding="utf-8"))[0] if file.is_file() else {}
        for one in found["sets"].values() if "sets" in found else [found]:
            if Path(one["checkpoint"]).name == checkpoint.name:
                rows += _rows(one, f"`{one['file']}`", how.get("answer_match"))
    if not rows:
        return ""
    lines = ["| data | n | accuracy | compared as | CoT match | generated tokens |", "|---|---|---|---|---|---|", *rows]
    how = "Greedy decoding. The answer is what follows the last `#`, without commas; compared as text it must be the "
    how += "gold answer, as a number the last number in it must be less than 0.001 from the gold answer."
    return "\n".join(["## Accuracy", "", *lines, "", how, ""])


def _rows(found: dict, title: str, answer_match: str | None) -> list[str]:
    """Of one evaluation; of a validation of method multi_mode a row for each mode, since its accuracy is their mean."""
    modes = {f"_{mode}": f"{title}, asked in mode {mode}" for mode in MODES if f"accuracy_{mode}" in found}
    rows = []
    for suffix, name in (modes or {"": title}).items():
        # older validations have these of the latent mode alone, without a suffix
        match, tokens = (found.get(key + suffix) for key in ("cot_match", "generated_tokens"))
        match, tokens = "" if match is None else f"{match:.1%}", "" if tokens is None else f"{tokens:.1f}"
        share = f"{found['accuracy' + suffix]:.1%}"
        rows.append(f"| {name} | {found['examples']} | {share} | {answer_match or 'text'} | {match} | {tokens} |")
    return rows


def _repeating(checkpoint: Path, name: str, config: dict, notes: dict[str, str], text: str) -> str:
    commit, *changed = notes.get("git commit", "unknown").split(maxsplit=1)
    lines = [f"git checkout {commit}    # {' '.join(changed)}".removesuffix("    # ")] if commit != "unknown" else []
    n_ranks, run_name = notes.get("world size", "1"), config.get("name")
    lines.append(f"torchrun --nproc_per_node {n_ranks} run.py config.yaml name={run_name}")
    run_dir, epochs = f"{config.get('save_path')}/{run_name}", checkpoint.name.removeprefix("checkpoint_")
    lines.append(
        f"python -m tools.export {run_dir}{f'@{epochs}' if epochs.isdecimal() else '/' + checkpoint.name} {name}"
    )
    return (
        "## To repeat it\n\nIn the trainer's repository, with this folder's `config.yaml`:\n\n"
        + "".join(f"    {line}\n" for line in lines)
        + f"\n## Configuration\n\n```yaml\n{text.strip()}\n```\n"
    )


def _config(path: Path, text: str) -> tuple[dict, dict[str, str]]:
    """The keys of a run, and what is noted above them: commit, versions, ranks, hardware."""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration: it cannot be put into the model card")
    return config, notes_of(text)
