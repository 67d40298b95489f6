"""What every other module stands on: the configuration, the ranks, the seeds, the run logger.

torch and wandb are imported inside the functions that need them: `run.py --help` and every complaint about a
configuration must come at once, and importing torch takes seconds.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import json
import netrc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import typing
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

IGNORE = -100  # the label of a position that is not supervised, torch's default ignore_index
METHODS = ("coconut", "cot", "no_cot", "no_thoughts", "icot")
LAUNCHER = os.getppid()  # of a rank: torchrun
# thoughts.py defines them; they are named here, with what may follow the name, so that a configuration is checked
# without torch: layer is written as layer:-2 or layer:0.5, and suppressed may name its threshold, as suppressed:0.3
THOUGHTS = {
    "last": "",
    "layer": ":N",
    "pause": "",
    "projected": "",
    "normalised": "",
    "projected+normalised": "",
    "realigned": "",
    "suppressed": "[:T]",
    "last+suppressed": "[:T]",
    "embedding+suppressed": "[:T]",
}
PLACEHOLDER = re.compile(r"YOUR_\w+")


class UserError(ValueError):
    """Something a user can put right. `run.py` prints its text once, without a traceback, and exits with 2."""

    is_shared = False  # whether all ranks raise it


def split_thought(spelling: str) -> tuple[str, int | float | None]:
    """(name, number) of a thought: "layer:-2" is ("layer", -2), "layer:0.5" is ("layer", 0.5), "last" ("last", None).

    Raises ValueError that lists what there is.
    """
    name, colon, text = spelling.partition(":")
    numbers = {"": "", ":N": r":(-?\d+|\d*\.\d+)", "[:T]": r"(:(\d+|\d*\.\d+))?"}
    if name not in THOUGHTS or not re.fullmatch(numbers[THOUGHTS[name]], colon + text):
        raise ValueError(f"must be one of {', '.join(name + takes for name, takes in THOUGHTS.items())}")
    number = None if not text else float(text) if "." in text else int(text)
    return name, number


# ---------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------


def _key(default, text: str, *, choices: tuple = (), low: float | None = None, high: float | None = None, check=None):
    limits = {"choices": choices, "low": low, "high": high, "check": check}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass
class Config:
    """One run. Every field is a key of the YAML files in args/ and of `run.py FILE key=value ...`.

    The keys that the reference implementation knows keep its names and meanings; the others default to what it does.
    """

    # the run
    project: str = _key("coconut", "wandb project")
    name: str = _key(
        "run",
        "name of the run; its folder is save_path/name (default: the YAML file's name; never inherited by extends)",
    )
    save_path: str = _key("checkpoints", "folder that holds the runs")
    only_eval: bool = _key(False, "evaluate load_model_path on val_path and stop")
    seed: int = _key(0, "seeds the weights that are made anew, the data order, dropout and stage mixing", low=0)
    debug: bool = _key(
        False, "quick look in the folder NAME-debug: 5000 training and 32 validation examples, no checkpoints, no wandb"
    )
    wandb: str = _key(
        "online",
        "online | offline | disabled; online becomes offline where nobody is logged in; "
        "the variable WANDB_MODE wins over this key",
        choices=("online", "offline", "disabled"),
    )
    log_every_steps: int = _key(10, "optimizer steps between two writes to metrics.jsonl and wandb", low=1)

    # the method
    method: str = _key("coconut", " | ".join(METHODS) + "; the reference's four booleans are read too", choices=METHODS)
    thought: str = _key(
        "last",
        "what a latent position is fed: " + " | ".join(name + takes for name, takes in THOUGHTS.items()) + "; N is a "
        "layer, counted from the end where negative, or a share of the layers such as 0.5, T a threshold",
        check=split_thought,
    )
    c_thought: int = _key(1, "latent thoughts that replace one written step", low=0)
    max_latent_stage: int = _key(6, "stage after which no more thoughts are added and all steps are dropped", low=0)
    epochs_per_stage: int | list[int] = _key(
        5, "epochs of each stage; or a list with one entry a stage, the last stage going on to num_epochs", low=1
    )
    curriculum: str = _key(
        "staged", "staged | none (the last stage from the first epoch on)", choices=("staged", "none")
    )
    pad_latent_to_max: bool = _key(
        True, "in the last stage, max_latent_stage thoughts also where an example has fewer steps"
    )
    uniform_prob: float = _key(0.0, "probability that an example trains at a stage drawn from 0..n", low=0, high=1)
    eval_latents_from_steps: bool = _key(
        False,
        "with pad_latent_to_max off, evaluate with at most as many steps of thought as the example has (reference)",
    )

    icot_tokens_per_epoch: int = _key(8, "icot: reasoning tokens removed more with each epoch", low=1)
    icot_remove_all_after: int | None = _key(None, "icot: remove everything once so many tokens are removed", low=1)
    icot_smoothing: float | None = _key(4.0, "icot: o more tokens are removed with probability ~ exp(-this * o)", low=0)

    # the model
    model_id: str = _key("openai-community/gpt2", "Hugging Face id or local folder of the causal language model")
    from_scratch: bool = _key(False, "take only the shape of model_id; initialise its weights from seed")
    load_model_path: str | None = _key(
        None,
        "weights to start from or to evaluate: a checkpoint folder, a run's folder (its newest checkpoint), "
        "a Hugging Face folder, or a file of the reference",
    )
    resume: int = _key(
        0, "epoch to start from with load_model_path; in an eval-only run the epoch whose stage is used", low=0
    )

    # the data
    train_path: str | None = _key(None, "JSON list of {question, answer, steps}")
    val_path: str | None = _key(None, "the same, for validation and for eval-only runs")
    max_train_examples: int | None = _key(None, "train on the first so many examples", low=1)
    max_train_tokens: int | None = _key(
        None, "leave out training examples that are longer than this with all steps written", low=1
    )
    max_eval_examples: int | None = _key(None, "validate on the first so many examples", low=1)
    group_by_length: bool = _key(
        False, "batches of similar lengths, in random order: less padding (the paper's order is random throughout)"
    )
    num_workers: int = _key(1, "loader processes for each rank; none under a debugger", low=0)

    # the optimisation
    num_epochs: int = _key(50, "epochs in all, counted from epoch 0 of the curriculum", low=1)
    batch_size_training: int = _key(32, "examples of one forward pass on one rank", low=1)
    gradient_accumulation_steps: int = _key(1, "forward passes of one optimizer step on one rank", low=1)
    global_batch_size: int | None = _key(
        None, "examples of one optimizer step over all ranks; gradient_accumulation_steps is derived from it", low=1
    )
    lr: float = _key(1e-4, "AdamW's learning rate", low=0)
    weight_decay: float = _key(0.01, "AdamW's weight decay, on every parameter", low=0)
    lr_scheduler: str = _key("constant", "constant | linear | cosine", choices=("constant", "linear", "cosine"))
    warmup_steps: int = _key(0, "optimizer steps over which lr rises from 0", low=0)
    max_grad_norm: float | None = _key(None, "clip the gradient's norm to this", low=0)
    reset_optimizer: bool | str = _key(
        "stage",
        "never | stage | epoch: make AdamW anew when the stage changes or at every epoch; "
        "True = epoch and False = never, as the reference's code does",
        choices=("never", "stage", "epoch"),
    )

    # the machine
    strategy: str = _key(
        "auto",
        "auto | ddp | fsdp; auto is ddp, which replicates the model, unless that would take more than 60 % of a GPU's "
        "memory: then fsdp, which shards it",
        choices=("auto", "ddp", "fsdp"),
    )
    compile: bool = _key(False, "compile the decoder blocks with torch.compile: minutes at first, faster steps on GPUs")
    gradient_checkpointing: bool = _key(
        False, "keep only the inputs of the decoder blocks and compute the rest again: less memory, slower"
    )
    bf16: bool = _key(False, "mixed precision: bfloat16 arithmetic, float32 weights and optimizer")
    bf16_weights: bool = _key(False, "weights and optimizer in bfloat16 too (what the reference's bf16 does)")

    # evaluation and checkpoints
    eval_batch_size: int = _key(32, "prompts generated from at once on one rank", low=1)
    max_new_tokens: int = _key(128, "longest generation", low=1)
    save_only_improve: bool = _key(False, "save only when validation accuracy is the best of its stage so far")
    save_every_steps: int | None = _key(
        None,
        "save within epochs too, after every so many optimizer steps; only the newest two of these are kept",
        low=1,
    )
    keep_checkpoints: int | None = _key(None, "keep the newest so many epochs, and the best (default: all)", low=1)
    continue_changed: bool = _key(
        False, "continue the run in save_path/name although this configuration would have led to other weights"
    )
    skip_nonfinite: bool = _key(
        False, "leave out optimizer steps whose loss or gradient is not finite, and count them, instead of stopping"
    )

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: list[str] | tuple[str, ...] = (), needs_files: bool = True
    ) -> Config:
        """Reads a YAML file, the files that it extends, and `key=value` overrides.

        Without needs_files, paths may be missing: for looking at a plan before there is data.
        Raises UserError that lists everything that is wrong, after all of it has been looked for.
        """
        problems: list[str] = []
        layers = _yaml_layers(Path(path), problems) + _override_layer(overrides, problems)
        values: dict = {"name": Path(path).stem}
        for origin, layer in layers:
            _merge(values, layer, origin, problems)
        values = _checked(cls, values, problems)
        config = cls(**values)
        if not problems:
            problems += config.problems(launched_ranks()[1], needs_files)
        if problems:
            head = f"{path}: "
            raise UserError(head + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
        return config

    def __post_init__(self):
        if isinstance(self.reset_optimizer, bool):
            self.reset_optimizer = "epoch" if self.reset_optimizer else "never"

    @property
    def run_dir(self) -> Path:
        return Path(self.save_path) / (f"{self.name}-debug" if self.debug else self.name)

    @property
    def last_stage(self) -> int:
        """The stage in which every written step is gone: one past max_latent_stage (paper, Section 4.1)."""
        return self.max_latent_stage + 1

    def passes(self, world_size: int) -> tuple[int, int]:
        """(forward passes of a rank for one optimizer step, examples of a pass).

        The second is batch_size_training, or less where that would be more than the global batch on so many ranks.
        Raises UserError where the global batch does not divide.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps, self.batch_size_training
        share, rest = divmod(self.global_batch_size, world_size)
        size = min(share, self.batch_size_training)
        if rest or not size or share % size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is no multiple of {world_size} ranks x "
                f"batch_size_training {self.batch_size_training}"
            )
        return share // size, size

    def problems(self, world_size: int = 1, needs_files: bool = True) -> list[str]:
        """What is impossible about this configuration on this machine, a sentence each."""
        found = self._path_problems() if needs_files else []
        if Path(self.save_path).is_file():
            found.append(f"save_path {self.save_path!r} is a file, not a folder")
        if self.resume >= self.num_epochs and not self.only_eval:
            found.append(f"resume {self.resume} leaves nothing of num_epochs {self.num_epochs}")
        if self.only_eval and self.load_model_path is None:
            found.append("only_eval needs load_model_path: the checkpoint to evaluate")
        if re.search(r"[/\\]|^\.*$", self.name):
            found.append(f"name {self.name!r} must be a plain folder name")
        if isinstance(self.epochs_per_stage, list) and len(self.epochs_per_stage) > self.last_stage + 1:
            found.append(
                f"epochs_per_stage has {len(self.epochs_per_stage)} entries, but there are only {self.last_stage + 1} "
                f"stages: 0 to max_latent_stage + 1"
            )
        if self.method == "icot" and self.uniform_prob > 0:
            found.append("uniform_prob mixes stages of whole steps, but method icot removes single tokens")
        if self.from_scratch and self.load_model_path is not None:
            found.append("from_scratch and load_model_path exclude each other")
        if self.bf16 and self.bf16_weights:
            found.append("bf16 (mixed precision) and bf16_weights (everything in bfloat16) exclude each other")
        if self.compile and self.gradient_checkpointing:
            found.append("compile and gradient_checkpointing exclude each other")
        try:
            self.passes(world_size)
        except UserError as error:
            found.append(str(error))
        return found

    def _path_problems(self) -> list[str]:
        found = []
        for name, value in vars(self).items():
            if isinstance(value, str) and PLACEHOLDER.search(value):
                found.append(f"{name} is still the placeholder {value!r}: set it to your own path")
        for name in ("train_path", "val_path", "load_model_path"):
            value = getattr(self, name)
            if name == "train_path" and self.only_eval:
                continue
            if value is None:
                if name != "load_model_path":
                    found.append(f"{name} is missing: set it to a JSON list of question, answer and steps")
            elif not PLACEHOLDER.search(value):
                if not Path(value).exists():
                    found.append(f"{name} {value!r} does not exist{_preparation_hint(value)}")
                elif name != "load_model_path" and not Path(value).is_file():
                    found.append(f"{name} {value!r} is no file")
        model = Path(self.model_id)
        is_path = (
            model.is_absolute()
            or self.model_id.startswith(".")
            or (len(model.parts) > 1 and model.parents[-2].is_dir())
        )
        if is_path and not PLACEHOLDER.search(self.model_id) and not model.is_dir():
            found.append(f"model_id {self.model_id!r} does not exist{_preparation_hint(self.model_id)}")
        return found

    @classmethod
    def describe(cls) -> str:
        """Every key with its default and its meaning, for --help."""
        lines = []
        for field in dataclasses.fields(cls):
            lines.append(f"  {field.name} = {json.dumps(field.default)}\n      {field.metadata['help']}")
        return "\n".join(lines)


def _preparation_hint(path: str) -> str:
    hints = {
        "prosqa_mini": "python preprocessing/prosqa.py --prefix prosqa_mini --train 2000 --valid 100 --test 100",
        "prosqa": "python preprocessing/prosqa.py",
        "arithmetic": "python preprocessing/arithmetic.py",
        "tiny_arithmetic": "make data/tiny_arithmetic/config.json",
        "tiny_prosqa": "make data/tiny_prosqa/config.json",
    }
    how = next((how for word, how in hints.items() if Path(path).name.startswith(word)), None)
    if Path(path).parent.as_posix().endswith("data/thoughts"):
        how = "make data/thoughts/model/config.json"
    return f" (make it with: {how})" if how else ""


def _yaml_layers(path: Path, problems: list[str], seen: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """The files that `path` extends, outermost first, then `path` itself."""
    if path.resolve() in seen:
        problems.append(f"{path} extends itself")
        return []
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
        return []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path} is not valid YAML: {' '.join(str(error).split())}")
        return []
    if loaded is not None and not isinstance(loaded, dict):
        problems.append(f"{path} must hold `key: value` lines")
        return []
    layer = dict(loaded or {})
    parent = layer.pop("extends", None)
    parents = _yaml_layers(path.parent / str(parent), problems, (*seen, path.resolve())) if parent else []
    for _, inherited in parents:
        inherited.pop("name", None)  # two files must not share a run's folder by accident
    return [*parents, (str(path), layer)]


def _override_layer(overrides, problems: list[str]) -> list[tuple[str, dict]]:
    layer = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r} on the command line is not key=value")
            continue
        try:
            layer[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(f"{text!r} on the command line has no valid value")
    return [("the command line", layer)] if layer else []


def _merge(values: dict, layer: dict, origin: str, problems: list[str]) -> None:
    """Lays one file, or the command line, over `values`; the four method booleans become `method` on the way."""
    known = {field.name for field in dataclasses.fields(Config)}
    booleans = {}
    for name, value in layer.items():
        if name in ("coconut", "cot", "no_thoughts", "no_cot"):
            if not isinstance(value, bool):
                problems.append(f"{name} must be true or false, not {value!r}")
            booleans[name] = value is True
        elif name in known:
            values[name] = value
        else:
            close = difflib.get_close_matches(
                str(name), [*known, "coconut", "cot", "no_thoughts", "no_cot", "extends"], 1
            )
            hint = f": did you mean {close[0]!r}?" if close else " (run.py --help lists the keys)"
            problems.append(f"unknown key {name!r} in {origin}{hint}")
    chosen = {name for name, on in booleans.items() if on}
    if {"coconut", "no_thoughts"} <= chosen:  # as in the reference, "without thoughts" is a switch on top of coconut
        chosen.remove("coconut")
    if "method" in layer:
        chosen.add(str(layer["method"]))
    if len(chosen) > 1:
        problems.append(f"two methods at once in {origin}: {' and '.join(sorted(map(str, chosen)))}")
    elif chosen:
        values["method"] = chosen.pop()
    elif booleans and values.get("method") in (None, *booleans):
        problems.append(f"no method in {origin}: set method to one of {', '.join(METHODS)}")


def _checked(cls, values: dict, problems: list[str]) -> dict:
    """Converts each value to its field's type; what does not convert is reported and left out."""
    annotations = typing.get_type_hints(cls)
    result = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value = values[field.name]
        try:
            value = _converted(value, annotations[field.name])
            _check_range(value, field.metadata)
        except ValueError as error:
            problems.append(f"{field.name} {error}, not {values[field.name]!r}")
            continue
        result[field.name] = value
    return result


def _converted(value, annotation):
    """`value` as the annotated type. Raises ValueError with what was expected."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or value == "None":  # the reference writes the string None where YAML has null
        if type(None) in options:
            return None
        raise ValueError("must be set")
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 1e-4 as text
            except ValueError:
                pass
        if option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if option == list[int] and isinstance(value, list) and value and all(type(entry) is int for entry in value):
            return value
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list[int]: "a list of whole numbers",
    }
    raise ValueError("must be " + " or ".join(names[option] for option in options if option in names))


def _check_range(value, metadata) -> None:
    if metadata["choices"] and isinstance(value, str) and value not in metadata["choices"]:
        raise ValueError("must be one of " + ", ".join(metadata["choices"]))
    if metadata["check"]:
        metadata["check"](value)
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        if metadata["low"] is not None and not number >= metadata["low"]:
            raise ValueError(f"must be at least {metadata['low']}")
        if metadata["high"] is not None and not number <= metadata["high"]:
            raise ValueError(f"must be at most {metadata['high']}")


def configure(description: str, schedule: typing.Callable[[Config, int], str]) -> Config:
    """The configuration that the command line asks for.

    Ends the program where there is a mistake in it, and after --help or --schedule, whose text `schedule` makes.
    """
    is_main = launched_ranks()[0] == 0
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"keys and their defaults:\n{Config.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as those in args/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key of the file from here")
    parser.add_argument("--schedule", action="store_true", help="print what each epoch will do, and stop")
    if not is_main:  # one rank speaks
        parser.print_help = lambda *_: None
        parser.error = lambda message: sys.exit(report(UserError(message)))
    options = parser.parse_intermixed_args()
    try:
        config = Config.from_file(options.config, options.overrides, needs_files=not options.schedule)
    except UserError as error:
        sys.exit(report(error))
    if options.schedule:
        if is_main:
            print(schedule(config, launched_ranks()[1]))
        sys.exit()
    return config


def report(error: UserError) -> int:
    """Says what is wrong, on one rank; returns the exit code."""
    rank = launched_ranks()[0]
    if rank > 0:
        # torchrun stops a node's ranks when one of them exits: rank 0 must have had its say. Whoever is still there
        # then is alone with the error, or on another node, where one speaks before its neighbours too
        time.sleep(3 + int(os.environ.get("LOCAL_RANK", 0)))
        if error.is_shared:
            return 2
        error = UserError(f"{error} (rank {rank} on {socket.gethostname()})")
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def write_config(config: Config, folder: Path, world_size: int) -> None:
    """Writes the resolved configuration, the commit and the library versions to folder/config.yaml.

    The file is itself a configuration: `python run.py FOLDER/config.yaml` repeats the run.
    """
    comments = [f"git commit: {_git_commit()}", f"python: {sys.version.split()[0]}", f"world size: {world_size}"]
    for package in ("torch", "transformers", "numpy", "wandb"):
        try:
            comments.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            comments.append(f"{package}: not installed")
    text = "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".config.yaml"
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / "config.yaml")  # never half of it


def _git_commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with uncommitted changes" if changed else "")


# ---------------------------------------------------------------------------------------------------------------
# Ranks and seeds
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among the others. Made by `setup_distributed`."""

    rank: int
    local_rank: int
    size: int
    device: typing.Any  # torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def setup_distributed() -> World:
    """Joins the ranks that torchrun started; without torchrun, a world of one. Undone by `cleanup_distributed`.

    The device comes from LOCAL_RANK: the global rank says nothing about a node's GPUs. A process group is made for a
    world of one too, so that no collective needs an `if`.
    """
    import torch
    import torch.distributed as dist

    if "RANK" in os.environ:
        _die_with_launcher()
    _fork_when_quiet()
    rank, size = launched_ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if on_this_node > torch.cuda.device_count():
            raise UserError(
                f"{on_this_node} ranks cannot have a GPU each: this node shows {torch.cuda.device_count()}; "
                f"lower --nproc_per_node"
            )
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, local_rank, size, device)


def _die_with_launcher() -> None:
    """A torchrun that is killed takes its ranks along: left to themselves they would wait for each other for ever, and
    hold the run's folder against the next job."""
    set_parent_death_signal = 1  # of Linux's prctl
    with suppress(OSError, AttributeError):  # of another system
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != LAUNCHER:  # it was killed before
        os._exit(1)


@functools.cache  # once in a process
def _fork_when_quiet() -> None:
    os.register_at_fork(before=wait_for_quiet_threads)


def wait_for_quiet_threads() -> None:
    """Waits until no other thread of this process is doing anything; a second at most, for some never rest.

    Before a rank forks a loader process: gloo's threads free the tensors of a collective after its ranks have gone on,
    and take locks of the interpreter for it without the GIL. A process that is forked in that moment inherits the lock
    for ever and never starts (CPython 3.11), and its rank waits for the first batch, and all ranks for that one.
    """
    before, end = None, time.monotonic() + 1
    while time.monotonic() < end:
        now = _other_threads()
        if now == before and all(state == "S" for state, *_ in now.values()):
            return  # the GIL was free for a while, and nobody woke
        before = now
        time.sleep(0.002)


def _other_threads() -> dict[str, list[str]]:
    """State and number of context switches of each of this process's other threads; empty elsewhere than on Linux."""
    found = {}
    for task in Path("/proc/self/task").glob("[0-9]*"):
        if task.name != str(threading.get_native_id()):
            with suppress(OSError):  # it has just ended
                status = (task / "status").read_text()
                found[task.name] = re.findall(r"^(?:State|\w+_ctxt_switches):\s*(\w+)", status, re.M)
    return found


def cleanup_distributed() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> typing.NoReturn:
    """Ends a rank with this exit code, after its exit handlers, but without taking the interpreter down.

    gloo's threads outlive `cleanup_distributed` where something still holds the process group, and DTensor's caches
    do under FSDP. One that has a tensor to free needs the GIL for that, and Python ends threads that ask for the GIL
    while it is going down: C++ answers with SIGABRT, and a rank that has done all of its work counts as dead.
    """
    atexit._run_exitfuncs()  # Python has no public call for this
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def on_main_rank(world: World, action: typing.Callable):
    """Runs `action` on rank 0 while the others wait, and gives its result to all.

    Collective: every rank must call it. A UserError of rank 0 is raised on every rank, so that none waits for ever.
    """
    return on_every_rank(world, action if world.is_main else lambda: None)[0]


def on_every_rank(world: World, action: typing.Callable) -> list:
    """Runs `action` on every rank and gives the results of all ranks to all. A UserError of any is raised on all."""
    import torch.distributed as dist

    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    outcomes: list = [None] * world.size
    dist.all_gather_object(outcomes, (result, problem))  # all ranks
    for _, text in outcomes:
        if text is not None:
            error = UserError(text)
            error.is_shared = True
            raise error
    return [result for result, _ in outcomes]


@contextmanager
def folder_of_one(world: World, folder: Path) -> typing.Iterator[None]:
    """Holds a run's folder against other jobs until the end, or the death, of this one. Collective.

    Raises UserError, on every rank, where another job holds it.
    """
    held = []

    def hold() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / ".lock").open("a+", encoding="utf-8")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
        except (BlockingIOError, PermissionError) as error:
            if error.filename is not None:
                raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
            file.seek(0)
            raise UserError(f"{folder} is in use by another job ({file.read().strip()}): choose another name") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
            print(f"warning: {folder} is on a file system without locks: start one job only", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        held.append(file)

    on_main_rank(world, hold)
    try:
        yield
    finally:
        for file in held:
            file.truncate(0)
            file.close()


class Interruption:
    """SIGTERM and SIGUSR1, with which clusters announce that a job has to go: the ranks agree to stop at one step.

    A second signal exits at once. One within a second of the first does not count as another: launchers hand on what
    the cluster has sent to every process anyway. Used as a context; `asked` is collective.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, world: World):
        self.world = world
        self.received: float | None = None  # when
        self._question = None  # (flag, work) of the last time that the ranks asked each other
        self._before = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        if self.received is not None and time.monotonic() - self.received > 1:
            os._exit(128 + number)
        self.received = self.received or time.monotonic()

    def asked(self) -> bool:
        """Whether a rank had been signalled when they last met here. The answer is that of the call before, so that no
        step waits for it. Collective: every rank must call it, after every step."""
        if self.world.size == 1:
            return self.received is not None
        answer = self.settle()
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(self.received is not None))
        self._question = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)  # all ranks
        return answer

    def settle(self) -> bool:
        """The answer that is still out. Collective: at the end of the steps."""
        if self.world.size == 1:
            return self.received is not None
        if self._question is None:
            return False
        flag, work = self._question
        work.wait()
        self._question = None
        return bool(flag)


def ignore_signals(*_) -> None:
    """For processes that serve a rank: it is the rank that decides what to do, and ends them."""
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def under_debugger() -> bool:
    """Whether a debugger waits for breakpoints. Loader processes would run past those in the data's code."""
    if sys.gettrace() is not None:
        return True
    monitoring = getattr(sys, "monitoring", None)  # what debuggers use from Python 3.12 on
    return monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None


def seed_everything(*entropy: int) -> None:
    """Seeds python, numpy and torch (CPU and GPU) from the given numbers, say (seed, rank)."""
    import random

    import numpy as np
    import torch

    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


# ---------------------------------------------------------------------------------------------------------------
# The run logger
# ---------------------------------------------------------------------------------------------------------------


def progress_bar(iterable, title: str, unit: str, shown: bool):
    """tqdm, on one rank; in a log file it writes a line now and then instead of many a second."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, title, unit=unit, leave=False, disable=not shown, mininterval=interval, dynamic_ncols=True)


class RunLogger:
    """metrics.jsonl always, wandb where it is wanted; silent on every rank but 0.

    Args:
        folder: where metrics.jsonl and wandb/ go; made if it is not there.
        wandb_id: of the run that is being continued, so that its curves go on.
    """

    def __init__(self, config: Config, world: World, folder: Path, wandb_id: str | None = None):
        self.world = world
        self.wandb = None
        self.wandb_id = wandb_id
        self.started = time.time()
        if not world.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self.file.write("\n")  # a job that died has left half a line
        mode = "disabled" if config.debug else wandb_mode(config.wandb)
        if mode != "disabled":
            self._start_wandb(config, folder, mode)

    def _start_wandb(self, config: Config, folder: Path, mode: str) -> None:
        import wandb

        # the configuration and the numbers are all that is sent: no code, no console, no machine metadata
        settings = {"init_timeout": 30, "silent": True, "console": "off", "save_code": False, "x_disable_meta": True}
        arguments = {
            "project": config.project,
            "name": config.name,
            "config": dataclasses.asdict(config),
            "dir": str(folder),
            "id": self.wandb_id,
            "resume": "allow" if self.wandb_id else None,
        }
        try:
            self.wandb = wandb.init(mode=mode, settings=wandb.Settings(**settings), **arguments)
        except Exception as error:  # whatever a tracker's server does, training goes on
            self.say(f"wandb did not start, logging offline: {' '.join(str(error).split())[:200]}")
            self.wandb = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
        self.wandb_id = self.wandb.id

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bars."""
        if self.world.is_main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def log(self, event: str, **values) -> None:
        """One line of metrics.jsonl: {"event", "time" (seconds since the run started), ...values}."""
        if not self.world.is_main:
            return
        record = {"event": event, "time": round(time.time() - self.started, 3), **values}
        try:
            self.file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.file.name} cannot be written: {error.strerror}") from None
        if self.wandb is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
            self.wandb.log({f"{event}/{k}": v for k, v in numbers.items()}, step=values.get("step"))

    def close(self) -> None:
        if self.world.is_main:
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def read_log(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; lines that a job left half written are passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def sync_to_disk(path: Path, deep: bool = True) -> None:
    """Waits until a folder, and what is in it, would survive a power cut."""
    for part in [*path.rglob("*"), path] if deep else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def wandb_mode(wanted: str) -> str:
    """online | offline | disabled: what is wanted, but never a login prompt."""
    mode = os.environ.get("WANDB_MODE", wanted)
    if mode != "online" or os.environ.get("WANDB_API_KEY"):
        return mode
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"
