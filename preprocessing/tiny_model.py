"""Writes a small, randomly initialised model with a tokenizer of its own, as a local Hugging Face folder.

The tokenizer's vocabulary is what occurs in a data file, so that the whole program runs, and learns, where no model
hub can be reached:

    python preprocessing/tiny_model.py data/arithmetic_train.json --tokenizer char --out data/tiny_arithmetic
    python preprocessing/tiny_model.py data/prosqa_train.json --tokenizer word --shape gpt2 --out data/tiny_prosqa
"""

import argparse
import sys
from pathlib import Path

import torch
from files import UserError, load_examples
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
# char: one character, or a mark of the data format; word: with the space before it, as in GPT-2's vocabulary
PIECES = {"char": r"<<|>>|#+|[\s\S]", "word": r" ?\w+| ?#+|[\s\S]"}


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


def make_config(shape: str, vocab_size: int, width: int, layers: int, heads: int, positions: int, tied: bool):
    """The configuration of a model of that shape, with EOS as token 0."""
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if shape == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # small models underfit as it is
        return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=positions, **no_dropout, **common)
    family = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape]
    return family(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        **common,
    )


def write_model(
    data: list[Path],
    out: Path,
    kind: str = "word",
    shape: str = "gpt2",
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    positions: int = 1024,
    tied: bool = False,
    seed: int = 0,
) -> tuple[int, int]:
    """Writes the folder; returns (vocabulary size, number of parameters). Deterministic in its arguments."""
    texts = ["### ", "\n"]
    for path in data:
        for example in load_examples(path):
            texts += [example["question"], "### " + example["answer"], *example["steps"]]
    tokenizer = make_tokenizer(texts, kind)
    torch.manual_seed(seed)
    config = make_config(shape, len(tokenizer), width, layers, heads, positions, tied)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return len(tokenizer), model.num_parameters()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="data files whose text is the vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", choices=list(PIECES), default="word", help="(default: %(default)s)")
    parser.add_argument("--shape", choices=["gpt2", "llama", "qwen2"], default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=1024, help="longest sequence (default: %(default)s)")
    parser.add_argument("--tied", action="store_true", help="one matrix for input and output (GPT-2: always)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--width {options.width} is no multiple of --heads {options.heads}")
    try:
        vocabulary, parameters = write_model(
            options.data,
            options.out,
            options.tokenizer,
            options.shape,
            options.width,
            options.layers,
            options.heads,
            options.positions,
            options.tied,
            options.seed,
        )
    except UserError as error:
        parser.error(str(error))
    print(f"{options.out}: {options.shape}, {parameters:,} parameters, {vocabulary} {options.tokenizer} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
