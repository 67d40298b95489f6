"""The configuration of a run: its keys, YAML files, overrides, rows, checks and --help.

This module imports neither torch nor transformers, so that `run.py --help` and configuration errors appear at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

import methods
from methods import LARGEST_FACTOR, LARGEST_SAMPLE, key
from trainer.commands import make_parser
from trainer.files import why_unreadable
from trainer.run_folder import is_on_hub, split_choice
from utils import UserError, launched_ranks, print_error, print_result

METHODS = methods.names()
METHOD_BOOLEANS = ("coconut", "cot", "no_thoughts", "no_cot")  # keys of the reference, replaced by `method`
LARGEST_INTEGER = 2**63 - 1  # the largest that torch and numpy take
MIN_TEMPERATURE = 0.001  # below it logits overflow
COMMAND_LINE = "the command line"
PLACEHOLDER = re.compile(r"YOUR_\w+")
NO_FILE_NAME = re.compile(r"[/\\\0]|^\.*$|.{201}")  # 255 bytes are the limit, and temporary files have longer names
NOTHING = ("", "~", "null", "Null", "NULL", "None")  # the reference writes None for YAML's null
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
TYPE_NAMES |= {list[int]: "a list of whole numbers", dict[str, str]: "a mapping of names to texts"}
# name -> (suffix, module): "layer" has the suffix ":N", as in layer:-2, and "suppressed" may have one, "[:T]"
THOUGHTS = {"last": ("", "model.thought")} | {name: (takes, module) for name, takes, module in methods.thoughts()}
SUFFIXES = {"": "", ":N": r":(-?\d{1,6}|\d{0,6}\.\d{1,20})", "[:T]": r"(:(\d{1,6}|\d{0,6}\.\d{1,20}))?"}
SUFFIXES |= {"[:P]": r"(:[1-9]\d{0,5})?", "[:st]": "(:st)?"}
SPELLINGS = ", ".join(name + takes for name, (takes, _) in THOUGHTS.items())
PATHS = ("save_path", "train_path", "val_path", "test_path", "model_id", "load_model_path")
setting = partial(key, free=True)


def split_thought(spelling: str) -> tuple[str, int | float | str | None]:
    """Splits "layer:-2" into ("layer", -2), "layer:0.5" into ("layer", 0.5), "token:st" into ("token", "st") and "last"
    into ("last", None). Raises ValueError for an unknown thought."""
    name, colon, text = spelling.partition(":")
    if name not in THOUGHTS or not re.fullmatch(SUFFIXES[THOUGHTS[name][0]], colon + text):
        raise ValueError(f"must be one of {SPELLINGS}")
    if text in ("", "st"):
        return name, text or None
    return name, float(text) if "." in text else int(text)


def split_noise(spelling: float | str) -> tuple[float, bool]:
    """Splits thought_noise into (S, is_relative): 0.3 is (0.3, True), "absolute:0.6" is (0.6, False). Relative noise is
    scaled by the thought's norm. Raises ValueError."""
    text = str(spelling).removeprefix("absolute:")
    with suppress(ValueError):
        if 0 <= float(text) <= LARGEST_FACTOR:
            return float(text), text == str(spelling)
    raise ValueError("must be a number of at least 0, or absolute:NUMBER")


def _check_temperature(temperature: float) -> None:
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy decoding) or at least {MIN_TEMPERATURE}")


def _with_keys_of_methods(cls):
    """Adds the keys that each method declares in methods/."""
    for rules in methods.all_rules().values():
        for name, annotation, field in methods.own_keys(rules):
            if name in cls.__annotations__:  # it would change the default for every method
                raise TypeError(f"{rules.__module__} defines the key {name}, which exists already")
            cls.__annotations__[name] = annotation
            setattr(cls, name, field)
    return cls


@dataclass(init=False)
@_with_keys_of_methods
class Config:
    """The configuration of a run. Every field is a key of the YAML files in args/ and of `run.py FILE key=value ...`.

    Keys of the reference keep its names; docs/from_reference.md lists what differs from it. A method's own keys are
    in its file of methods/ and are checked for every method.
    """

    # --- The run ---
    project: str = setting("coconut", "wandb project")
    name: str = setting(
        "run",
        "the run's folder is save_path/name (default: the YAML file's name and row; `extends` does not inherit it)",
    )
    save_path: str = setting("checkpoints", "folder that holds the runs")
    only_eval: bool = setting(
        False,
        "evaluate instead of training: the run's best checkpoint on test_path. load_model_path and val_path replace "
        "these only if they are set in the same file as only_eval or later; without test_path, load_model_path is "
        "evaluated on val_path",
    )
    seed: int = key(0, "seeds new weights, data order, dropout and stage mixing", low=0)
    debug: bool = setting(
        False, "quick look, in folder NAME-debug: 5000 training and 32 validation examples, no checkpoints, no wandb"
    )
    wandb: str = setting(
        "online",
        "online | offline | disabled; online becomes offline without a login; the variable WANDB_MODE overrides this",
        choices=("online", "offline", "disabled"),
    )
    log_every_steps: int = setting(
        10, "optimizer steps between two writes to metrics.jsonl and wandb, which have a record of every step", low=1
    )

    # --- The method ---
    method: str = key(
        "coconut", " | ".join(METHODS) + "; the reference's four booleans work too", choices=METHODS, shapes=True
    )
    thought: str = key(
        "last",
        f"what a latent position is fed: {SPELLINGS.replace(',', ' |')}; N: a layer, from the end if negative, or a "
        "fraction of the depth such as 0.5; T: a threshold; P: a width; st: straight-through gradient",
        check=split_thought,
        shapes=True,
    )
    c_thought: int = key(1, "latent thoughts that replace one written step", low=0, shapes=True)
    max_latent_stage: int = key(
        6,
        "last stage that adds thoughts; the stage after it drops all remaining steps",
        low=0,
        high=100_000,
        shapes=True,
    )
    epochs_per_stage: int | list[int] = key(
        5, "epochs of each stage, or a list with one entry per stage; the last stage lasts until num_epochs", low=1
    )
    curriculum: str = key("staged", "staged | none (only the last stage)", choices=("staged", "none"))
    pad_latent_to_max: bool = key(
        True, "in the last stage, max_latent_stage thoughts even for examples with fewer steps", shapes=True
    )
    uniform_prob: float = key(
        0.0, "probability that an example with n steps is trained at a stage drawn from 0..n", low=0, high=1
    )
    advance_at: float | None = key(None, "validation accuracy that ends a stage early", low=0, high=1)
    advance_after: int = key(1, "consecutive epochs of a stage that must reach advance_at", low=1, later=True)
    latent_markers: str = key(
        "both",
        "both | none: whether start and end markers surround the latents (paper: both)",
        choices=("both", "none"),
        shapes=True,
    )
    step_separator: str = key("\n", 'text after each written step; "" for single-token steps', empty=True, shapes=True)
    eval_latents_from_steps: bool = setting(
        False,
        "with pad_latent_to_max off, evaluate with at most c_thought thoughts for each step of the example (reference)",
    )
    eval_latents: int | None = setting(None, "with only_eval: number of latents, instead of the stage's", low=0)

    # --- The model ---
    model_id: str = setting("openai-community/gpt2", "Hugging Face id or local folder of the causal language model")
    from_scratch: bool = key(False, "take only the architecture of model_id and initialise its weights from seed")
    load_model_path: str | None = setting(
        None,
        "weights to start from or to evaluate: a checkpoint folder, a run's folder (its newest epoch checkpoint), "
        "RUN@best, RUN@12 (after 12 epochs), a Hugging Face folder, a weight file of the reference, or org/name:file "
        "on the hub",
    )
    trust_remote_code: bool = setting(
        False, "run the Python code in model_id, for a family that transformers does not include: read the code first"
    )
    lora_rank: int | None = key(
        None,
        "LoRA: rank of the updates of linear layers, which alone are trained",
        low=1,
        high=65_536,
        later=True,
        shapes=True,
    )
    lora_alpha: int = key(32, "LoRA: the updates are scaled by lora_alpha / lora_rank", low=1, later=True, shapes=True)
    lora_dropout: float = key(0.0, "LoRA: dropout on the input of the updates", low=0, high=1, later=True)
    resume: int = key(
        0, "epoch to start from, with load_model_path; with only_eval: the epoch whose stage is evaluated", low=0
    )

    # --- The data ---
    train_path: str | None = setting(None, "JSON list of {question, answer, steps}")
    val_path: str | dict[str, str] | None = setting(
        None, "the same, for validation; with only_eval also several files: {name: path, other: path}"
    )
    test_path: str | dict[str, str] | None = setting(None, "the same, for only_eval")
    max_train_examples: int | None = key(None, "use only the first N training examples", low=1)
    max_train_tokens: int | None = key(None, "leave out training examples with more tokens, counting all steps", low=1)
    max_eval_examples: int | None = setting(
        None, "use only the first N validation examples; of each test set, too", low=1
    )
    group_by_length: bool = key(False, "batches of similar lengths in random order: less padding (paper: random)")
    num_workers: int = setting(1, "no effect, accepted for older files: a thread prepares the next batch", low=0)

    # --- The optimisation ---
    num_epochs: int = key(50, "total number of epochs, counted from epoch 0 of the curriculum", low=1, high=1_000_000)
    batch_size_training: int = key(32, "examples of one micro-batch: a forward pass on one rank", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches of one optimizer step on one rank", low=1)
    global_batch_size: int | None = key(
        None, "examples of one optimizer step over all ranks; determines gradient_accumulation_steps", low=1
    )
    lr: float = key(1e-4, "learning rate of AdamW", low=0, high=LARGEST_FACTOR)
    weight_decay: float = key(0.01, "weight decay of AdamW, on every parameter", low=0, high=LARGEST_FACTOR)
    lr_scheduler: str = key("constant", "constant | linear | cosine", choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(0, "optimizer steps of linear warm-up", low=0)
    max_grad_norm: float | None = key(None, "clip the gradient norm to this value, log it (0 or null: neither)", low=0)
    reset_optimizer: bool | str = key(
        "stage",
        "never | stage | epoch: when AdamW is re-initialised; True = epoch, False = never, as in the reference's code",
        choices=("never", "stage", "epoch"),
    )

    # --- The machine ---
    strategy: str = setting(
        "auto",
        "auto | ddp | fsdp; auto is ddp, or fsdp for a model that takes over 60 % of a GPU's memory",
        choices=("auto", "ddp", "fsdp"),
    )
    compile: bool = setting(
        False, "torch.compile the decoder blocks, for passes of several columns: minutes of compilation"
    )
    gradient_checkpointing: bool = setting(False, "recompute the decoder blocks in the backward: less memory, slower")
    bf16: bool = key(False, "mixed precision: bfloat16 arithmetic, float32 weights and optimizer")
    bf16_weights: bool = key(False, "weights and optimizer in bfloat16 too (the reference's bf16)")
    tf32: bool = key(False, "TF32 for float32 matrix products on GPUs: faster, 10-bit mantissa", later=True)

    # --- Evaluation and checkpoints ---
    eval_batch_size: int = setting(32, "prompts of one generation batch on one rank", low=1)
    max_new_tokens: int | None = setting(
        None, "maximum number of generated tokens (null: 64 with gsm in val_path, else 128, as in the reference)", low=1
    )
    val_samples: int = setting(
        0,
        "sampled answers per validation question, beside the greedy one, for pass@k and vote (0: none)",
        low=0,
        high=LARGEST_SAMPLE,
    )
    temperature: float = key(
        0.0, "temperature of sampled answers (0: greedy)", low=0, check=_check_temperature, later=True
    )
    thought_noise: float | str = key(
        0.0,
        "S | absolute:S: Gaussian noise on each thought z of a sampled answer, with standard deviation S |z| / sqrt(D) "
        "or S in each of the D dimensions",
        check=split_noise,
        later=True,
    )
    thought_dropout: float = setting(
        0.0, "dropout of the decoder blocks before the last latent, in sampled validation answers", low=0, high=0.99
    )
    answer_match: str = setting(
        "text",
        "text | number: an answer is right if it is the gold text without commas (reference), or if its last number is "
        "within 0.001 of the gold number",
        choices=("text", "number"),
    )
    save_only_improve: bool = setting(False, "keep an epoch only if its accuracy is the best of its stage so far")
    save_every_steps: int | None = setting(None, "also save within epochs, every N optimizer steps", low=1)
    keep_checkpoints: int | None = setting(None, "number of newest epochs to keep, with the best (default: all)", low=1)
    continue_changed: bool = setting(False, "continue a run even if keys that decide its weights have changed")
    skip_nonfinite: bool = setting(False, "skip and count optimizer steps with a loss or gradient that is not finite")

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = (), needs_files: bool = True) -> Config:
        """Reads a YAML file, the files it extends, the chosen row and `key=value` overrides.

        needs_files=False accepts missing files, to plan a run before its data exist. Raises UserError with the list of
        all problems.
        """
        problems: list[str] = []
        layers = [*_layers_of(Path(path)), _command_line(overrides, problems)]
        row = _choose_row(layers, problems)
        values: dict = {"name": "-".join([Path(path).stem, *row])}
        evaluates, beside = False, set()  # beside: the keys that are set in the same layer as only_eval or later
        for layer in layers:
            evaluates = BOOLEANS.get(str(layer.values.get("only_eval", evaluates)).lower(), False)
            beside = beside | layer.values.keys() if evaluates else set()
            if "val_path" in layer.values:
                beside -= {"test_path"} - layer.values.keys()  # an earlier one
            _merge(values, layer, problems)
        valid = _checked(values, problems)
        config = cls(**valid)
        if config.only_eval:
            config._set_up_evaluation(beside, problems)
        invalid = values.keys() - valid.keys()  # these have the default in config, and a problem of their own
        found = config.problems(launched_ranks()[1], needs_files)
        problems += [text for text in found if not any(re.search(rf"\b{name}\b", text) for name in invalid)]
        if problems:
            raise UserError(f"{path}: " + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
        return config

    def __init__(self, **values):
        """Gives missing keys the defaults of the method (`methods.with_defaults`), else of the fields."""
        values = methods.with_defaults(values)
        fields = {field.name: field for field in dataclasses.fields(self)}
        if unknown := values.keys() - fields.keys():
            raise TypeError(f"no keys of a configuration: {', '.join(sorted(unknown))}")
        for name, field in fields.items():
            setattr(self, name, values.get(name, field.default))
        if isinstance(self.reset_optimizer, bool):
            self.reset_optimizer = "epoch" if self.reset_optimizer else "never"

    def _set_up_evaluation(self, beside: set[str], problems: list[str]) -> None:
        """Chooses what an only_eval run evaluates, load_model_path, and the data, val_path. Keys that are not in
        `beside` belong to the training."""
        if self.test_path is not None and ("test_path" in beside or "val_path" not in beside):
            self.val_path = self.test_path
        elif not beside & {"load_model_path", "val_path"}:
            problems.append(f"only_eval evaluates {Path(self.save_path) / self.name}@best on test_path: set test_path")
        self.test_path = None
        for name in {"load_model_path", "resume", "from_scratch"} - beside:
            setattr(self, name, getattr(Config, name))  # the default
        if self.load_model_path is None:
            self.load_model_path = f"{Path(self.save_path) / self.name}@best"  # a debug run saves no checkpoint

    @property
    def rules(self) -> type[methods.Method]:
        """The method's class `Method`, which needs no torch."""
        return methods.rules_of(self.method)

    @property
    def run_dir(self) -> Path:
        return Path(self.save_path) / (f"{self.name}-debug" if self.debug else self.name)

    def by_set(self) -> dict[str, Config]:
        """Returns one configuration for each file of val_path, by the file's name; "" is the name of a single path."""
        paths = self.val_path if isinstance(self.val_path, dict) else {"": self.val_path}
        return {name: dataclasses.replace(self, val_path=path) for name, path in paths.items()}

    @property
    def n_new_tokens(self) -> int:
        """The maximum number of generated tokens."""
        return self.max_new_tokens or (64 if "gsm" in str(self.val_path) else 128)

    @property
    def has_latents(self) -> bool:
        """Whether the method's sequences have latent positions."""
        return self.rules.has_latents

    @property
    def arithmetic(self) -> str:
        """The arithmetic of matrix products on a GPU: bf16 | tf32 | float32."""
        return "bf16" if self.bf16 or self.bf16_weights else "tf32" if self.tf32 else "float32"

    @property
    def last_stage(self) -> int:
        """The stage that drops all written steps, max_latent_stage + 1 (paper, Section 4.1)."""
        return self.max_latent_stage + 1

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Returns (micro-batches of one optimizer step on one rank, examples of a micro-batch).

        A micro-batch has batch_size_training examples. If a rank's share of the global batch is smaller, it has as many
        as divide the share and the examples of one mean over tokens (dataset.EpochPlan). Raises UserError if the global
        batch cannot be divided so.
        """
        batch, most = self.global_batch_size, self.batch_size_training
        if batch is None:
            return self.gradient_accumulation_steps, most
        share, rest = divmod(batch, world_size)
        size = most if share > most else math.gcd(share, min(batch, most))
        if rest or not share or share % size:
            raise UserError(
                f"global_batch_size {batch} is no multiple of {world_size} ranks x batch_size_training {most}"
            )
        return share // size, size

    def problems(self, world_size: int = 1, needs_files: bool = True) -> list[str]:
        """Returns what makes this configuration impossible, one sentence per problem."""
        found = [*(self.missing_files() if needs_files else []), *self._of_names(), *self._of_combinations()]
        for rules in methods.all_rules().values():
            found += rules.problems(self)
        if not self.only_eval:  # an evaluation has no optimizer steps
            try:
                self.micro_batches(world_size)
            except UserError as error:
                found.append(str(error))
        return found

    def _of_names(self) -> Iterator[str]:
        """Checks the run's folder and the names of evaluation files, which become file names."""
        if reason := why_unreadable(self.save_path):
            yield f"save_path {self.save_path!r} cannot be reached: {reason}"
        elif Path(self.save_path).is_file():
            yield f"save_path {self.save_path!r} is a file, not a folder"
        elif Path(self.save_path).is_symlink() and not Path(self.save_path).exists():
            yield f"save_path {self.save_path!r} is a link to {os.readlink(self.save_path)!r}, which does not exist"
        if NO_FILE_NAME.search(self.name):
            yield f"name {self.name!r} must be a plain folder name, of at most 200 characters"
        if isinstance(self.val_path, dict) and not self.only_eval:
            yield "val_path names several files, which needs only_eval: a training run takes one path"
        for option in ("val_path", "test_path"):
            paths = getattr(self, option)
            for name in filter(NO_FILE_NAME.search, paths if isinstance(paths, dict) else ()):
                yield f"{option}: {name!r} must be a plain file name, of at most 200 characters"

    def _of_combinations(self) -> list[str]:
        """Checks keys that exclude or need each other."""
        n_entries = len(self.epochs_per_stage) if isinstance(self.epochs_per_stage, list) else 0
        skips_all, n_stages = self.resume >= self.num_epochs and not self.only_eval, self.last_stage + 1
        loads, thinks = self.load_model_path is not None, self.has_latents and self.thought != "pause"
        forced = self.eval_latents is not None and not (self.only_eval and self.has_latents)
        disturbed = (split_noise(self.thought_noise)[0] or self.thought_dropout) and not thinks
        wrong = [
            (skips_all, f"resume {self.resume} leaves no epoch of num_epochs {self.num_epochs}"),
            (forced, "eval_latents needs only_eval and a method with latents"),
            (self.advance_after > 1 and self.advance_at is None, "advance_after needs advance_at"),
            (n_entries > n_stages, f"epochs_per_stage has {n_entries} entries, but there are only {n_stages} stages"),
            (self.from_scratch and loads, "from_scratch and load_model_path exclude each other"),
            (self.from_scratch and self.lora_rank, "from_scratch and lora_rank exclude each other"),
            (self.bf16 and self.bf16_weights, "bf16 (mixed precision) and bf16_weights exclude each other"),
            (self.compile and self.gradient_checkpointing, "compile and gradient_checkpointing exclude each other"),
            (self.compile and self.thought_dropout, "compile and thought_dropout exclude each other"),
            (disturbed, "thought_noise and thought_dropout need latents and a thought other than pause"),
        ]
        return [text for is_wrong, text in wrong if is_wrong]

    def missing_files(self, but_weights: bool = False) -> Iterator[str]:
        """Yields a sentence for each missing file and each placeholder; but_weights: except load_model_path's."""
        data = {f"val_path {name}".strip(): one.val_path for name, one in self.by_set().items()}
        for name, value in {**vars(self), **data}.items():
            if isinstance(value, str) and PLACEHOLDER.search(value):
                yield f"{name} is still the placeholder {value!r}: set it to your own path"
        for name, value in data.items() if self.only_eval else [("train_path", self.train_path), *data.items()]:
            if value is None:
                yield f"{name} is missing: set it to a JSON list of question, answer and steps"
            elif not PLACEHOLDER.search(value):
                yield from _missing(name, value) or ([] if Path(value).is_file() else [f"{name} {value!r} is no file"])
        source, model = self.load_model_path, Path(self.model_id)
        continues = not self.only_eval and _holds(self.run_dir, "checkpoint_*/coconut.json")
        # a run that continues reads its own checkpoint; files on the hub are looked up later
        if source and not (continues or but_weights or is_on_hub(source)):
            yield from _missing("load_model_path", str(split_choice(source)[0]))
        has_shape = continues or (source and _holds(split_choice(source)[0], "config.json", "checkpoint_*/config.json"))
        problem = why_unreadable(self.model_id)
        is_path = model.is_absolute() or self.model_id.startswith(".")
        if not (is_path or problem) and len(model.parts) > 1:
            is_path = model.parents[-2].is_dir()  # org/name on the hub has no folder org here
        if problem or (is_path and not has_shape):
            yield from _missing("model_id", self.model_id)

    @classmethod
    def problems_of(cls, values: dict) -> list[str]:
        """Returns what is wrong with values from a JSON file, one sentence per problem; ignores unknown keys."""
        problems: list[str] = []
        valid = _checked(values, problems).items()
        return problems + [f"{name} must be {v!r}, not {values[name]!r}" for name, v in valid if v != values[name]]

    @classmethod
    def describe(cls) -> str:
        """Returns the text of --help: every key with its default and meaning."""
        fields = dataclasses.fields(cls)
        lines = [f"  {field.name} = {json.dumps(field.default)}\n      {field.metadata['help']}" for field in fields]
        others = {name: rules.defaults for name, rules in methods.all_rules().items() if rules.defaults}
        lines += ["\nother defaults of methods:", *(f"  {name}: {json.dumps(keys)}" for name, keys in others.items())]
        return "\n".join(lines)


# key of a method that changes what its trained model generates, such as stop_threshold -> default
GENERATION_KEYS = {
    key.name: key.default for key in dataclasses.fields(Config) if key.metadata["free"] and key.metadata["shapes"]
}


def _holds(folder: Path, *patterns: str) -> bool:
    return not why_unreadable(folder) and any(any(folder.glob(pattern)) for pattern in patterns)


def _missing(name: str, value: str) -> list[str]:
    """Returns a sentence, in a list, if the path of a key does not exist; else []."""
    if reason := why_unreadable(value):
        return [f"{name} {value!r} cannot be reached: {reason}"]
    exists = Path(value).exists() or PLACEHOLDER.search(value)
    return [] if exists else [f"{name} {value!r} does not exist{_preparation_hint(value)}"]


MADE_BY = {  # pattern of a path in args/ -> the command that makes it
    "prosqa_mini_*": "python preprocessing/prosqa.py --prefix prosqa_mini --train 2000 --valid 100 --test 100",
    "prosqa_*": "python preprocessing/prosqa.py",
    "prontoqa_*": "python preprocessing/prontoqa_generate.py",
    **{f"{name}*": f"python preprocessing/ood.py {name}" for name in ("gsm_hard", "svamp", "multiarith")},
    "gsm_*": "bash preprocessing/gsm_icot.bash",
    "arithmetic_*": "python preprocessing/arithmetic.py",
    "machine/*": "python experiments/grid.py experiments/table1_mini.yaml --dry-run",
    "tiny_arithmetic": "python preprocessing/tiny_model.py data/arithmetic_train.json --out data/tiny_arithmetic "
    "--tokenizer char --shape llama --width 64 --untied",
    "tiny_prosqa": "python preprocessing/tiny_model.py data/prosqa_mini_train.json --out data/tiny_prosqa",
}


def _preparation_hint(value: str) -> str:
    """Returns " (make it with: COMMAND)" for a missing file, model or run that a script of this repository makes."""
    path, root = Path(value), Path(__file__).parent
    grid, run = f"experiments/{path.parent.name}.yaml", f"args/{path.name.replace('-', '_')}.yaml"
    commands = [f"python experiments/grid.py {grid} --dry-run"] if (root / grid).is_file() else []
    commands += [f"python run.py {run}"] if (root / run).is_file() else []
    commands += [command for pattern, command in MADE_BY.items() if path.match(pattern)]
    return f" (make it with: {commands[0]})" if commands else ""


# --- Files and overrides ---


class Layer(typing.NamedTuple):
    """The keys of one file, row or command line. Values are texts, or lists and mappings of texts."""

    origin: str
    values: dict
    rows: dict[str, dict]


class RepeatedKey(yaml.YAMLError):
    pass


class _TextLoader(yaml.BaseLoader):
    """Loads all scalars as text, and merges `<<: *anchor` as yaml.safe_load, with which the reference reads its files.
    Raises RepeatedKey for a key that a mapping has twice."""

    flatten_mapping = yaml.SafeLoader.flatten_mapping

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                continue
            line = name.start_mark.line + 1
            if name.value in lines:
                raise RepeatedKey(f"the key {name.value!r} is set twice, in lines {lines[name.value]} and {line}")
            lines[name.value] = line
        return node


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<"), ["<"])


def read_yaml(path: Path) -> dict:
    """Reads a YAML mapping whose values are texts, or lists and mappings of texts. Raises UserError."""
    try:
        values = _TextLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path} must hold `key: value` lines")
    return values or {}


def _layers_of(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """Returns the files that `path` extends, outermost first, then `path` itself. Raises UserError."""
    if problem := why_unreadable(path):
        raise UserError(f"cannot read {shown(str(path))}: {problem}")
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself")
    values, layers = read_yaml(path), []
    if (parent := values.pop("extends", "")) not in NOTHING:
        try:
            parent_path = path.parent / expanded(converted(parent, str))
        except ValueError as error:
            raise UserError(f"extends in {path} {error}, not {shown(parent)}") from None
        layers = _layers_of(parent_path, (*seen, path.resolve()))
    for layer in layers:
        layer.values.pop("name", None)  # two files must not share a run's folder by accident
    rows = values.pop("rows", {})
    if not isinstance(rows, dict) or not all(isinstance(keys, dict) for keys in rows.values()):
        raise UserError(f"rows in {path} must be a mapping of names to `key: value` lines")
    return [*layers, Layer(str(path), values, rows)]


def _command_line(overrides: Sequence[str], problems: list[str]) -> Layer:
    """Parses key=value arguments. Lists, mappings and quoted texts are YAML; any other value is taken literally."""
    values: dict = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r} on the command line is not key=value")
            continue
        if name in values:
            problems.append(f"{name} is set twice on the command line")
        values[name] = value.strip()
        if values[name].startswith(("[", "{", "'", '"')):
            try:
                values[name] = _TextLoader(value).get_single_data()
            except RepeatedKey as error:
                problems.append(f"{name} on the command line: {error}")
                del values[name]
            except (yaml.YAMLError, RecursionError):
                pass  # taken literally
    return Layer(COMMAND_LINE, values, {})


def _choose_row(layers: list[Layer], problems: list[str]) -> list[str]:
    """Inserts the chosen row as a layer after the file that defines it. Returns what the row adds to the run's name:
    nothing if another file that extends this one has chosen it, since that file has a name of its own."""
    rows = {name: keys for layer in layers for name, keys in layer.rows.items()}
    chosen, chooser = None, None
    for layer in layers:
        if "row" in layer.values:
            chosen, chooser = layer.values.pop("row"), layer
    if not isinstance(chosen, str) or chosen not in rows:
        if rows:
            what = "set row=NAME" if chosen is None else f"unknown row {shown(chosen)} in {chooser.origin}"
            problems.append(f"{what}: the rows are {', '.join(rows)}")
        elif chosen is not None:
            problems.append(f"row {shown(chosen)} in {chooser.origin}: there are no rows to choose from")
        return []
    keys = dict(rows[chosen])
    earlier = list(rows)[: list(rows).index(chosen)]
    while (parent := keys.pop("extends", None)) in earlier:
        keys = {**rows[parent], **keys}
    if parent is not None:
        problems.append(f"row {chosen} extends {shown(parent)}, which is no earlier row")
    number = next(number for number, layer in enumerate(layers) if chosen in layer.rows)
    layers.insert(number + 1, Layer(f"{layers[number].origin}, row {chosen}", keys, {}))
    return [chosen.replace("_", "-")] if chooser.origin == COMMAND_LINE or chosen in chooser.rows else []


def _merge(values: dict, layer: Layer, problems: list[str]) -> None:
    """Overrides `values` with those of a layer, whose method booleans become `method`."""
    batch = values.get("global_batch_size", "")
    accumulates = "gradient_accumulation_steps" in layer.values and "global_batch_size" not in layer.values
    if accumulates and batch not in NOTHING:
        problems.append(
            f"gradient_accumulation_steps in {layer.origin} has no effect, since global_batch_size {batch} determines "
            "it: set that instead, or to null"
        )
    known = {field.name for field in dataclasses.fields(Config)}
    booleans = {name: BOOLEANS.get(str(layer.values[name]).lower()) for name in METHOD_BOOLEANS if name in layer.values}
    for name, value in layer.values.items():
        if name in booleans:
            if booleans[name] is None:
                problems.append(f"{name} must be true or false, not {shown(value)}")
        elif name in known:
            values[name] = value
        else:
            close = difflib.get_close_matches(name, [*known, *METHOD_BOOLEANS, "extends", "row", "rows"], 1)
            hint = f": did you mean {close[0]!r}?" if close else " (run.py --help lists the keys)"
            hint = ": it belongs into a file" if name in ("extends", "rows") else hint
            hint = ": a row cannot choose another one, but extend it" if name == "row" else hint
            problems.append(f"unknown key {name!r} in {layer.origin}{hint}")
    chosen = {name for name, on in booleans.items() if on}
    if {"coconut", "no_thoughts"} <= chosen:  # in the reference, no_thoughts is a switch of coconut
        chosen.remove("coconut")
    if "method" in layer.values:
        chosen.add(str(layer.values["method"]))
    if len(chosen) > 1:
        problems.append(f"two methods at once in {layer.origin}: {' and '.join(sorted(chosen))}")
    elif chosen:
        values["method"] = layer.values.get("method", *chosen)
    elif booleans.keys() == {*METHOD_BOOLEANS}:  # all false, in the reference: latents without feedback
        values |= {"method": "coconut", "thought": values.get("thought", "pause")}
    elif booleans and ("method" not in values or values["method"] in booleans):
        problems.append(f"no method in {layer.origin}: set method to one of {', '.join(METHODS)}")


# --- Types and limits ---


def converted(value, annotation, empty: bool = False):
    """Converts a value of a file to the annotated type of its key. empty: whether "" is a text, not null. Raises
    ValueError that names the expected type."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or (isinstance(value, str) and value in NOTHING and not (empty and value == "")):
        if type(None) in options:
            return None
        raise ValueError("must be set")
    for option in options:
        with suppress(ValueError, KeyError):
            return _as(option, value)
    raise ValueError("must be " + " or ".join(TYPE_NAMES[option] for option in options if option in TYPE_NAMES))


def _as(kind, value):
    """Converts a value to one type. Raises ValueError or KeyError."""
    if kind is bool:
        return BOOLEANS[str(value).lower()]
    if kind is int and type(value) in (int, str):
        return int(value)
    if kind is float and type(value) in (int, float, str):
        return float(value)
    if kind is str and isinstance(value, str):
        value.encode()  # raises UnicodeEncodeError, a ValueError, if it is no UTF-8
        return value
    if kind == list[int] and isinstance(value, list) and value:
        return [_as(int, item) for item in value]
    if kind == dict[str, str] and isinstance(value, dict) and value:
        return {name: _as(str, text) for name, text in value.items()}
    raise ValueError


def expanded(path: str) -> str:
    """Replaces ~, $NAME and ${NAME} in a path. Raises ValueError for an unset or empty variable, another form of `${`,
    or an unknown user."""
    if unset := [name for name in re.findall(r"\$\{?(\w+)", path) if not os.environ.get(name)]:
        raise ValueError(f"must be a path whose variables are set ({', '.join(unset)} is not)")
    found = os.path.expanduser(os.path.expandvars(path))
    if "${" in found:
        raise ValueError("must be a path with variables as $NAME or ${NAME}")
    if found.startswith("~"):
        raise ValueError(f"must be a path of a user who exists ({found.partition('/')[0]} does not)")
    return found


def shown(value) -> str:
    """Returns a value for a message: a list as in YAML, anything else as in Python."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else repr(value)


def _check_limits(value, limits) -> None:
    """Raises ValueError if a value is not within the limits of its `methods.key`."""
    if limits["choices"] and isinstance(value, str) and value not in limits["choices"]:
        raise ValueError("must be one of " + ", ".join(limits["choices"]))
    if limits["check"]:
        limits["check"](value)
    for number in value if isinstance(value, list) else [value]:
        if type(number) in (int, float) and not number >= limits["low"]:  # also NaN
            raise ValueError(f"must be at least {limits['low']}")
        high = min(limits["high"], LARGEST_INTEGER) if type(number) is int else limits["high"]
        if type(number) in (int, float) and not number <= high:
            raise ValueError(f"must be at most {high}")


def _checked(values: dict, problems: list[str]) -> dict:
    """Returns the valid values, converted to the types of their keys; appends a sentence to problems for each other."""
    annotations, result = typing.get_type_hints(Config), {}
    for field in dataclasses.fields(Config):
        if field.name not in values:
            continue
        try:
            value = converted(values[field.name], annotations[field.name], field.metadata["empty"])
            _check_limits(value, field.metadata)
            is_path = field.name in PATHS or field.metadata["file"]
            if is_path and isinstance(value, dict):
                value = {name: expanded(path) for name, path in value.items()}
            elif is_path and value is not None:
                value = expanded(value)
            result[field.name] = value
        except ValueError as error:
            problems.append(f"{field.name} {error}, not {shown(values[field.name])}")
    return result


# --- The command line of run.py ---


def configure(
    description: str,
    schedule: typing.Callable[[Config, int], str],
    plan: typing.Callable[[Config, int | None, float | None], str],
) -> Config:
    """Returns the configuration that the command line asks for. Exits after an error, and after --help, --schedule or
    --plan, whose texts the functions `schedule` and `plan` make."""
    is_main = launched_ranks()[0] == 0
    parser = make_parser(description, epilog=f"keys and their defaults:\n{Config.describe()}")
    parser.add_argument("config", help="a YAML file, such as those in args/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides a key of the file")
    parser.add_argument("--schedule", action="store_true", help="print what each epoch will do, and stop")
    parser.add_argument(
        "--plan", action="store_true", help="print what the run will need: memory, disk, tokens, hours; and stop"
    )
    parser.add_argument("--gpus", type=int, help="with --plan: number of GPUs (default: what this command would use)")
    parser.add_argument(
        "--gpu-memory", type=float, help="with --plan: GiB of each GPU (default: 80 if this machine has none)"
    )
    if not is_main:  # rank 0 prints
        parser.print_help = lambda *_: None
        parser.error = lambda message: sys.exit(print_error(UserError(message)))
    options, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (keys are set without dashes, as in num_epochs=1)")
    if any(value is not None and value <= 0 for value in (options.gpus, options.gpu_memory)):
        parser.error("--gpus and --gpu-memory must be positive")
    try:
        config = Config.from_file(options.config, options.overrides, needs_files=not (options.schedule or options.plan))
        if options.schedule and is_main:
            print_result(schedule(config, launched_ranks()[1]))
        if options.plan and is_main:
            print_result(plan(config, options.gpus, options.gpu_memory))
    except UserError as error:
        # the ranks of a node mostly read the same files: rank 0 prints first, and torchrun ends the others
        sys.exit(print_error(error, seconds=10))
    if options.schedule or options.plan:
        sys.exit()
    return config
