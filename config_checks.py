"""What is impossible about a configuration on this machine, a sentence each: `Config.problems` collects it.

`config` is a config.Config throughout.
"""

from __future__ import annotations

import re
from pathlib import Path

import methods
from trainer.run_folder import is_on_hub, run_of
from utils import UserError, why_unreadable

PLACEHOLDER = re.compile(r"YOUR_\w+")
NO_FILE_NAME = re.compile(r"[/\\\0]|^\.*$")  # of what a name must not be, since files and folders bear it
LONGEST_NAME = 200  # bytes: a file's name has at most 255, and what is written aside is called a little longer


def combinations(config, world_size: int) -> list[str]:
    """Keys that exclude each other or lack one another."""
    found = [*_of_the_run(config), *_of_stages(config), *_of_weights(config)]
    for rules in methods.all_rules().values():
        found += rules.problems(config)
    if not config.only_eval:  # which has no optimizer steps
        try:
            config.passes(world_size)
        except UserError as error:
            found.append(str(error))
    return found


def _of_the_run(config) -> list[str]:
    """Its folder, its files, what an eval-only run is for."""
    found = []
    if reason := why_unreadable(config.save_path):
        found.append(f"save_path {config.save_path!r} cannot be reached: {reason}")
    elif Path(config.save_path).is_file():
        found.append(f"save_path {config.save_path!r} is a file, not a folder")
    if config.resume >= config.num_epochs and not config.only_eval:
        found.append(f"resume {config.resume} leaves nothing of num_epochs {config.num_epochs}")
    if config.only_eval and config.load_model_path is None:
        found.append("only_eval needs load_model_path: the checkpoint to evaluate")
    if config.eval_latents is not None and not (config.only_eval and config.has_latents):
        found.append("eval_latents is for eval-only runs of method coconut, or of another with latents")
    if is_no_file_name(config.name):
        found.append(f"name {config.name!r} must be a plain folder name, of at most {LONGEST_NAME} bytes")
    if isinstance(config.val_path, dict):
        if not config.only_eval:
            found.append("val_path names several files, which is for eval-only runs: a training run takes one path")
        elif not config.val_path:
            found.append("val_path is an empty mapping: set it to a path, or to {name: path, other: path}")
        unfit = [name for name in config.val_path if is_no_file_name(name)]
        found += [
            f"val_path: the name {name!r} must be a plain one, of at most {LONGEST_NAME} bytes, for a file bears it"
            for name in unfit
        ]
    return found


def is_no_file_name(name: str) -> bool:
    return bool(NO_FILE_NAME.search(name)) or len(name.encode(errors="surrogatepass")) > LONGEST_NAME


def _of_stages(config) -> list[str]:
    """The curriculum, and methods without one."""
    found = []
    if isinstance(config.epochs_per_stage, list) and len(config.epochs_per_stage) > config.last_stage + 1:
        found.append(
            f"epochs_per_stage has {len(config.epochs_per_stage)} entries, but there are only {config.last_stage + 1} "
            f"stages: 0 to max_latent_stage + 1"
        )
    if not config.rules.has_stages:
        if config.uniform_prob or config.advance_at is not None:
            found.append(
                f"uniform_prob and advance_at are of stages, and method {config.method} has always the thoughts of the "
                f"last one"
            )
        if not config.c_thought * config.max_latent_stage * config.pad_latent_to_max:
            found.append(
                f"method {config.method} thinks max_latent_stage x c_thought thoughts: it needs both, and "
                f"pad_latent_to_max"
            )
    return found


def _of_weights(config) -> list[str]:
    """Where weights come from, and how they are kept."""
    found = []
    if config.from_scratch and config.load_model_path is not None:
        found.append("from_scratch and load_model_path exclude each other")
    if config.lora_rank is not None and config.from_scratch:
        found.append("lora_rank updates weights that there are, and from_scratch has none")
    if config.bf16 and config.bf16_weights:
        found.append("bf16 (mixed precision) and bf16_weights (everything in bfloat16) exclude each other")
    if config.compile and config.gradient_checkpointing:
        found.append("compile and gradient_checkpointing exclude each other")
    return found


def paths(config) -> list[str]:
    """Files that are missing, and placeholders that are still there."""
    found = []
    val_paths = {f"val_path {name}".strip(): one.val_path for name, one in config.by_set().items()}
    for name, value in {**vars(config), **val_paths}.items():
        if isinstance(value, str) and PLACEHOLDER.search(value):
            found.append(f"{name} is still the placeholder {value!r}: set it to your own path")
    paths = {"train_path": config.train_path, **val_paths, "load_model_path": config.load_model_path}
    for name, value in paths.items():
        if name == "train_path" and config.only_eval:
            continue
        if value is None:
            if name != "load_model_path":
                found.append(f"{name} is missing: set it to a JSON list of question, answer and steps")
        elif not PLACEHOLDER.search(value):
            if name == "load_model_path":
                if _continues(config) or is_on_hub(value):
                    continue  # the run's own checkpoint wins over it; the hub is asked later
                value = str(run_of(value))
            if reason := why_unreadable(value):
                found.append(f"{name} {value!r} cannot be reached: {reason}")
            elif not Path(value).exists():
                found.append(f"{name} {value!r} does not exist{_preparation_hint(value)}")
            elif name != "load_model_path" and not Path(value).is_file():
                found.append(f"{name} {value!r} is no file")
    model = Path(config.model_id)
    if reason := why_unreadable(config.model_id):
        return [*found, f"model_id {config.model_id!r} cannot be reached: {reason}"]
    is_path = (
        model.is_absolute() or config.model_id.startswith(".") or (len(model.parts) > 1 and model.parents[-2].is_dir())
    )
    if is_path and not PLACEHOLDER.search(config.model_id) and not model.is_dir() and not _has_model_elsewhere(config):
        found.append(f"model_id {config.model_id!r} does not exist{_preparation_hint(config.model_id)}")
    return found


def _continues(config) -> bool:
    """Whether the run has a checkpoint of its own."""
    if config.only_eval or why_unreadable(config.run_dir):
        return False
    return any(config.run_dir.glob("checkpoint_*/coconut.json"))


def _has_model_elsewhere(config) -> bool:
    """Whether a checkpoint has all that model_id would be asked for: shape, weights and tokenizer."""
    if _continues(config):
        return True
    source = run_of(config.load_model_path or "")
    return config.load_model_path is not None and (
        (source / "config.json").is_file() or any(source.glob("checkpoint_*/config.json"))
    )


def _preparation_hint(path: str) -> str:
    hints = {
        "prosqa_mini": "python preprocessing/prosqa.py --prefix prosqa_mini --train 2000 --valid 100 --test 100",
        "prosqa_": "python preprocessing/prosqa.py",
        **{name: f"python preprocessing/ood.py {name}" for name in ("gsm_hard", "svamp", "multiarith")},
        "gsm_": "bash preprocessing/gsm_icot.bash",
        "arithmetic": "python preprocessing/arithmetic.py",
        "machine": "python preprocessing/machine.py --out data/machine",
        "tiny_arithmetic": "make data/tiny_arithmetic/config.json",
        "tiny_prosqa": "make data/tiny_prosqa/config.json",
    }
    how = next((how for word, how in hints.items() if Path(path).name.startswith(word)), None)
    if Path(path).as_posix().endswith("data/machine/model"):
        how = "make data/machine/model/config.json"
    if "mirrored" in Path(path).parent.name:  # with its chains and its model
        how = f"python experiments/grid.py experiments/{Path(path).parent.name}.yaml --dry-run"
    return f" (make it with: {how})" if how else ""
