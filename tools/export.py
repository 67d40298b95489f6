"""Writes a trained model as a folder that needs none of this code.

    python -m tools.export checkpoints/state_tracking/coconut-0 exported/machine

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) reads it, wherever transformers is; its `generate`
takes a question as the folder's tokenizer gives it, and writes what this model writes here, token by token. The folder
holds modeling_coconut.py, the weights (safetensors), the tokenizer, and a model card made from the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run's folder (its newest checkpoint), or a hub id")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an exported model that is there already")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the slow imports below

import shutil
from collections import Counter

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from config import split_thought
from model import lora
from tools.model_card import card
from tools.modeling_coconut import CoconutConfig, CoconutForCausalLM
from tools.trained import Coconut
from trainer.check_family import COARSE, ORDINARY
from trainer.checkpoint import damage
from trainer.pretrained import END, read_tokenizer
from utils import UserError, parse_json, print_error, replaced

# what an exported folder, or a checkpoint, may hold
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
    *("modeling_coconut.py", "__pycache__", "README.md", "config.yaml"),
)
MODELLING = "modeling_coconut.py"  # as transformers names it, after the module
TRIED = 5  # tokens of the questions that both models are compared with
KNOWN = (
    *("last", "pause", "projected", "normalised", "projected+normalised", "realigned", "looped", "mlp", "layer"),
    *("suppressed", "last+suppressed", "embedding+suppressed"),
)


def export(checkpoint: str, out: Path, force: bool = False) -> list[str]:
    """Writes the folder; returns what there is to warn of.

    Raises UserError where the checkpoint is none or cannot be exported, and where `out` holds something: only with
    `force`, and only what was exported before, is replaced.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / MODELLING).is_file():
            raise UserError(f"{out} is there already, and is no exported model: choose another name")
        if not force:
            raise UserError(f"{out} holds an exported model already: choose another name, or --force to replace it")
    with replaced(out, MODEL_FILES if force else ()) as aside:
        model = Coconut.from_pretrained(checkpoint)
        folder = Path(model.config.model_id).resolve()  # '.' has no name, and no parent
        if (folder / "trainer").is_dir() and (problem := damage(folder)):
            raise UserError(f"{folder} is damaged: {problem}")
        whole = exported(model)
        warnings = _differing_prompts(model, whole, folder)
        n_latents = whole.config.appended.count(whole.config.latent_token_id)
        text = card(
            folder, out.resolve().name, whole.num_parameters(), n_latents, len(whole.config.appended) - n_latents
        )
        whole.save_pretrained(aside)
        options = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
        tokenizer = read_tokenizer(folder, **options)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if model.config.method == "multi_mode":  # it writes the end marker after its reasoning: nothing to be read
            tokenizer.add_special_tokens({"additional_special_tokens": [END]})
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(text, encoding="utf-8")
        if (folder.parent / "config.yaml").is_file():
            shutil.copy(folder.parent / "config.yaml", aside)
    return warnings


def exported(model: Coconut) -> CoconutForCausalLM:
    """The same weights in the class that is exported. Raises UserError where it does not come to the same."""
    base, config = model.base_causallm, model.config
    if config.lora_rank is not None:
        lora.merge(base)
    base.config.name_or_path = ""  # a path of this machine
    thought = config.thought if model.latent_token_id is not None else "pause"
    name, _ = split_thought(thought)
    if name not in KNOWN:
        raise UserError(f"the thought {name} is not among those that an exported model can have: {', '.join(KNOWN)}")
    if model.recomputes:
        raise UserError(f"a {base.config.model_type} cannot be exported: it generates rightly without a cache only")
    newline, endings = _with_newline(model.tokenizer)
    appended = model.prompts([""])[0][len(model.tokenizer("\n")["input_ids"]) :]
    if model.max_positions is not None and len(appended) + TRIED > model.max_positions:
        raise UserError(f"its {len(appended)} latents and markers leave no room in {model.max_positions} positions")
    settings = CoconutConfig(
        text_config=base.config,
        thought=f"layer:{model.thought.index}" if name == "layer" else thought,
        latent_passes=_passes(model, appended.count(model.latent_token_id)),
        latent_token_id=model.latent_token_id,
        newline=newline,
        endings=endings,
        appended=appended,
        dtype=base.dtype,
    )
    with torch.device("meta"):
        whole = CoconutForCausalLM(settings)
    whole.base_causallm = base
    if thought.startswith("projected"):
        whole.thought.weight = model.thought.weight
    if name == "mlp":
        whole.thought = model.thought.layers
    # as Coconut.generate decodes, whatever the model's own settings are
    end = {"eos_token_id": model.markers.eos, "pad_token_id": model.markers.eos}
    whole.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **end)
    _check(model, whole.eval())
    return whole


def _passes(model: Coconut, n_latents: int) -> int | None:
    """How often the thoughts of a model whose latents are made in parallel are made anew."""
    return None if model.latent_passes is None or not n_latents else model.latent_updates(n_latents)


def _with_newline(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], dict[int, list[int]]]:
    """What a newline at the end of a text does to its tokens: the tokens that it adds, and for those tokens of the
    vocabulary that it is joined to ("?" and the newline are one token of Llama 3), what they become with it."""
    tokens = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[token] for token in tokens])
    alone, ended = (tokenizer([text + end for text in texts])["input_ids"] for end in ("", "\n"))
    joined, added = {}, Counter()
    for token, before, after in zip(tokens, alone, ended, strict=True):
        if before[-1:] == [token] and after[: len(before) - 1] == before[:-1]:  # a text of its own
            joined[token] = after[len(before) - 1 :]
            added[tuple(after[len(before) :])] += joined[token][0] == token
    if not added:
        raise UserError("the tokenizer puts tokens of its own behind a text: a question could not be continued")
    newline = list(added.most_common(1)[0][0])
    return newline, {token: ids for token, ids in joined.items() if ids != [token, *newline]}


@torch.no_grad()
def _check(model: Coconut, whole: CoconutForCausalLM) -> None:
    """Compares what both make of two questions, one of them padded."""
    n_words = min(len(model.base_causallm.get_input_embeddings().weight), len(model.tokenizer))
    questions = torch.randint(n_words, (2, TRIED), generator=torch.Generator().manual_seed(0))
    attended = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    ids, mask = whole.prompts(questions.masked_fill(questions == (model.latent_token_id or -1), 0), attended)
    wanted = model.head(model.states(ids, mask)[0][:, -1])  # (B, V)
    tolerance = (COARSE if wanted.dtype.itemsize == 2 else ORDINARY).logits
    try:
        found = whole(input_ids=ids, attention_mask=mask).logits[:, -1]
        problem = None if (found - wanted).norm() <= tolerance * wanted.norm() else "its logits are others there"
    except Exception as error:  # whatever an unknown family may raise
        problem = f"it fails there with a {type(error).__name__}"
    if problem is not None:
        family = model.base_causallm.config.model_type
        raise UserError(f"a {family} cannot be exported, to run over transformers' own cache: {problem}")


def _differing_prompts(model: Coconut, whole: CoconutForCausalLM, folder: Path) -> list[str]:
    """Whether the questions that the run was validated on become here what they were in training."""
    path = folder / "predictions.jsonl"
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a question may hold U+2028
        questions = [str(parse_json(line)["question"]) for line in lines if lines != [""]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    if not questions:
        return []
    found = 0
    for question, wanted in zip(questions, model.prompts(questions), strict=True):
        ids, _ = whole.prompts(torch.tensor([model.tokenizer(question)["input_ids"]], dtype=torch.long))
        found += ids[0].tolist() != wanted
    if not found:
        return []
    return [
        f"{found} of {len(questions)} validation questions get other tokens than in training, where their newline is "
        f"added after tokenizing"
    ]


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        for text in export(options.checkpoint, options.out, options.force):
            print(f"warning: {text}", file=sys.stderr)
    except UserError as error:
        return print_error(error)
    print(f"{options.out}: AutoModelForCausalLM.from_pretrained({str(options.out)!r}, trust_remote_code=True) reads it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
