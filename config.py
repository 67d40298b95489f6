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
import typing
from dataclasses import dataclass
from pathlib import Path

import config_checks
from config_checks import WITH_LATENTS
from config_files import Layer, Value, check_range, converted, override_layer, yaml_layers
from utils import UserError, launched_ranks, print_error

METHODS = ("coconut", "cot", "no_cot", "no_thoughts", "icot", "codi", "multi_mode")
MOST_LATENTS = 100_000  # longer than any model's positions; sequences of more fill the memory before they are refused
MOST = 1e30  # of what a gradient is multiplied with: it has to stay a float32
MOST_RANKS = 65_536  # of LoRA: more than any layer has
METHOD_BOOLEANS = ("coconut", "cot", "no_thoughts", "no_cot")  # keys of the reference that became `method`
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
    "looped": "",
    "mlp": "[:P]",
    "token": "[:st]",
    "suppressed": "[:T]",
    "last+suppressed": "[:T]",
    "embedding+suppressed": "[:T]",
}


def split_thought(spelling: str) -> tuple[str, int | float | str | None]:
    """(name, number) of a thought: "layer:-2" is ("layer", -2), "layer:0.5" is ("layer", 0.5), "last" ("last", None),
    "token:st" ("token", "st").

    Raises ValueError that lists what there is.
    """
    name, colon, text = spelling.partition(":")
    whole, share = r"\d{1,6}", r"\d{0,6}\.\d{1,20}"
    numbers = {"": "", ":N": f":(-?{whole}|{share})", "[:T]": f"(:({whole}|{share}))?", "[:P]": r"(:[1-9]\d{0,5})?"}
    numbers["[:st]"] = "(:st)?"
    if name not in THOUGHTS or not re.fullmatch(numbers[THOUGHTS[name]], colon + text):
        raise ValueError(f"must be one of {', '.join(name + takes for name, takes in THOUGHTS.items())}")
    if text == "st":
        return name, text
    number = None if not text else float(text) if "." in text else int(text)
    return name, number


def split_passes(spelling: str) -> int | str | None:
    """What Coconut is given as latent_passes: None where it is sequential, a number, or "stage". Raises ValueError."""
    if spelling == "sequential":
        return None
    if spelling != "stage" and not re.fullmatch(r"\d{1,6}", spelling):
        raise ValueError("must be sequential, a number from 0 on, or stage")
    return spelling if spelling == "stage" else int(spelling)


def _check_smoothing(smoothing: float | None) -> None:
    """Raises ValueError where nearly all tokens would be drawn, and numpy can draw no more."""
    if smoothing and smoothing < 1e-6:
        raise ValueError("must be 0, for none, or at least 1e-6")


def _key(
    default,
    text: str,
    *,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    check: typing.Callable | None = None,
    free: bool = False,
    later: bool = False,
    empty: bool = False,
):
    """A key with its limits; `free` where it does not decide what the weights become, so that it may change between a
    run and its continuation; `later` where results of experiments/ are older than the key, and had its default; `empty`
    where nothing, as in `key=`, is the empty text."""
    limits = {"choices": choices, "low": low, "high": high, "check": check, "free": free, "later": later}
    limits["empty"] = empty
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass
class Config:
    """One run. Every field is a key of the YAML files in args/ and of `run.py FILE key=value ...`.

    The keys that the reference implementation knows keep its names and meanings; the others default to what it does.
    """

    # the run
    project: str = _key("coconut", "wandb project", free=True)
    name: str = _key(
        "run",
        "name of the run; its folder is save_path/name (default: the YAML file's name; never inherited by extends)",
        free=True,
    )
    save_path: str = _key("checkpoints", "folder that holds the runs", free=True)
    only_eval: bool = _key(False, "evaluate load_model_path on val_path and stop", free=True)
    seed: int = _key(0, "seeds the weights that are made anew, the data order, dropout and stage mixing", low=0)
    debug: bool = _key(
        False,
        "quick look in the folder NAME-debug: 5000 training and 32 validation examples, no checkpoints, no wandb",
        free=True,
    )
    wandb: str = _key(
        "online",
        "online | offline | disabled; online becomes offline where nobody is logged in; "
        "the variable WANDB_MODE wins over this key",
        choices=("online", "offline", "disabled"),
        free=True,
    )
    log_every_steps: int = _key(10, "optimizer steps between two writes to metrics.jsonl and wandb", low=1, free=True)

    # the method
    method: str = _key("coconut", " | ".join(METHODS) + "; the reference's four booleans are read too", choices=METHODS)
    thought: str = _key(
        "last",
        "what a latent position is fed: " + " | ".join(name + takes for name, takes in THOUGHTS.items()) + "; N is a "
        "layer, counted from the end where negative, or a share of the layers such as 0.5, T a threshold, P a width, "
        "st the straight-through gradient",
        check=split_thought,
    )
    latent_passes: str = _key(
        "sequential",
        "sequential | T | stage: thoughts one after the other, or all at once: in T passes after that with the latent "
        "token's embedding (PCCoT), or in as many passes as they stand for steps (LOTUS)",
        check=split_passes,
        later=True,
    )
    mode: str = _key(
        "latent",
        "multi_mode: latent | written | direct, how the model is asked in an eval-only run: for thoughts, for written "
        "steps, for the answer at once; a training run validates all three",
        choices=("latent", "written", "direct"),
        free=True,
    )
    distillation: float = _key(
        1.0, "codi: weight of the distance between the student's states and the teacher's", low=0, high=MOST, later=True
    )
    latent_labels: float = _key(
        0.0,
        "weight of what the latents are told that they stand for, the tokens of their step (LOTUS: 0.05)",
        low=0,
        high=MOST,
        later=True,
    )
    step_decoder: str = _key(
        "none",
        "none | pretrained | copy: in training, a second model must say from each step's thoughts what the step was "
        "(SIM-CoT): model_id with its pretrained weights, or a copy of this model as it begins",
        choices=("none", "pretrained", "copy"),
        later=True,
    )
    step_decoder_weight: float = _key(1.0, "of that model's loss beside the answer's", low=0, high=MOST, later=True)
    step_decoder_reduction: str = _key(
        "sum", "sum | mean: of its loss over the tokens of a step", choices=("sum", "mean"), later=True
    )
    step_decoder_surplus: str = _key(
        "answer",
        "answer | none: what the thoughts stand for that an example has beyond its steps",
        choices=("answer", "none"),
        later=True,
    )
    c_thought: int = _key(1, "latent thoughts that replace one written step", low=0, high=MOST_LATENTS)
    max_latent_stage: int = _key(
        6, "stage after which no more thoughts are added and all steps are dropped", low=0, high=MOST_LATENTS
    )
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
    advance_at: float | None = _key(
        None, "a stage ends before its epochs are over when validation accuracy has reached this", low=0, high=1
    )
    latent_markers: str = _key(
        "both",
        "both | none: whether the latents stand between a start and an end marker, as in the paper",
        choices=("both", "none"),
    )
    step_separator: str = _key("\n", 'what follows each written step; "" for steps of one token', empty=True)
    eval_latents_from_steps: bool = _key(
        False,
        "with pad_latent_to_max off, evaluate with at most as many steps of thought as the example has (reference)",
        free=True,
    )
    eval_latents: int | None = _key(
        None,
        "in an eval-only run of method coconut, so many latent thoughts whatever the stage",
        low=0,
        high=MOST_LATENTS,
        free=True,
    )

    icot_tokens_per_epoch: int = _key(8, "icot: reasoning tokens removed more with each epoch", low=1)
    icot_remove_all_after: int | None = _key(None, "icot: remove everything once so many tokens are removed", low=1)
    icot_smoothing: float | None = _key(
        4.0, "icot: o more tokens are removed with probability ~ exp(-this * o)", low=0, check=_check_smoothing
    )

    # the model
    model_id: str = _key(
        "openai-community/gpt2", "Hugging Face id or local folder of the causal language model", free=True
    )
    from_scratch: bool = _key(False, "take only the shape of model_id; initialise its weights from seed")
    load_model_path: str | None = _key(
        None,
        "weights to start from or to evaluate: a checkpoint folder, a run's folder (its newest checkpoint), RUN@best, "
        "RUN@12 (after 12 epochs), a Hugging Face folder, a file of the reference, or org/name:file on the hub",
        free=True,
    )
    lora_rank: int | None = _key(
        None,
        "train low-rank updates of the linear layers, of this rank, and nothing else (LoRA)",
        low=1,
        high=MOST_RANKS,
        later=True,
    )
    lora_alpha: int = _key(32, "LoRA: the updates count lora_alpha / lora_rank times", low=1, later=True)
    resume: int = _key(
        0, "epoch to start from with load_model_path; in an eval-only run the epoch whose stage is used", low=0
    )

    # the data
    train_path: str | None = _key(None, "JSON list of {question, answer, steps}", free=True)
    val_path: str | dict[str, str] | None = _key(
        None,
        "the same, for validation and for eval-only runs; these take several files too, as {name: path, other: path}",
        free=True,
    )
    max_train_examples: int | None = _key(None, "train on the first so many examples", low=1)
    max_train_tokens: int | None = _key(
        None, "leave out training examples that are longer than this with all steps written", low=1
    )
    max_eval_examples: int | None = _key(None, "validate on the first so many examples", low=1, free=True)
    group_by_length: bool = _key(
        False, "batches of similar lengths, in random order: less padding (the paper's order is random throughout)"
    )
    num_workers: int = _key(1, "loader processes for each rank; none under a debugger", low=0, free=True)

    # the optimisation
    num_epochs: int = _key(50, "epochs in all, counted from epoch 0 of the curriculum", low=1)
    batch_size_training: int = _key(32, "examples of one forward pass on one rank", low=1)
    gradient_accumulation_steps: int = _key(1, "forward passes of one optimizer step on one rank", low=1)
    global_batch_size: int | None = _key(
        None, "examples of one optimizer step over all ranks; gradient_accumulation_steps is derived from it", low=1
    )
    lr: float = _key(1e-4, "AdamW's learning rate", low=0, high=MOST)
    weight_decay: float = _key(0.01, "AdamW's weight decay, on every parameter", low=0, high=MOST)
    lr_scheduler: str = _key("constant", "constant | linear | cosine", choices=("constant", "linear", "cosine"))
    warmup_steps: int = _key(0, "optimizer steps over which lr rises from 0", low=0)
    max_grad_norm: float | None = _key(None, "clip the gradient's norm to this; not at all where it is 0", low=0)
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
        free=True,
    )
    compile: bool = _key(
        False, "compile the decoder blocks with torch.compile: minutes at first, faster steps on GPUs", free=True
    )
    gradient_checkpointing: bool = _key(
        False, "keep only the inputs of the decoder blocks and compute the rest again: less memory, slower", free=True
    )
    bf16: bool = _key(False, "mixed precision: bfloat16 arithmetic, float32 weights and optimizer")
    bf16_weights: bool = _key(False, "weights and optimizer in bfloat16 too (what the reference's bf16 does)")

    # evaluation and checkpoints
    eval_batch_size: int = _key(32, "prompts generated from at once on one rank", low=1, free=True)
    max_new_tokens: int = _key(128, "longest generation", low=1, free=True)
    answer_match: str = _key(
        "text",
        "text | number: an answer is right where it is the gold answer's text without commas (reference), or where the "
        "last number in it is less than 0.001 from the gold answer",
        choices=("text", "number"),
        free=True,
    )
    save_only_improve: bool = _key(
        False, "save only when validation accuracy is the best of its stage so far", free=True
    )
    save_every_steps: int | None = _key(
        None,
        "save within epochs too, after every so many optimizer steps; only the newest two of these are kept",
        low=1,
        free=True,
    )
    keep_checkpoints: int | None = _key(
        None, "keep the newest so many epochs, and the best (default: all)", low=1, free=True
    )
    continue_changed: bool = _key(
        False,
        "continue the run in save_path/name although this configuration would have led to other weights",
        free=True,
    )
    skip_nonfinite: bool = _key(
        False,
        "leave out optimizer steps whose loss or gradient is not finite, and count them, instead of stopping",
        free=True,
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
        values = {"name": Value(Path(path).stem, None)}
        layers = yaml_layers(Path(path), problems) + override_layer(overrides, problems)
        for layer in layers:
            _merge(values, layer, problems)
        right = _checked(cls, values, problems)
        config = cls(**right)
        if all(layer.values is not None for layer in layers):  # of keys that nobody could read there is nothing to say
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

    def __post_init__(self):
        if isinstance(self.reset_optimizer, bool):
            self.reset_optimizer = "epoch" if self.reset_optimizer else "never"
        self.latent_passes = str(self.latent_passes)

    @property
    def run_dir(self) -> Path:
        return Path(self.save_path) / (f"{self.name}-debug" if self.debug else self.name)

    def by_set(self) -> dict[str, Config]:
        """The files of val_path by their names, each as the configuration that evaluates it alone; a single path has
        the name ""."""
        paths = self.val_path if isinstance(self.val_path, dict) else {"": self.val_path}
        return {name: dataclasses.replace(self, val_path=path) for name, path in paths.items()}

    @property
    def has_latents(self) -> bool:
        """Whether the method's sequences have latent positions."""
        return self.method in WITH_LATENTS

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
        return (config_checks.paths(self) if needs_files else []) + config_checks.combinations(self, world_size)

    @classmethod
    def problems_of(cls, values: dict) -> list[str]:
        """What is wrong with values that a file has for some of the keys, a sentence each; what is no key is passed
        over."""
        problems: list[str] = []
        _checked(cls, {name: Value(value, None) for name, value in values.items()}, problems)
        return problems

    @classmethod
    def describe(cls) -> str:
        """Every key with its default and its meaning, for --help."""
        lines = []
        for field in dataclasses.fields(cls):
            lines.append(f"  {field.name} = {json.dumps(field.default)}\n      {field.metadata['help']}")
        return "\n".join(lines)


def _merge(values: dict[str, Value], layer: Layer, problems: list[str]) -> None:
    """Lays one file, or the command line, over `values`; the four method booleans become `method` on the way."""
    if layer.values is None:
        return
    if "gradient_accumulation_steps" in layer.values and "global_batch_size" not in layer.values:
        of_before = values.get("global_batch_size", Value(None, None)).value
        if of_before not in (None, "None"):
            problems.append(
                f"gradient_accumulation_steps in {layer.origin} has no effect, since it follows from global_batch_size "
                f"{of_before}: set that instead, or to null"
            )
    known = {field.name for field in dataclasses.fields(Config)}
    booleans = {}
    for name, value in layer.values.items():
        if name in METHOD_BOOLEANS:
            if not isinstance(value.value, bool):
                problems.append(f"{name} must be true or false, not {value.value!r}")
            booleans[name] = value.value is True
        elif name in known:
            values[name] = value
        else:
            close = difflib.get_close_matches(str(name), [*known, *METHOD_BOOLEANS, "extends"], 1)
            hint = f": did you mean {close[0]!r}?" if close else " (run.py --help lists the keys)"
            hint = ": it is for files alone" if name == "extends" else hint
            problems.append(f"unknown key {name!r} in {layer.origin}{hint}")
    chosen = {name for name, on in booleans.items() if on}
    if {"coconut", "no_thoughts"} <= chosen:  # as in the reference, "without thoughts" is a switch on top of coconut
        chosen.remove("coconut")
    if "method" in layer.values:
        chosen.add(str(layer.values["method"].value))
    if len(chosen) > 1:
        problems.append(f"two methods at once in {layer.origin}: {' and '.join(sorted(map(str, chosen)))}")
    elif chosen:
        values["method"] = Value(chosen.pop(), None)
    elif booleans and ("method" not in values or values["method"].value in booleans):
        problems.append(f"no method in {layer.origin}: set method to one of {', '.join(METHODS)}")


def _checked(cls, values: dict[str, Value], problems: list[str]) -> dict:
    """Converts each value to its field's type; what does not convert is reported and left out."""
    annotations = typing.get_type_hints(cls)
    result = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        written = values[field.name]
        if field.metadata["empty"] and written.text == "":
            written = Value("", "")
        try:
            value = converted(written, annotations[field.name])
            check_range(value, field.metadata)
        except ValueError as error:
            shown = written.value if written.text is None or isinstance(written.value, str) else written.text
            problems.append(f"{field.name} {error}, not {shown!r}")
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
