"""The configuration of a run: its keys, the YAML files and overrides they come from, what is wrong with them, --help.

Neither torch nor transformers is imported: `run.py --help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

import methods
from methods import LARGEST_FACTOR, key
from trainer.run_folder import is_on_hub, run_of
from utils import UserError, launched_ranks, print_error, why_unreadable

METHODS = methods.names()
MOST_LATENTS = 100_000  # longer than any model's positions; sequences of more fill the memory before they are refused
METHOD_BOOLEANS = ("coconut", "cot", "no_thoughts", "no_cot")  # keys of the reference that became `method`
PLACEHOLDER = re.compile(r"YOUR_\w+")
NO_FILE_NAME = re.compile(r"[/\\\0]|^\.*$")  # of what a name must not be, since files and folders bear it
LONGEST_NAME = 200  # bytes: a file's name has at most 255, and what is written aside is called a little longer
NOTHING = ("", "~", "null", "Null", "NULL", "None")  # the reference writes None where YAML has null
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "a list of whole numbers",
    dict[str, str]: "a mapping of names to texts",
}
# name -> (what may follow it, the module that has it): layer is written as layer:-2 or layer:0.5, and suppressed may
# name its threshold, as suppressed:0.3
THOUGHTS = {"last": ("", "model.thought")} | {name: (takes, module) for name, takes, module in methods.thoughts()}


def split_thought(spelling: str) -> tuple[str, int | float | str | None]:
    """(name, number) of a thought: "layer:-2" is ("layer", -2), "layer:0.5" is ("layer", 0.5), "last" ("last", None),
    "token:st" ("token", "st").

    Raises ValueError that lists what there is.
    """
    name, colon, text = spelling.partition(":")
    whole, share = r"\d{1,6}", r"\d{0,6}\.\d{1,20}"
    numbers = {"": "", ":N": f":(-?{whole}|{share})", "[:T]": f"(:({whole}|{share}))?", "[:P]": r"(:[1-9]\d{0,5})?"}
    numbers["[:st]"] = "(:st)?"
    if name not in THOUGHTS or not re.fullmatch(numbers[THOUGHTS[name][0]], colon + text):
        raise ValueError(f"must be one of {', '.join(name + takes for name, (takes, _) in THOUGHTS.items())}")
    if text == "st":
        return name, text
    number = None if not text else float(text) if "." in text else int(text)
    return name, number


def modern(values: dict) -> dict:
    """Values of keys in today's spelling, where they are in that of before a method had a name of its own."""
    values = dict(values)
    for rules in methods.all_rules().values():
        rules.older(values)
    return values


def with_defaults(values: dict) -> dict:
    """`modern`, with the defaults of the method where it is chosen by its name: an older spelling had none."""
    values, given = modern(values), values.get("method")
    rules = methods.all_rules().get(given)
    return {**rules.defaults, **values} if rules and values["method"] == given else values


def _with_keys_of_methods(cls):
    """Adds each method's own keys to those of the core."""
    for rules in methods.all_rules().values():
        for name, annotation, field in methods.own_keys(rules):
            cls.__annotations__[name] = annotation
            setattr(cls, name, field)
    return cls


@dataclass(init=False)
@_with_keys_of_methods
class Config:
    """One run. Every field is a key of the YAML files in args/ and of `run.py FILE key=value ...`.

    Keys of a single method are in its file of methods/; any key is checked whatever the method.

    The keys that the reference implementation knows keep its names and meanings; the others default to what it does.
    """

    # the run
    project: str = key("coconut", "wandb project", free=True)
    name: str = key(
        "run",
        "name of the run; its folder is save_path/name (default: the YAML file's name; never inherited by extends)",
        free=True,
    )
    save_path: str = key("checkpoints", "folder that holds the runs", free=True)
    only_eval: bool = key(
        False,
        "evaluate the run's best checkpoint on test_path, and stop; or, if they are set beside only_eval (in the same "
        "file, in one that extends it, on the command line), load_model_path on val_path",
        free=True,
    )
    seed: int = key(0, "seeds the weights that are made anew, the data order, dropout and stage mixing", low=0)
    debug: bool = key(
        False,
        "quick look in the folder NAME-debug: 5000 training and 32 validation examples, no checkpoints, no wandb",
        free=True,
    )
    wandb: str = key(
        "online",
        "online | offline | disabled; online becomes offline where nobody is logged in; "
        "the variable WANDB_MODE wins over this key",
        choices=("online", "offline", "disabled"),
        free=True,
    )
    log_every_steps: int = key(10, "optimizer steps between two writes to metrics.jsonl and wandb", low=1, free=True)

    # the method
    method: str = key("coconut", " | ".join(METHODS) + "; the reference's four booleans are read too", choices=METHODS)
    thought: str = key(
        "last",
        "what a latent position is fed: "
        + " | ".join(name + takes for name, (takes, _) in THOUGHTS.items())
        + "; N is a "
        "layer, counted from the end where negative, or a share of the layers such as 0.5, T a threshold, P a width, "
        "st the straight-through gradient",
        check=split_thought,
    )
    c_thought: int = key(1, "latent thoughts that replace one written step", low=0, high=MOST_LATENTS)
    max_latent_stage: int = key(
        6, "stage after which no more thoughts are added and all steps are dropped", low=0, high=MOST_LATENTS
    )
    epochs_per_stage: int | list[int] = key(
        5, "epochs of each stage; or a list with one entry a stage, the last stage going on to num_epochs", low=1
    )
    curriculum: str = key(
        "staged", "staged | none (the last stage from the first epoch on)", choices=("staged", "none")
    )
    pad_latent_to_max: bool = key(
        True, "in the last stage, max_latent_stage thoughts also where an example has fewer steps"
    )
    uniform_prob: float = key(0.0, "probability that an example trains at a stage drawn from 0..n", low=0, high=1)
    advance_at: float | None = key(
        None, "a stage ends before its epochs are over when validation accuracy has reached this", low=0, high=1
    )
    latent_markers: str = key(
        "both",
        "both | none: whether the latents stand between a start and an end marker, as in the paper",
        choices=("both", "none"),
    )
    step_separator: str = key("\n", 'what follows each written step; "" for steps of one token', empty=True)
    eval_latents_from_steps: bool = key(
        False,
        "with pad_latent_to_max off, evaluate with at most as many steps of thought as the example has (reference)",
        free=True,
    )
    eval_latents: int | None = key(
        None,
        "in an eval-only run of method coconut, so many latent thoughts whatever the stage",
        low=0,
        high=MOST_LATENTS,
        free=True,
    )

    # the model
    model_id: str = key(
        "openai-community/gpt2", "Hugging Face id or local folder of the causal language model", free=True
    )
    from_scratch: bool = key(False, "take only the shape of model_id; initialise its weights from seed")
    load_model_path: str | None = key(
        None,
        "weights to start from or to evaluate: a checkpoint folder, a run's folder (its newest checkpoint), RUN@best, "
        "RUN@12 (after 12 epochs), a Hugging Face folder, a file of the reference, or org/name:file on the hub",
        free=True,
    )
    lora_rank: int | None = key(
        None,
        "train low-rank updates of the linear layers, of this rank, and nothing else (LoRA)",
        low=1,
        later=True,
    )
    lora_alpha: int = key(32, "LoRA: the updates count lora_alpha / lora_rank times", low=1, later=True)
    lora_dropout: float = key(0.0, "LoRA: dropout of what the updates are given", low=0, high=1, later=True)
    resume: int = key(
        0, "epoch to start from with load_model_path; in an eval-only run the epoch whose stage is used", low=0
    )

    # the data
    train_path: str | None = key(None, "JSON list of {question, answer, steps}", free=True)
    val_path: str | dict[str, str] | None = key(
        None,
        "the same, for validation and for eval-only runs; these take several files too, as {name: path, other: path}",
        free=True,
    )
    test_path: str | dict[str, str] | None = key(None, "the same, for eval-only runs: see only_eval", free=True)
    max_train_examples: int | None = key(None, "train on the first so many examples", low=1)
    max_train_tokens: int | None = key(
        None, "leave out training examples that are longer than this with all steps written", low=1
    )
    max_eval_examples: int | None = key(None, "validate on the first so many examples", low=1, free=True)
    group_by_length: bool = key(
        False, "batches of similar lengths, in random order: less padding (the paper's order is random throughout)"
    )
    num_workers: int = key(1, "loader processes for each rank; none under a debugger", low=0, free=True)

    # the optimisation
    num_epochs: int = key(50, "epochs in all, counted from epoch 0 of the curriculum", low=1)
    batch_size_training: int = key(32, "examples of one forward pass on one rank", low=1)
    gradient_accumulation_steps: int = key(1, "forward passes of one optimizer step on one rank", low=1)
    global_batch_size: int | None = key(
        None, "examples of one optimizer step over all ranks; gradient_accumulation_steps is derived from it", low=1
    )
    lr: float = key(1e-4, "AdamW's learning rate", low=0, high=LARGEST_FACTOR)
    weight_decay: float = key(0.01, "AdamW's weight decay, on every parameter", low=0, high=LARGEST_FACTOR)
    lr_scheduler: str = key("constant", "constant | linear | cosine", choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(0, "optimizer steps over which lr rises from 0", low=0)
    max_grad_norm: float | None = key(None, "clip the gradient's norm to this; not at all where it is 0", low=0)
    reset_optimizer: bool | str = key(
        "stage",
        "never | stage | epoch: make AdamW anew when the stage changes or at every epoch; "
        "True = epoch and False = never, as the reference's code does",
        choices=("never", "stage", "epoch"),
    )

    # the machine
    strategy: str = key(
        "auto",
        "auto | ddp | fsdp; auto is ddp, which replicates the model, unless that would take more than 60 % of a GPU's "
        "memory: then fsdp, which shards it",
        choices=("auto", "ddp", "fsdp"),
        free=True,
    )
    compile: bool = key(
        False, "compile the decoder blocks with torch.compile: minutes at first, faster steps on GPUs", free=True
    )
    gradient_checkpointing: bool = key(
        False, "keep only the inputs of the decoder blocks and compute the rest again: less memory, slower", free=True
    )
    bf16: bool = key(False, "mixed precision: bfloat16 arithmetic, float32 weights and optimizer")
    bf16_weights: bool = key(False, "weights and optimizer in bfloat16 too (what the reference's bf16 does)")

    # evaluation and checkpoints
    eval_batch_size: int = key(32, "prompts generated from at once on one rank", low=1, free=True)
    max_new_tokens: int = key(128, "longest generation", low=1, free=True)
    answer_match: str = key(
        "text",
        "text | number: an answer is right where it is the gold answer's text without commas (reference), or where the "
        "last number in it is less than 0.001 from the gold answer",
        choices=("text", "number"),
        free=True,
    )
    save_only_improve: bool = key(
        False, "save only when validation accuracy is the best of its stage so far", free=True
    )
    save_every_steps: int | None = key(
        None,
        "save within epochs too, after every so many optimizer steps; only the newest two of these are kept",
        low=1,
        free=True,
    )
    keep_checkpoints: int | None = key(
        None, "keep the newest so many epochs, and the best (default: all)", low=1, free=True
    )
    continue_changed: bool = key(
        False,
        "continue the run in save_path/name although this configuration would have led to other weights",
        free=True,
    )
    skip_nonfinite: bool = key(
        False,
        "leave out optimizer steps whose loss or gradient is not finite, and count them, instead of stopping",
        free=True,
    )

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: list[str] | tuple[str, ...] = (), needs_files: bool = True
    ) -> Config:
        """Reads a YAML file, the files that it extends, the row that is chosen of it, and `key=value` overrides.

        Without needs_files, paths may be missing: for looking at a plan before there is data.
        Raises UserError that lists everything that is wrong, after all of it has been looked for.
        """
        problems: list[str] = []
        layers = _layers_of(Path(path), problems)
        readable = all(layer.values is not None for layer in layers)
        layers = [layer for layer in layers if layer.values is not None] + _command_line(overrides, problems)
        row = _choose_row(layers, problems)
        values: dict = {"name": "-".join([Path(path).stem, *row])}
        beside: set[str] | None = None  # keys that are set where only_eval is, or after it
        for layer in layers:
            if "only_eval" in layer.values:
                on = BOOLEANS.get(str(layer.values["only_eval"]).lower())
                beside = (beside or set()) if on else None
            if beside is not None:
                beside |= layer.values.keys()
            _merge(values, layer, problems)
        right = _checked(values, problems)
        config = cls(**right)
        if config.only_eval:
            config._evaluate(beside or set(), problems)
        if readable:  # of keys that nobody could read there is nothing to say
            wrong = [name for name in values if name not in right]  # of which there is a complaint, and a default here
            problems += [
                text
                for text in config.problems(launched_ranks()[1], needs_files)
                if not any(re.search(rf"\b{name}\b", text) for name in wrong)
            ]
        if problems:
            head = f"{path}: "
            raise UserError(head + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
        return config

    def __init__(self, **values):
        """Keys that are not given have their defaults; see `with_defaults`."""
        values = with_defaults(values)
        fields = {field.name: field for field in dataclasses.fields(self)}
        if unknown := values.keys() - fields.keys():
            raise TypeError(f"no keys of a configuration: {', '.join(sorted(unknown))}")
        for name, field in fields.items():
            setattr(self, name, values.get(name, field.default))
        if isinstance(self.reset_optimizer, bool):
            self.reset_optimizer = "epoch" if self.reset_optimizer else "never"

    def _evaluate(self, beside: set[str], problems: list[str]) -> None:
        """Makes val_path what an eval-only run evaluates on, and load_model_path what it evaluates; what is not set
        `beside` only_eval is of the training."""
        if self.test_path is not None and ("test_path" in beside or "val_path" not in beside):
            self.val_path = self.test_path
        elif not beside & {"load_model_path", "val_path"}:
            problems.append(f"only_eval evaluates {self.run_dir}@best on test_path: set test_path")
        self.test_path = None
        for name, of_none in (("load_model_path", None), ("resume", 0), ("from_scratch", False)):
            if name not in beside:
                setattr(self, name, of_none)
        if self.load_model_path is None:
            self.load_model_path = f"{self.run_dir}@best"

    @property
    def rules(self) -> type[methods.Method]:
        """What the method is, without torch."""
        return methods.rules_of(self.method)

    @property
    def run_dir(self) -> Path:
        return Path(self.save_path) / (f"{self.name}-debug" if self.debug else self.name)

    def by_set(self) -> dict[str, Config]:
        """What is evaluated: the files of val_path by their names, each as the configuration that evaluates it alone; a
        single path has the name ""."""
        paths = self.val_path if isinstance(self.val_path, dict) else {"": self.val_path}
        return {name: dataclasses.replace(self, val_path=path) for name, path in paths.items()}

    @property
    def has_latents(self) -> bool:
        """Whether the method's sequences have latent positions."""
        return self.rules.has_latents

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
        found = [*(self._of_paths() if needs_files else []), *self._of_the_run(), *self._of_stages_and_weights()]
        for rules in methods.all_rules().values():
            found += rules.problems(self)
        if not self.only_eval:  # which has no optimizer steps
            try:
                self.passes(world_size)
            except UserError as error:
                found.append(str(error))
        return found

    def _of_the_run(self) -> list[str]:
        """Its folder, its files, what an eval-only run is for."""
        found = []
        if reason := why_unreadable(self.save_path):
            found.append(f"save_path {self.save_path!r} cannot be reached: {reason}")
        elif Path(self.save_path).is_file():
            found.append(f"save_path {self.save_path!r} is a file, not a folder")
        if self.resume >= self.num_epochs and not self.only_eval:
            found.append(f"resume {self.resume} leaves nothing of num_epochs {self.num_epochs}")
        if self.only_eval and self.load_model_path is None:
            found.append("only_eval needs load_model_path: the checkpoint to evaluate")
        if self.eval_latents is not None and not (self.only_eval and self.has_latents):
            found.append("eval_latents is for eval-only runs of method coconut, or of another with latents")
        if is_no_file_name(self.name):
            found.append(f"name {self.name!r} must be a plain folder name, of at most {LONGEST_NAME} bytes")
        if isinstance(self.val_path, dict) and not self.only_eval:
            found.append("val_path names several files, which is for eval-only runs: a training run takes one path")
        for key_name in ("val_path", "test_path"):
            names = getattr(self, key_name)
            if names == {}:
                found.append(f"{key_name} is an empty mapping: set it to a path, or to {{name: path, other: path}}")
            found += [
                f"{key_name}: the name {name!r} must be a plain one, of at most {LONGEST_NAME} bytes: a file bears it"
                for name in (names if isinstance(names, dict) else ())
                if is_no_file_name(name)
            ]
        return found

    def _of_stages_and_weights(self) -> list[str]:
        """The curriculum; where weights come from, and how they are kept."""
        found = []
        if isinstance(self.epochs_per_stage, list) and len(self.epochs_per_stage) > self.last_stage + 1:
            found.append(
                f"epochs_per_stage has {len(self.epochs_per_stage)} entries, but there are only {self.last_stage + 1} "
                f"stages: 0 to max_latent_stage + 1"
            )
        if not self.rules.has_stages:
            always = f"method {self.method} has always the thoughts of the last one"
            if self.uniform_prob or self.advance_at is not None:
                found.append(f"uniform_prob and advance_at are of stages, and {always}")
            if not self.c_thought * self.max_latent_stage * self.pad_latent_to_max:
                what = f"method {self.method} thinks max_latent_stage x c_thought thoughts"
                found.append(f"{what}: it needs both, and pad_latent_to_max")
        exclusive = {
            "from_scratch and load_model_path": self.from_scratch and self.load_model_path is not None,
            "bf16 (mixed precision) and bf16_weights (everything in bfloat16)": self.bf16 and self.bf16_weights,
            "compile and gradient_checkpointing": self.compile and self.gradient_checkpointing,
        }
        found += [f"{keys} exclude each other" for keys, both in exclusive.items() if both]
        if self.lora_rank is not None and self.from_scratch:
            found.append("lora_rank updates weights that there are, and from_scratch has none")
        return found

    def _of_paths(self) -> list[str]:
        """Files that are missing, and placeholders that are still there."""
        val_paths = {f"val_path {name}".strip(): one.val_path for name, one in self.by_set().items()}
        found = [
            f"{name} is still the placeholder {value!r}: set it to your own path"
            for name, value in {**vars(self), **val_paths}.items()
            if isinstance(value, str) and PLACEHOLDER.search(value)
        ]
        data = val_paths if self.only_eval else {"train_path": self.train_path, **val_paths}
        for name, value in data.items():
            if value is None:
                found.append(f"{name} is missing: set it to a JSON list of question, answer and steps")
            elif not PLACEHOLDER.search(value):
                found += _unreadable(name, value) or ([] if Path(value).is_file() else [f"{name} {value!r} is no file"])
        source = self.load_model_path
        # the run's own checkpoint wins over it; the hub is asked later
        if source and not PLACEHOLDER.search(source) and not self._continues() and not is_on_hub(source):
            found += _unreadable("load_model_path", str(run_of(source)))
        model = Path(self.model_id)
        if reason := why_unreadable(self.model_id):
            return [*found, f"model_id {self.model_id!r} cannot be reached: {reason}"]
        is_path = (
            model.is_absolute()
            or self.model_id.startswith(".")
            or (len(model.parts) > 1 and model.parents[-2].is_dir())
        )
        if is_path and not PLACEHOLDER.search(self.model_id) and not model.is_dir() and not self._has_model_elsewhere():
            found += _unreadable("model_id", self.model_id)
        return found

    def _continues(self) -> bool:
        """Whether the run has a checkpoint of its own."""
        if self.only_eval or why_unreadable(self.run_dir):
            return False
        return any(self.run_dir.glob("checkpoint_*/coconut.json"))

    def _has_model_elsewhere(self) -> bool:
        """Whether a checkpoint has all that model_id would be asked for: shape, weights and tokenizer."""
        if self._continues():
            return True
        source = run_of(self.load_model_path or "")
        return self.load_model_path is not None and (
            (source / "config.json").is_file() or any(source.glob("checkpoint_*/config.json"))
        )

    @classmethod
    def problems_of(cls, values: dict) -> list[str]:
        """What is wrong with the values of a JSON file, a sentence each; unknown keys are ignored."""
        problems: list[str] = []
        for name, value in _checked(values, problems).items():
            if value != values[name]:
                problems.append(f"{name} must be {value!r}, not {values[name]!r}")
        return problems

    @classmethod
    def describe(cls) -> str:
        """Every key with its default and its meaning, for --help."""
        lines = []
        for field in dataclasses.fields(cls):
            lines.append(f"  {field.name} = {json.dumps(field.default)}\n      {field.metadata['help']}")
        lines.append("\nother defaults of methods:")
        for name, rules in methods.all_rules().items():
            if rules.defaults:
                lines.append(f"  {name}: {', '.join(f'{key} {value}' for key, value in rules.defaults.items())}")
        return "\n".join(lines)


def is_no_file_name(name: str) -> bool:
    return bool(NO_FILE_NAME.search(name)) or len(name.encode(errors="surrogatepass")) > LONGEST_NAME


def _unreadable(name: str, value: str) -> list[str]:
    """Why the path that a key has is not there, if so."""
    if reason := why_unreadable(value):
        return [f"{name} {value!r} cannot be reached: {reason}"]
    return [] if Path(value).exists() else [f"{name} {value!r} does not exist{_preparation_hint(value)}"]


def _preparation_hint(path: str) -> str:
    """The script that makes a file or model of args/."""
    tiny, llama = "python preprocessing/tiny_model.py data/", "--tokenizer char --shape llama --width 64"
    hints = {
        "data/machine/model": f"{tiny}machine/machine_train.json --out data/machine/model {llama} --positions 64",
        "prosqa_mini": "python preprocessing/prosqa.py --prefix prosqa_mini --train 2000 --valid 100 --test 100",
        "prosqa_": "python preprocessing/prosqa.py",
        **{name: f"python preprocessing/ood.py {name}" for name in ("gsm_hard", "svamp", "multiarith")},
        "gsm_": "bash preprocessing/gsm_icot.bash",
        "arithmetic": "python preprocessing/arithmetic.py",
        "machine": "python preprocessing/machine.py --out data/machine",
        "tiny_arithmetic": f"{tiny}arithmetic_train.json --out data/tiny_arithmetic {llama} --untied",
        "tiny_prosqa": f"{tiny}prosqa_mini_train.json --out data/tiny_prosqa",
    }
    where = Path(path)
    how = next(
        (how for word, how in hints.items() if where.name.startswith(word) or where.as_posix().endswith(word)), None
    )
    if "mirrored" in where.parent.name:  # with its chains and its model
        how = f"python experiments/grid.py experiments/{where.parent.name}.yaml --dry-run"
    return f" (make it with: {how})" if how else ""


# ---------------------------------------------------------------------------------------------------------------
# Where values are written
# ---------------------------------------------------------------------------------------------------------------


class Layer(typing.NamedTuple):
    """The values of one file, or of the command line, by key: texts, and lists and mappings of texts. None where the
    file cannot be read."""

    origin: str
    values: dict | None
    rows: dict[str, dict] = {}  # noqa: RUF012


def read_yaml(text: str, where: str, problems: list[str]) -> dict:
    """The keys of a YAML mapping. Every value is as it is written: text, or a list or a mapping of such.

    Raises YAMLError, ValueError and RecursionError where it is no YAML.
    """
    node = yaml.compose(text, Loader=yaml.BaseLoader)
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{where} must hold `key: value` lines")
        return {}
    return _content(node, where, problems, ())


def _content(node: yaml.Node, where: str, problems: list[str], above: tuple[yaml.Node, ...]):
    if node in above:
        raise ValueError("an alias stands for a part of itself")
    above = (*above, node)
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_content(item, where, problems, above) for item in node.value]
    found: dict = {}
    lines: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise ValueError(f"the key in line {line} is no plain text")
        if name.value in lines:
            problems.append(f"{where} has the key {name.value!r} twice, in lines {lines[name.value]} and {line}")
        lines[name.value] = line
        found[name.value] = _content(value, where, problems, above)
    return found


def _layers_of(path: Path, problems: list[str], seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The files that `path` extends, outermost first, then `path` itself. What is wrong with them goes to problems."""
    try:
        if path.resolve() in seen:
            raise ValueError("it extends itself")
        values = read_yaml(path.read_text(encoding="utf-8"), str(path), problems)
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
        return [Layer(str(path), None)]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{path} is not valid YAML: {' '.join(str(error).split())}")
        return [Layer(str(path), None)]
    layers, parent = [], values.pop("extends", "")
    if not isinstance(parent, str):
        problems.append(f"extends in {path} must be the path of a file, not {shown(parent)}")
    elif parent not in NOTHING:
        layers = _layers_of(path.parent / parent, problems, (*seen, path.resolve()))
    for layer in layers:
        (layer.values or {}).pop("name", None)  # two files must not share a run's folder by accident
    rows = values.pop("rows", {})
    if not isinstance(rows, dict) or not all(isinstance(keys, dict) for keys in rows.values()):
        problems.append(f"rows in {path} must be a mapping of names to `key: value` lines")
        rows = {}
    return [*layers, Layer(str(path), values, rows)]


def _command_line(overrides, problems: list[str]) -> list[Layer]:
    """The key=value arguments: as in a file, but that a text is as the shell gives it, which has taken the quotes that
    a file needs around a name with ' #' or ': ' in it, or one that begins with @, * or %."""
    values, given = {}, {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r} on the command line is not key=value")
            continue
        if name in given:
            problems.append(f"{name} is set twice on the command line: {given[name]!r} and {text!r}")
        given[name], values[name] = text, value.strip()
        with suppress(yaml.YAMLError, ValueError, KeyError, RecursionError):
            found = read_yaml(f"value: {value}", f"{text!r} on the command line", problems)["value"]
            if not isinstance(found, str) or value.strip().startswith(("'", '"')):
                values[name] = found
    return [Layer("the command line", values)] if values else []


def _choose_row(layers: list[Layer], problems: list[str]) -> list[str]:
    """Puts the keys of the chosen row behind those of the file that has it. Returns what the name of the run gets from
    that: nothing where a file that extends has chosen it, and has a name of its own."""
    rows = {name: keys for layer in layers for name, keys in layer.rows.items()}
    chosen, chooser = None, None
    for layer in layers:
        if "row" in layer.values:
            chosen, chooser = layer.values.pop("row"), layer
    if chosen not in rows:
        if rows:
            what = "set row=NAME" if chosen is None else f"unknown row {shown(chosen)} in {chooser.origin}"
            problems.append(f"{what}: the rows are {', '.join(rows)}")
        elif chosen is not None:
            problems.append(f"row {shown(chosen)} in {chooser.origin}: there are no rows to choose from")
        return []
    keys, parent = dict(rows[chosen]), chosen
    while (parent := keys.pop("extends", None)) is not None:
        if parent not in rows or list(rows).index(parent) >= list(rows).index(chosen):
            problems.append(f"row {chosen} extends {shown(parent)}, which is no row before it")
            break
        keys = {**rows[parent], **keys}
    number = next(number for number, layer in enumerate(layers) if chosen in layer.rows)
    layers.insert(number + 1, Layer(f"{layers[number].origin}, row {chosen}", keys))
    return [] if layers.index(chooser) > number + 1 and chooser is not layers[-1] else [chosen.replace("_", "-")]


def _merge(values: dict, layer: Layer, problems: list[str]) -> None:
    """Lays one file, or the command line, over `values`; the four method booleans become `method` on the way."""
    if "gradient_accumulation_steps" in layer.values and "global_batch_size" not in layer.values:
        of_before = values.get("global_batch_size", "")
        if of_before not in NOTHING:
            problems.append(
                f"gradient_accumulation_steps in {layer.origin} has no effect, since it follows from global_batch_size "
                f"{of_before}: set that instead, or to null"
            )
    known = {field.name for field in dataclasses.fields(Config)}
    booleans = {}
    for name, value in layer.values.items():
        if name in METHOD_BOOLEANS:
            booleans[name] = BOOLEANS.get(str(value).lower())
            if booleans[name] is None:
                problems.append(f"{name} must be true or false, not {shown(value)}")
        elif name in known:
            values[name] = value
        else:
            close = difflib.get_close_matches(name, [*known, *METHOD_BOOLEANS, "extends", "row", "rows"], 1)
            hint = f": did you mean {close[0]!r}?" if close else " (run.py --help lists the keys)"
            hint = ": it is for files alone" if name in ("extends", "rows") else hint
            problems.append(f"unknown key {name!r} in {layer.origin}{hint}")
    chosen = {name for name, on in booleans.items() if on}
    if {"coconut", "no_thoughts"} <= chosen:  # as in the reference, "without thoughts" is a switch on top of coconut
        chosen.remove("coconut")
    if "method" in layer.values:
        chosen.add(str(layer.values["method"]))
    if len(chosen) > 1:
        problems.append(f"two methods at once in {layer.origin}: {' and '.join(sorted(chosen))}")
    elif chosen:
        values["method"] = layer.values.get("method", *chosen) if "method" in layer.values else chosen.pop()
    elif booleans and ("method" not in values or values["method"] in booleans):
        problems.append(f"no method in {layer.origin}: set method to one of {', '.join(METHODS)}")


# ---------------------------------------------------------------------------------------------------------------
# From what is written to a value of a type
# ---------------------------------------------------------------------------------------------------------------


def converted(value, annotation, empty: bool = False):
    """What a file has as the annotated type of a key; `empty` where "" is not nothing. Raises ValueError with what was
    expected."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or (isinstance(value, str) and value in NOTHING and not (empty and value == "")):
        if type(None) in options:
            return None
        raise ValueError("must be set")
    for option in options:
        with suppress(ValueError, KeyError):
            return _as(option, value)
    raise ValueError("must be " + " or ".join(IN_WORDS[option] for option in options if option in IN_WORDS))


def _as(kind, value):
    """Raises ValueError and KeyError where a value, a text most often, is not of this kind."""
    if kind is bool:
        return BOOLEANS[str(value).lower()]
    if kind is int and type(value) in (int, str):
        return int(value)
    if kind is float and type(value) in (int, float, str):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if kind == list[int] and isinstance(value, list) and value:
        return [_as(int, item) for item in value]
    if kind == dict[str, str] and isinstance(value, dict):
        return {name: _as(str, text) for name, text in value.items()}
    raise ValueError


def shown(value) -> str:
    """A value in a message: a list or a mapping as it was written."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return repr(value)


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


def _checked(values: dict, problems: list[str]) -> dict:
    """Converts each value to its key's type; what does not convert is reported and left out."""
    annotations = typing.get_type_hints(Config)
    result = {}
    for field in dataclasses.fields(Config):
        if field.name not in values:
            continue
        try:
            value = converted(values[field.name], annotations[field.name], field.metadata["empty"])
            _check_range(value, field.metadata)
        except ValueError as error:
            problems.append(f"{field.name} {error}, not {shown(values[field.name])}")
            continue
        result[field.name] = value
    return result


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
        parser.error = lambda message: sys.exit(print_error(UserError(message)))
    options = parser.parse_intermixed_args()
    try:
        config = Config.from_file(options.config, options.overrides, needs_files=not options.schedule)
    except UserError as error:
        sys.exit(print_error(error))
    if options.schedule:
        if is_main:
            print(schedule(config, launched_ranks()[1]))
        sys.exit()
    return config
