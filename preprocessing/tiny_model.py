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

from files import UserError, load_examples, print_error, read_json, replaced
from random_model import SHAPES, RandomModel

EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
# char: one character, or a mark of the data format; word: with the space before it, as in GPT-2's vocabulary
PIECES = {"char": r"<<|>>|#+|[\s\S]", "word": r" ?\w+| ?#+|[\s\S]"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="data files whose text is the vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", choices=list(PIECES), default="word", help="(default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default=RandomModel.shape, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=RandomModel.width, help="hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=RandomModel.layers, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=RandomModel.heads, help="attention heads (default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, default=RandomModel.positions, help="longest sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--untied", dest="tied", action="store_false", help="a matrix each for input and output (GPT-2: never)"
    )
    parser.add_argument("--seed", type=int, default=RandomModel.seed, help="of the weights (default: %(default)s)")
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


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
    """The files of an earlier model of this script, which go; none where a folder holds another model. A tokenizer of
    whole words tells: no pretrained model has one."""
    try:
        own = read_json(folder / "tokenizer.json")["model"]["type"] == "WordLevel"
    except (UserError, KeyError, TypeError):
        own = False
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json")
    return files if own else ()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    names = {field.name for field in dataclasses.fields(RandomModel)}
    model = {name: value for name, value in vars(options).items() if name in names}
    try:
        vocabulary, parameters = write_model(options.data, options.out, options.tokenizer, **model)
    except UserError as error:
        return print_error(error)
    print(f"{options.out}: {options.shape}, {parameters:,} parameters, {vocabulary} {options.tokenizer} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
