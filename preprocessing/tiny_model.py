"""Writes a small, randomly initialised model with a tokenizer of its own, as a local Hugging Face folder.

The tokenizer's vocabulary is what occurs in a data file, so that the whole program runs, and learns, where no model
hub can be reached:

    python preprocessing/tiny_model.py data/arithmetic_train.json --tokenizer char --out data/tiny_arithmetic
    python preprocessing/tiny_model.py data/prosqa_train.json --tokenizer word --shape gpt2 --out data/tiny_prosqa
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from files import UserError, command, load_examples, read_json
from random_model import SHAPES, RandomModel

from utils import replaced

EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
# char: one character, or a mark of the data format; word: with the space before it, as in GPT-2's vocabulary
PIECES = {"char": r"<<|>>|#+|[\s\S]", "word": r" ?\w+| ?#+|[\s\S]"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, RandomModel()
    add("data", type=Path, nargs="+", help="data files whose text is the vocabulary")
    add("--out", type=Path, required=True, help="folder to write")
    add("--tokenizer", choices=list(PIECES), default="word", help="(default: %(default)s)")
    add("--shape", choices=SHAPES, default=default.shape, help="(default: %(default)s)")
    add("--width", type=int, default=default.width, help="hidden size (default: %(default)s)")
    add("--layers", type=int, default=default.layers, help="(default: %(default)s)")
    add("--heads", type=int, default=default.heads, help="attention heads (default: %(default)s)")
    add("--positions", type=int, default=default.positions, help="longest sequence (default: %(default)s)")
    add("--untied", dest="tied", action="store_false", help="a matrix each for input and output (GPT-2: never)")
    add("--seed", type=int, default=default.seed, help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.width, options.layers, options.heads, options.positions) < 1:
        parser.error("--width, --layers, --heads and --positions must be at least 1")
    if options.width % options.heads:
        parser.error(f"--width {options.width} is no multiple of --heads {options.heads}")
    if options.shape != "gpt2" and options.width // options.heads % 2:
        parser.error(f"--width {options.width} / --heads {options.heads}: {options.shape} needs an even width a head")
    if options.shape == "gpt2" and not options.tied:
        parser.error("--untied: GPT-2's shape is always tied; --shape llama or qwen2 need not be")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be at least 0 and less than 2^63, not {options.seed}")
    if os.path.exists(options.out) and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file, not a folder")
    for path in options.data:
        if not os.path.isfile(path):
            parser.error(f"{path} does not exist, or is no file")
    return options


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the slow imports below

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(texts: list[str], kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose decoding of its encoding is the text itself; kind is 'char' or 'word'."""
    split = pre_tokenizers.Split(Regex(PIECES[kind]), behavior="isolated")
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {piece: number for number, piece in enumerate([EOS, UNKNOWN, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": EOS, "pad_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, clean_up_tokenization_spaces=False)


def write_model(data: list[Path], out: Path, kind: str = "word", *model, **named) -> tuple[int, int]:
    """Writes the folder; returns (vocabulary size, number of parameters). Deterministic in its arguments: after the
    kind of tokenizer those of RandomModel, in its order or by name."""
    random = RandomModel(*model, **named)
    texts = ["### ", "\n"]
    for path in data:
        for example in load_examples(path):
            texts += [example["question"], "### " + example["answer"], *example["steps"]]
    tokenizer = make_tokenizer(texts, kind)
    model = random.build(len(tokenizer))
    with replaced(out, _made_here(out)) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return len(tokenizer), model.num_parameters()


def _made_here(folder: Path) -> tuple[str, ...]:
    """The files of an earlier model of this script, which are replaced; none where a folder holds another model. Its
    tokenizer has whole words, as no pretrained model has."""
    try:
        if read_json(folder / "tokenizer.json")["model"]["type"] != "WordLevel":
            return ()
    except (UserError, KeyError, TypeError):
        return ()
    return "config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json"


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    names = {field.name for field in dataclasses.fields(RandomModel)}
    model = {name: value for name, value in vars(options).items() if name in names}
    vocabulary, parameters = write_model(options.data, options.out, options.tokenizer, **model)
    print(f"{options.out}: {options.shape}, {parameters:,} parameters, {vocabulary} {options.tokenizer} tokens")


if __name__ == "__main__":
    sys.exit(main())
