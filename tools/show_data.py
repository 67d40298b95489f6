"""Shows a data file as the model sees it at a stage: the tokens of its sequences, and their lengths.

    python -m tools.show_data data/prosqa_valid.json --model openai-community/gpt2 \\
        --config args/prosqa.yaml --stage 2 row=pause
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np

from config import Config
from curriculum import IGNORE, LATENT, Markers, stage_of, training_sequence
from preprocessing.examples import load_examples
from preprocessing.tokens import ANSWER_PREFIX, Tokens, markers_of, tokenize
from trainer.commands import command, make_parser
from utils import UserError, print_result


def words(input_ids: list[int], tokenizer) -> str:
    """Returns the tokens' texts, with bars between them, since a text may begin with a space."""
    return "|".join(tokenizer.decode([token]) for token in input_ids).replace("\n", "⏎")


def show_sequence(input_ids: list[int], labels: list[int], markers: Markers, tokenizer) -> list[str]:
    """Returns a line for each run of tokens of one kind (given, latent or supervised) in a training sequence."""

    def kind(pair: tuple[int, int]) -> str:
        return "supervised" if pair[1] != IGNORE else "latent" if pair[0] == markers.latent else "given"

    lines = []
    for name, run in groupby(zip(input_ids, labels, strict=True), key=kind):
        ids = [token for token, _ in run]
        text = f"{LATENT} x {len(ids)}" if name == "latent" else words(ids, tokenizer)
        lines.append(f"{name:>10} {len(ids):>4}  {text}")
    return lines


def length_table(tokens: Tokens, stage: int, config: Config, markers: Markers) -> list[str]:
    """Returns the lines of a table of token counts: of the parts of examples, and of training sequences at a stage."""
    names = ["steps of an example", "tokens of the question", "tokens of all steps", "tokens of the answer"]
    names += [f"sequence at stage {stage}", "  of it supervised"]
    counts = []
    for number in range(len(tokens)):
        question, steps, answer = tokens[number]
        ids, labels = training_sequence(question, steps, answer, stage, config, markers)
        supervised = sum(label != IGNORE for label in labels)
        counts.append((len(steps), len(question), sum(map(len, steps)), len(answer), len(ids), supervised))
    heads = ("mean", "min", "median", "99 %", "max", "example of max")
    lines = [f"{'':<24}" + "".join(f"{head:>9}" for head in heads[:-1]) + f"{heads[-1]:>16}"]
    for name, column in zip(names, zip(*counts, strict=True), strict=True):
        low, middle, high, top = np.percentile(column, (0, 50, 99, 100), method="nearest")
        numbers = "".join(f"{value:>9}" for value in (low, middle, high, top))
        lines.append(f"{name:<24}{np.mean(column):>9.1f}{numbers}{int(np.argmax(column)):>16}")
    return lines


def look(path: str, config: Config, stage: int, n_examples: int) -> str:
    """Returns the output of the command. Raises UserError."""
    if (config.has_latents or config.method == "no_thoughts") and stage > config.last_stage:
        raise UserError(f"there is no stage {stage}: the last one of this configuration is {config.last_stage}")
    files = replace(config, val_path=path, train_path=path, load_model_path=None, only_eval=False)
    for problem in files.problems():
        if problem.startswith(("val_path", "model_id")):  # a missing file, with the command that makes it
            raise UserError(problem.removeprefix("val_path "))
    examples = load_examples(path)
    from trainer.pretrained import add_marker_tokens, load_tokenizer, parts_of

    tokenizer = load_tokenizer(config)
    markers = add_marker_tokens(tokenizer, config.method)
    shown = len(examples) > 20_000
    tokens = tokenize(examples, tokenizer, shown, config.step_separator, path, markers_of(tokenizer))
    lines = [f"{path}: {len(examples):,} examples; method {config.method}, stage {stage}, model {config.model_id}"]
    if (auxiliary := config.rules.texts(config)) is not None:
        texts = [{**example, "steps": auxiliary.steps(example["steps"])} for example in examples]
        tokens.auxiliary = tokenize(texts, tokenizer, step_separator="")
        tokens.answer_prefix = tokenizer(ANSWER_PREFIX, add_special_tokens=False)["input_ids"]
    dataset = parts_of(config).dataset(tokens, config, markers)

    for number in range(min(n_examples, len(examples))):
        item = dataset[number, stage]
        ids, labels = dataset.sequence(item)
        lines += ["", f"example {number}: {len(ids)} tokens"]
        lines += show_sequence(ids, labels, markers, tokenizer)
        for other in dataset.others(item, partial(words, tokenizer=tokenizer)):
            if isinstance(other, str):
                lines.append(other)
            else:
                title, ids, labels = other
                lines += [f"  {title}:", *show_sequence(ids, labels, markers, tokenizer)]
    return "\n".join([*lines, "", *length_table(tokens, stage, config, markers)])


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("file", help="JSON list of {question, answer, steps}")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="keys of the configuration, as for run.py")
    parser.add_argument("--model", metavar="ID", help="model with the tokenizer (default: the key model_id)")
    parser.add_argument("--config", metavar="YAML", help="sets method and stages (default: Coconut, c_thought 1)")
    parser.add_argument("--stage", type=int, metavar="S", help="(default: the stage of the run's first epoch)")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="show the first N (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    if (options.stage or 0) < 0 or options.examples < 0:
        parser.error("--stage and --examples must not be negative")
    if options.keys and not options.config:
        raise UserError(f"{options.keys[0]}: keys need --config YAML")
    config = Config.from_file(options.config, options.keys, needs_files=False) if options.config else Config()
    config.model_id = options.model or config.model_id
    stage = stage_of(config, config.resume) if options.stage is None else options.stage
    print_result(look(options.file, config, stage, options.examples))


if __name__ == "__main__":
    sys.exit(main())
