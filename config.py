"""The configuration of a run: its keys, the YAML files and overrides they come from, what is wrong with them, --help.

Neither torch nor transformers is imported: `run.py --help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

import methods
from methods import LARGEST_FACTOR, key
from trainer.files import why_unreadable
from trainer.run_folder import is_on_hub, split_choice
from utils import UserError, launched_ranks, print_error, print_result

METHODS = methods.names()
MOST_LATENTS = 100_000  # longer than any model's positions; sequences of more fill the memory before they are refused
METHOD_BOOLEANS = ("coconut", "cot", "no_thoughts", "no_cot")  # keys of the reference that became `method`
MIN_TEMPERATURE = 0.001  # below it logits overflow, and sampling is greedy anyway
COMMAND_LINE = "the command line"
PLACEHOLDER = re.compile(r"YOUR_\w+")
NO_FILE_NAME = re.compile(r"[/\\\0]|^\.*$")  # of what a name must not be, since files and folders bear it
LONGEST_NAME = 200  # bytes: a file's name has at most 255, and what is written aside is called a little longer
NOTHING = ("", "~", "null", "Null", "NULL", "None")  # the reference writes None where YAML has null
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
IN_WORDS |= {list[int]: "a list of whole numbers", dict[str, str]: "a mapping of names to texts"}
# name -> (what may follow it, the module that has it): layer is written as layer:-2 or layer:0.5, and suppressed may
# name its threshold, as suppressed:0.3
THOUGHTS = {"last": ("", "model.thought")} | {name: (takes, module) for name, takes, module in methods.thoughts()}
SPELLINGS = ", ".join(name + takes for name, (takes, _) in THOUGHTS.items())
PATHS = ("save_path", "train_path", "val_path", "test_path", "model_id", "load_model_path")
setting = partial(key, free=True)


def split_thought(spelling: str) -> tuple[str, int | float | str | None]:
    """(name, number) of a thought: "layer:-2" is ("layer", -2), "layer:0.5" is ("layer", 0.5), "last" ("last", None),
    "token:st" ("token", "st"). Raises ValueError that lists what there is."""
    name, colon, text = spelling.partition(":")
    whole, share = r"\d{1,6}", r"\d{0,6}\.\d{1,20}"
    numbers = {"": "", ":N": f":(-?{whole}|{share})", "[:T]": f"(:({whole}|{share}))?", "[:P]": r"(:[1-9]\d{0,5})?"}
    numbers["[:st]"] = "(:st)?"
    if name not in THOUGHTS or not re.fullmatch(numbers[THOUGHTS[name][0]], colon + text):
        raise ValueError(f"must be one of {SPELLINGS}")
    if text == "st":
        return name, text
    return name, None if not text else float(text) if "." in text else int(text)


def split_noise(spelling: float | str) -> tuple[float, bool]:
    """(S, whether it is a share of the thought's norm) of thought_noise: 0.3 is (0.3, True), "absolute:0.6" is
    (0.6, False). Raises ValueError."""
    text = str(spelling).removeprefix("absolute:")
    with suppress(ValueError):
        if 0 <= float(text) <= LARGEST_FACTOR:
            return float(text), text == str(spelling)
    raise ValueError("must be a number from 0 on, or absolute:NUMBER")


def _check_temperature(temperature: float) -> None:
    """Raises ValueError where logits would overflow."""
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"must be 0, for greedy decoding, or at least {MIN_TEMPERATURE}")


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
    project: str = setting("coconut", "wandb project")
    name: str = setting("run", "its folder is save_path/name (default: the YAML file's name and row; never inherited)")
    save_path: str = setting("checkpoints", "folder that holds the runs")
    only_eval: bool = setting(
        False,
        "evaluate the run's best checkpoint on test_path, and stop; or, where set beside only_eval, in the same file "
        "or later, load_model_path (on val_path if there is no test_path) and val_path",
    )
    seed: int = key(0, "seeds the weights that are made anew, the data order, dropout and stage mixing", low=0)
    debug: bool = setting(
        False, "quick look, in folder NAME-debug: 5000 training, 32 validation examples, no checkpoints, no wandb"
    )
    wandb: str = setting(
        "online",
        "online | offline | disabled; online becomes offline where nobody is logged in; WANDB_MODE wins over this key",
        choices=("online", "offline", "disabled"),
    )
    log_every_steps: int = setting(10, "optimizer steps between two writes to metrics.jsonl and wandb", low=1)

    # the method
    method: str = key(
        "coconut", " | ".join(METHODS) + "; the reference's four booleans are read too", choices=METHODS, shapes=True
    )
    thought: str = key(
        "last",
        f"what a latent position is fed: {SPELLINGS.replace(',', ' |')}; N is a layer, counted from the end where "
        "negative, or a share of the layers such as 0.5, T a threshold, P a width, st the straight-through gradient",
        check=split_thought,
        shapes=True,
    )
    c_thought: int = key(1, "latent thoughts that replace one written step", low=0, high=MOST_LATENTS, shapes=True)
    max_latent_stage: int = key(
        6,
        "stage after which no more thoughts are added and all steps are dropped",
        low=0,
        high=MOST_LATENTS,
        shapes=True,
    )
    epochs_per_stage: int | list[int] = key(
        5, "epochs of each stage; or a list with one entry a stage, the last stage going on to num_epochs", low=1
    )
    curriculum: str = key("staged", "staged | none (only the last stage)", choices=("staged", "none"))
    pad_latent_to_max: bool = key(
        True, "in the last stage, max_latent_stage thoughts also for fewer steps", shapes=True
    )
    uniform_prob: float = key(0.0, "probability that an example trains at a stage drawn from 0..n", low=0, high=1)
    advance_at: float | None = key(None, "validation accuracy that ends a stage before its epochs do", low=0, high=1)
    advance_after: int = key(1, "epochs of the stage in a row that must reach it", low=1, later=True)
    latent_markers: str = key(
        "both",
        "both | none: whether start and end marker surround the latents (paper: both)",
        choices=("both", "none"),
        shapes=True,
    )
    step_separator: str = key(
        "\n", 'what follows each written step; "" for steps of one token', empty=True, shapes=True
    )
    eval_latents_from_steps: bool = setting(
        False, "with pad_latent_to_max off, evaluate with at most as many thoughts as the example has steps (reference)"
    )
    eval_latents: int | None = setting(
        None, "in an eval-only run, this many latent thoughts whatever the stage", low=0, high=MOST_LATENTS
    )

    # the model
    model_id: str = setting("openai-community/gpt2", "Hugging Face id or local folder of the causal language model")
    from_scratch: bool = key(False, "take only the shape of model_id; initialise its weights from seed")
    load_model_path: str | None = setting(
        None,
        "weights to start from or to evaluate: a checkpoint folder, a run's folder (its newest checkpoint), RUN@best, "
        "RUN@12 (after 12 epochs), a Hugging Face folder, a file of the reference, or org/name:file on the hub",
    )
    trust_remote_code: bool = setting(
        False,
        "run the Python code that model_id brings, where its family is not one of transformers' own: read it first",
    )
    lora_rank: int | None = key(
        None, "LoRA: train only low-rank updates, of this rank, of linear layers", low=1, later=True, shapes=True
    )
    lora_alpha: int = key(32, "LoRA: the updates count lora_alpha / lora_rank times", low=1, later=True, shapes=True)
    lora_dropout: float = key(0.0, "LoRA: dropout of what the updates are given", low=0, high=1, later=True)
    resume: int = key(0, "epoch to start from with load_model_path; in an eval-only run, whose stage is used", low=0)

    # the data
    train_path: str | None = setting(None, "JSON list of {question, answer, steps}")
    val_path: str | dict[str, str] | None = setting(
        None, "the same, for validation; an eval-only run takes several files too, as {name: path, other: path}"
    )
    test_path: str | dict[str, str] | None = setting(None, "the same, for eval-only runs: see only_eval")
    max_train_examples: int | None = key(None, "train on the first so many examples", low=1)
    max_train_tokens: int | None = key(None, "leave out longer training examples, counted with all steps", low=1)
    max_eval_examples: int | None = setting(None, "validate on the first so many examples", low=1)
    group_by_length: bool = key(False, "batches of similar lengths, in random order: less padding (the paper: random)")
    num_workers: int = setting(1, "without effect, for older files: a thread makes batches one ahead", low=0)

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
        "never | stage | epoch: when AdamW is re-initialised; True = epoch, False = never, as in the reference's code",
        choices=("never", "stage", "epoch"),
    )

    # the machine
    strategy: str = setting(
        "auto",
        "auto | ddp | fsdp; auto replicates the model, or shards it where it takes over 60 % of a GPU's memory",
        choices=("auto", "ddp", "fsdp"),
    )
    compile: bool = setting(False, "torch.compile the decoder blocks: minutes at first, faster steps on GPUs")
    gradient_checkpointing: bool = setting(False, "recompute the decoder blocks in backward: less memory, slower")
    bf16: bool = key(False, "mixed precision: bfloat16 arithmetic, float32 weights and optimizer")
    bf16_weights: bool = key(False, "weights and optimizer in bfloat16 too (what the reference's bf16 does)")
    tf32: bool = key(False, "TF32 for float32 matrix products on GPUs: faster, with 10 bits of mantissa", later=True)

    # evaluation and checkpoints
    eval_batch_size: int = setting(32, "prompts generated from at once on one rank", low=1)
    max_new_tokens: int = setting(128, "longest generation", low=1)
    val_samples: int = setting(
        0, "answers sampled to each validation question beside the greedy one, for pass@k and vote (0: none)", low=0
    )
    temperature: float = key(
        0.0, "of the tokens of sampled answers; 0 is greedy decoding", low=0, check=_check_temperature, later=True
    )
    thought_noise: float | str = key(
        0.0,
        "S | absolute:S: Gaussian noise in each thought z of a sampled answer; its standard deviation in each of the D "
        "dimensions is S |z| / sqrt(D), or S",
        check=split_noise,
        later=True,
    )
    thought_dropout: float = setting(
        0.0, "of sampled answers in validation: dropout of the decoder blocks before the last latent", low=0, high=0.99
    )
    answer_match: str = setting(
        "text",
        "text | number: whether an answer has to be the gold answer's text without commas (reference), or the last "
        "number in it to be less than 0.001 from the gold answer",
        choices=("text", "number"),
    )
    save_only_improve: bool = setting(False, "save only when validation accuracy is the best of its stage so far")
    save_every_steps: int | None = setting(None, "save within epochs too, every so many optimizer steps", low=1)
    keep_checkpoints: int | None = setting(None, "keep the newest so many epochs, and the best (default: all)", low=1)
    continue_changed: bool = setting(False, "continue a run although these keys would have led to other weights")
    skip_nonfinite: bool = setting(False, "skip and count optimizer steps with a loss or gradient that is not finite")

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: list[str] | tuple[str, ...] = (), needs_files: bool = True
    ) -> Config:
        """Reads a YAML file, the files that it extends, the row that is chosen of it, and `key=value` overrides.
        Without needs_files, paths may be missing: for looking at a plan before there is data. Raises UserError that
        lists everything that is wrong, after all of it has been looked for."""
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
            found = config.problems(launched_ranks()[1], needs_files)
            problems += [text for text in found if not any(re.search(rf"\b{name}\b", text) for name in wrong)]
        if problems:
            raise UserError(f"{path}: " + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
        return config

    def __init__(self, **values):
        """Keys that are not given have their defaults; see `methods.with_defaults`."""
        values = methods.with_defaults(values)
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
    def arithmetic(self) -> str:
        """Of matrix products on a GPU: bf16 | tf32 | float32."""
        return "bf16" if self.bf16 or self.bf16_weights else "tf32" if self.tf32 else "float32"

    @property
    def last_stage(self) -> int:
        """The stage in which every written step is gone: one past max_latent_stage (paper, Section 4.1)."""
        return self.max_latent_stage + 1

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(forward passes of a rank for one optimizer step, examples of a pass).

        The second is batch_size_training, or less where that would be more than the global batch on so many ranks.
        Raises UserError where the global batch does not divide.
        """
        batch, most = self.global_batch_size, self.batch_size_training
        if batch is None:
            return self.gradient_accumulation_steps, most
        share, rest = divmod(batch, world_size)
        size = min(share, most)
        if rest or not size or share % size:
            what = f"no multiple of {world_size} ranks x batch_size_training {most}"
            raise UserError(f"global_batch_size {batch} is {what}")
        return share // size, size

    def problems(self, world_size: int = 1, needs_files: bool = True) -> list[str]:
        """What is impossible about this configuration on this machine, a sentence each."""
        found = [*(self.missing_files() if needs_files else []), *self._of_names(), *self._of_combinations()]
        for rules in methods.all_rules().values():
            found += rules.problems(self)
        if not self.only_eval:  # which has no optimizer steps
            try:
                self.micro_batches(world_size)
            except UserError as error:
                found.append(str(error))
        return found

    def _of_names(self) -> Iterator[str]:
        """The run's folder, and names of sets, which files bear."""
        if reason := why_unreadable(self.save_path):
            yield f"save_path {self.save_path!r} cannot be reached: {reason}"
        elif Path(self.save_path).is_file():
            yield f"save_path {self.save_path!r} is a file, not a folder"
        if is_no_file_name(self.name):
            yield f"name {self.name!r} must be a plain folder name, of at most {LONGEST_NAME} bytes"
        if isinstance(self.val_path, dict) and not self.only_eval:
            yield "val_path names several files, which is for eval-only runs: a training run takes one path"
        for option in ("val_path", "test_path"):
            paths = getattr(self, option)
            if paths == {}:
                yield f"{option} is an empty mapping: set it to a path, or to {{name: path, other: path}}"
            for name in filter(is_no_file_name, paths if isinstance(paths, dict) else ()):
                yield f"{option}: the name {name!r} must be a plain one, of at most {LONGEST_NAME} bytes"

    def _of_combinations(self) -> list[str]:
        """Keys that exclude or need each other."""
        entries = len(self.epochs_per_stage) if isinstance(self.epochs_per_stage, list) else 0
        ends, stages, loads = self.resume >= self.num_epochs, self.last_stage + 1, self.load_model_path is not None
        thinks, forced = self.only_eval and self.has_latents, self.eval_latents is not None
        disturbed, feeds = split_noise(self.thought_noise)[0] or self.thought_dropout, self.thought != "pause"
        wrong = [
            (ends and not self.only_eval, f"resume {self.resume} leaves nothing of num_epochs {self.num_epochs}"),
            (self.only_eval and not loads, "only_eval needs load_model_path: the checkpoint to evaluate"),
            (forced and not thinks, "eval_latents is for eval-only runs of method coconut, or of another with latents"),
            (self.advance_after > 1 and self.advance_at is None, "advance_after needs advance_at"),
            (entries > stages, f"epochs_per_stage has {entries} entries, but there are only {stages} stages, from 0"),
            (self.from_scratch and loads, "from_scratch and load_model_path exclude each other"),
            (self.from_scratch and self.lora_rank, "lora_rank updates existing weights, and from_scratch has none"),
            (self.bf16 and self.bf16_weights, "bf16 (mixed precision) and bf16_weights exclude each other"),
            (self.compile and self.gradient_checkpointing, "compile and gradient_checkpointing exclude each other"),
            (
                disturbed and not (feeds and self.has_latents),
                "thought_noise and thought_dropout need thoughts that are fed back, and "
                f"method {self.method} with thought {self.thought} has none",
            ),
            (self.compile and self.thought_dropout, "compile and thought_dropout exclude each other"),
        ]
        return [text for is_wrong, text in wrong if is_wrong]

    def missing_files(self, but_weights: bool = False) -> Iterator[str]:
        """Files that are missing, and placeholders that are still there; `but_weights`: without load_model_path's."""
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
        # its own checkpoint wins; the hub is asked later
        if source and not (continues or but_weights or is_on_hub(source)):
            yield from _missing("load_model_path", str(split_choice(source)[0]))
        shapes = continues or (source and _holds(split_choice(source)[0], "config.json", "checkpoint_*/config.json"))
        is_path = model.is_absolute() or self.model_id.startswith(".")
        unknown = why_unreadable(self.model_id)
        if unknown or (not shapes and (is_path or (len(model.parts) > 1 and model.parents[-2].is_dir()))):
            yield from _missing("model_id", self.model_id)

    @classmethod
    def problems_of(cls, values: dict) -> list[str]:
        """What is wrong with the values of a JSON file, a sentence each; unknown keys are ignored."""
        problems: list[str] = []
        right = _checked(values, problems).items()
        return problems + [
            f"{key} must be {value!r}, not {values[key]!r}" for key, value in right if value != values[key]
        ]

    @classmethod
    def describe(cls) -> str:
        """Every key with its default and its meaning, for --help."""
        fields = dataclasses.fields(cls)
        lines = [f"  {field.name} = {json.dumps(field.default)}\n      {field.metadata['help']}" for field in fields]
        others = {name: rules.defaults for name, rules in methods.all_rules().items() if rules.defaults}
        lines += ["\nother defaults of methods:", *(f"  {name}: {json.dumps(keys)}" for name, keys in others.items())]
        return "\n".join(lines)


def is_no_file_name(name: str) -> bool:
    return bool(NO_FILE_NAME.search(name)) or len(name.encode(errors="surrogatepass")) > LONGEST_NAME


def _holds(folder: Path, *patterns: str) -> bool:
    return not why_unreadable(folder) and any(any(folder.glob(pattern)) for pattern in patterns)


def _missing(name: str, value: str) -> list[str]:
    """Why there is nothing at the path that a key has, if so."""
    if reason := why_unreadable(value):
        return [f"{name} {value!r} cannot be reached: {reason}"]
    there = Path(value).exists() or PLACEHOLDER.search(value)
    return [] if there else [f"{name} {value!r} does not exist{_preparation_hint(value)}"]


def _preparation_hint(path: str) -> str:
    """The script that makes a file or model of args/."""
    tiny, llama = "python preprocessing/tiny_model.py data/", "--tokenizer char --shape llama --width 64"
    hints = {
        "prosqa_mini": "python preprocessing/prosqa.py --prefix prosqa_mini --train 2000 --valid 100 --test 100",
        "prosqa_": "python preprocessing/prosqa.py",
        "prontoqa_": "python preprocessing/prontoqa_generate.py",
        **{name: f"python preprocessing/ood.py {name}" for name in ("gsm_hard", "svamp", "multiarith")},
        "gsm_": "bash preprocessing/gsm_icot.bash",
        "arithmetic": "python preprocessing/arithmetic.py",
        "machine": "python preprocessing/machine.py --out data/machine",
        "tiny_arithmetic": f"{tiny}arithmetic_train.json --out data/tiny_arithmetic {llama} --untied",
        "tiny_prosqa": f"{tiny}prosqa_mini_train.json --out data/tiny_prosqa",
    }
    where, here = Path(path), Path(__file__).parent
    how = next((how for word, how in hints.items() if where.name.startswith(word)), None)
    if (here / "args" / (of_run := f"{where.name.replace('-', '_')}.yaml")).is_file():
        how = f"python run.py args/{of_run}"
    if where.as_posix().endswith("data/machine/model"):
        how = f"{tiny}machine/machine_train.json --out data/machine/model {llama} --positions 64"
    if (here / "experiments" / f"{where.parent.name}.yaml").is_file():  # with its model
        how = f"python experiments/grid.py experiments/{where.parent.name}.yaml --dry-run"
    return f" (make it with: {how})" if how else ""


# ---- Where values are written ----


class Layer(typing.NamedTuple):
    """The values of one file, or of the command line, by key: texts, and lists and mappings of texts. None where the
    file cannot be read."""

    origin: str
    values: dict | None
    rows: dict[str, dict] = {}  # noqa: RUF012


class _TextLoader(yaml.BaseLoader):
    """Loads texts, and lists and mappings of texts, and notes the keys that a mapping has twice."""

    def __init__(self, text: str):
        super().__init__(text)
        self.twice: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        values = super().construct_mapping(node, deep)
        lines: dict[str, int] = {}
        for name, _ in node.value:
            line = name.start_mark.line + 1
            if name.value in lines:
                self.twice.append(f"the key {name.value!r} twice, in lines {lines[name.value]} and {line}")
            lines[name.value] = line
        return values


def read_yaml(text: str, where: str, problems: list[str]) -> dict:
    """The keys of a YAML mapping. Every value is as it is written: text, or a list or a mapping of such. Raises
    YAMLError, ValueError and RecursionError where it is no YAML."""
    loader = _TextLoader(text)
    values = loader.get_single_data()
    problems += [f"{where} has {what}" for what in loader.twice]
    if not isinstance(values, dict | None):
        problems.append(f"{where} must hold `key: value` lines")
    return values if isinstance(values, dict) else {}


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
        try:
            layers = _layers_of(path.parent / expanded(parent), problems, (*seen, path.resolve()))
        except ValueError as error:
            problems.append(f"extends in {path} {error}, not {shown(parent)}")
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
    return [Layer(COMMAND_LINE, values)] if values else []


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
    keys = dict(rows[chosen])
    before = list(rows)[: list(rows).index(chosen)]
    while (parent := keys.pop("extends", None)) in before:
        keys = {**rows[parent], **keys}
    if parent is not None:
        problems.append(f"row {chosen} extends {shown(parent)}, which is no row before it")
    number = next(number for number, layer in enumerate(layers) if chosen in layer.rows)
    layers.insert(number + 1, Layer(f"{layers[number].origin}, row {chosen}", keys))
    return [chosen.replace("_", "-")] if chooser.origin == COMMAND_LINE or chosen in chooser.rows else []


def _merge(values: dict, layer: Layer, problems: list[str]) -> None:
    """Lays one file, or the command line, over `values`; the four method booleans become `method` on the way."""
    batch = "" if "global_batch_size" in layer.values else values.get("global_batch_size", "")
    if "gradient_accumulation_steps" in layer.values and batch not in NOTHING:
        why = f"it follows from global_batch_size {batch}: set that instead, or to null"
        problems.append(f"gradient_accumulation_steps in {layer.origin} has no effect, since {why}")
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
            hint = ": it is for files alone" if name in ("extends", "rows") else hint
            problems.append(f"unknown key {name!r} in {layer.origin}{hint}")
    chosen = {name for name, on in booleans.items() if on}
    if {"coconut", "no_thoughts"} <= chosen:  # as in the reference, "without thoughts" is a switch on top of coconut
        chosen.remove("coconut")
    if "method" in layer.values:
        chosen.add(str(layer.values["method"]))
    if len(chosen) > 1:
        problems.append(f"two methods at once in {layer.origin}: {' and '.join(sorted(chosen))}")
    elif chosen:  # as it is written, where it is no text
        values["method"] = layer.values.get("method", *chosen)
    elif booleans and ("method" not in values or values["method"] in booleans):
        problems.append(f"no method in {layer.origin}: set method to one of {', '.join(METHODS)}")


# ---- From what is written to a value of a type ----


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


def expanded(path: str) -> str:
    """A path with its ~, $NAME and ${NAME} replaced. Raises ValueError that names what is not set."""
    if unset := [name for name in re.findall(r"\$\{?(\w+)", path) if name not in os.environ]:
        raise ValueError(f"must be a path whose variables are set ({', '.join(unset)} is not)")
    found = os.path.expanduser(os.path.expandvars(path))
    if found.startswith("~"):
        raise ValueError(f"must be a path of a user who exists ({found.partition('/')[0]} does not)")
    return found


def shown(value) -> str:
    """A value in a message: a list as it was written."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else repr(value)


def _check_limits(value, limits) -> None:
    if limits["choices"] and isinstance(value, str) and value not in limits["choices"]:
        raise ValueError("must be one of " + ", ".join(limits["choices"]))
    if limits["check"]:
        limits["check"](value)
    numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) in (int, float)]
    if not all(number >= limits["low"] for number in numbers):
        raise ValueError(f"must be at least {limits['low']}")
    if not all(number <= limits["high"] for number in numbers):
        raise ValueError(f"must be at most {limits['high']}")


def _checked(values: dict, problems: list[str]) -> dict:
    """Converts each value to its key's type; what does not convert is reported and left out."""
    annotations = typing.get_type_hints(Config)
    result = {}
    for field in dataclasses.fields(Config):
        if field.name not in values:
            continue
        try:
            value = converted(values[field.name], annotations[field.name], field.metadata["empty"])
            _check_limits(value, field.metadata)
            if field.name in PATHS and value is not None:
                several = isinstance(value, dict)
                value = {name: expanded(path) for name, path in value.items()} if several else expanded(value)
            result[field.name] = value
        except ValueError as error:
            problems.append(f"{field.name} {error}, not {shown(values[field.name])}")
    return result


def configure(
    description: str,
    schedule: typing.Callable[[Config, int], str],
    plan: typing.Callable[[Config, int | None, float | None], str],
) -> Config:
    """The configuration that the command line asks for. Ends the program where there is a mistake in it, and after
    --help, --schedule or --plan, whose texts `schedule` and `plan` make."""
    is_main = launched_ranks()[0] == 0
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"keys and their defaults:\n{Config.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as those in args/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key of the file from here")
    parser.add_argument("--schedule", action="store_true", help="print what each epoch will do, and stop")
    parser.add_argument(
        "--plan", action="store_true", help="print what the run will need: memory, disk, tokens, hours; and stop"
    )
    parser.add_argument("--gpus", type=int, help="with --plan: for so many GPUs (default: what this command would use)")
    parser.add_argument(
        "--gpu-memory", type=float, help="with --plan: GiB of each (default: 80 if there is no GPU here)"
    )
    if not is_main:  # one rank speaks
        parser.print_help = lambda *_: None
        parser.error = lambda message: sys.exit(print_error(UserError(message)))
    options, unknown = parser.parse_known_intermixed_args()
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        known = name in {*METHOD_BOOLEANS, *(field.name for field in dataclasses.fields(Config))}
        hint = f": a key is set without dashes, as in {name}=VALUE" if known else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if min(options.gpus or 1, options.gpu_memory or 1) <= 0:
        parser.error("--gpus and --gpu-memory must be more than 0")
    try:
        config = Config.from_file(options.config, options.overrides, needs_files=not (options.schedule or options.plan))
        if options.schedule and is_main:
            print_result(schedule(config, launched_ranks()[1]))
        if options.plan and is_main:
            print_result(plan(config, options.gpus, options.gpu_memory))
    except UserError as error:
        # a node's ranks read the same files: its first one prints, also where the others are late
        error.is_shared |= int(os.environ.get("LOCAL_RANK", 0)) > 0
        sys.exit(print_error(error))
    if options.schedule or options.plan:
        sys.exit()
    return config
