"""Writes a small, randomly initialised model and its tokenizer as a local Hugging Face folder.

The vocabulary is the set of tokens in the data files. With such a model everything runs, and learns, without access to
a model hub:

    python preprocessing/tiny_model.py data/arithmetic_train.json --tokenizer char --out data/tiny_arithmetic
    python preprocessing/tiny_model.py data/prosqa_train.json --tokenizer word --shape gpt2 --out data/tiny_prosqa

tokenizers, torch and transformers are imported where they are used, so that --help and errors appear at once.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from files import UserError, command, load_examples, make_parser, print_result, read_json, refuse

from trainer.files import replaced

SHAPES = ("gpt2", "llama", "qwen2")
EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
# char: a character or a mark of the data format; word: a word with the space before it, as in GPT-2's vocabulary
PIECES = {"char": r"<<|>>|#+|[\s\S]", "word": r" ?\w+| ?#+|[\s\S]"}


@dataclass(frozen=True)
class RandomModel:
    """Architecture and seed of a model, without the vocabulary. No dropout, because small models underfit.

    GPT-2 ignores tied, mlp and kv_heads: it is tied, its MLP is 4 hidden sizes wide, and every head has its own keys.
    """

    shape: str = "gpt2"
    width: int = 128  # hidden size
    layers: int = 2
    heads: int = 4  # attention heads
    positions: int = 1024  # longest sequence
    tied: bool = True  # one matrix for input and output embeddings
    seed: int = 0  # of the weights
    mlp: int = 3  # width of the MLP, in hidden sizes
    kv_heads: int | None = None  # default: as many as heads

    def config(self, vocab_size: int, eos: int = 0):
        """Returns the transformers configuration."""
        from transformers import GPT2Config, LlamaConfig, Qwen2Config

        common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
        if self.shape == "gpt2":
            sizes = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads, "n_positions": self.positions}
            return GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common)
        return {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.shape](
            hidden_size=self.width,
            intermediate_size=self.mlp * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=self.tied,
            **common,
        )

    def build(self, vocab_size: int, eos: int = 0):
        """Returns the model in float32. The same settings give the same weights."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(self.config(vocab_size, eos), dtype=torch.float32)


def make_tokenizer(texts: list[str], kind: str):
    """Returns a tokenizer of the given kind, 'char' or 'word'. Decoding an encoded text restores it exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(PIECES[kind]), behavior="isolated")
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {piece: number for number, piece in enumerate([EOS, UNKNOWN, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": EOS, "pad_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, clean_up_tokenization_spaces=False)


def write_model(data: list[Path], out: Path, kind: str, *model, **named) -> tuple[int, int]:
    """Writes the folder and returns (vocabulary size, number of parameters). `model` and `named` are the arguments of
    RandomModel. The same arguments give the same folder."""
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
    """Returns patterns of the files that may be overwritten: those of a model that this script made, otherwise none. No
    pretrained model has this script's kind of tokenizer, WordLevel."""
    try:
        if read_json(folder / "tokenizer.json")["model"]["type"] != "WordLevel":
            return ()
    except (UserError, KeyError, TypeError):
        return ()
    return "config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json"


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add, default = parser.add_argument, RandomModel()
    add("data", type=Path, nargs="+", help="data files that the vocabulary is taken from")
    add("--out", type=Path, required=True, help="output folder")
    add("--tokenizer", choices=list(PIECES), default="word", help="(default: %(default)s)")
    add("--shape", choices=SHAPES, default=default.shape, help="(default: %(default)s)")
    add("--width", type=int, default=default.width, help="hidden size (default: %(default)s)")
    add("--layers", type=int, default=default.layers, help="(default: %(default)s)")
    add("--heads", type=int, default=default.heads, help="attention heads (default: %(default)s)")
    add("--positions", type=int, default=default.positions, help="longest sequence (default: %(default)s)")
    add(
        "--untied",
        dest="tied",
        action="store_false",
        help="separate matrices for input and output embeddings (not for gpt2)",
    )
    add("--seed", type=int, default=default.seed, help="seed of the weights (default: %(default)s)")
    o = parser.parse_args(arguments)
    smallest, is_gpt2 = min(o.width, o.layers, o.heads, o.positions), o.shape == "gpt2"
    head_dim = o.width / (o.heads or 1)
    problems = {
        "--width, --layers, --heads and --positions must be at least 1": smallest < 1,
        f"--width {o.width} is not a multiple of --heads {o.heads}": head_dim % 1,
        f"--width {o.width} / --heads {o.heads}: {o.shape} needs an even head size": not is_gpt2 and head_dim % 2,
        "--untied: GPT-2 is always tied; use --shape llama or qwen2": is_gpt2 and not o.tied,
        f"--seed must be at least 0 and less than 2^63, not {o.seed}": not 0 <= o.seed < 2**63,
        f"--out {o.out} is a file, not a folder": o.out.is_file(),
    }
    refuse(parser, problems)
    model = {field.name: vars(o)[field.name] for field in fields(RandomModel) if field.name in o}
    vocabulary, parameters = write_model(o.data, o.out, o.tokenizer, **model)
    print_result(f"{o.out}: {o.shape}, {parameters:,} parameters, {vocabulary} {o.tokenizer} tokens")


if __name__ == "__main__":
    sys.exit(main())
