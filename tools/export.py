"""Exports a trained model to a folder that needs only torch and transformers.

    python -m tools.export checkpoints/breadth/last-0 exported/breadth

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) reads it. Its `generate` takes questions encoded by
the folder's tokenizer and returns the same tokens as this repository's model. The folder holds the code, the weights
(safetensors), the tokenizer, the run's config.yaml and a model card made from the run.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

from tools.portable import MODELLING, THOUGHT, write_code
from trainer.commands import CHECKPOINT, command, make_parser
from trainer.files import parsing, replaced
from trainer.run_folder import check_checkpoint
from utils import UserError, parse_json, print_result

if TYPE_CHECKING:  # these take seconds, so functions import them after the check of the arguments
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coconut import Coconut

N_TRIED = 5  # tokens of the questions that compare the two models
PACKAGE = "exported_coconut"  # name of the exported code in this process

# the files of an exported folder
EXPORTED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
    *(MODELLING, THOUGHT, "__pycache__", "README.md", "config.yaml"),
)


def export(checkpoint: str, out: Path, force: bool = False, license: str | None = None) -> list[str]:
    """Writes the folder and returns warnings.

    Raises UserError if the checkpoint cannot be exported, or if `out` exists: `force` replaces an exported model only.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / MODELLING).is_file():
            raise UserError(f"{out} exists and is no exported model: choose another name")
        if not force:
            raise UserError(f"{out} holds an exported model: choose another name, or replace it with --force")
    from transformers.utils import logging

    from coconut import Coconut
    from curriculum import END
    from tools.model_card import make_card
    from trainer.checkpoint import damage
    from trainer.pretrained import read_tokenizer

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with replaced(out, EXPORTED if force else ()) as aside, TemporaryDirectory() as code:
        try:
            model = Coconut.from_pretrained(checkpoint)
        except UserError as error:
            if "trust_remote_code" not in str(error):
                raise
            problem = "its model brings Python code of its own, which the exported folder would lack"
            raise UserError(f"{checkpoint} cannot be exported: {problem}") from None
        folder = Path(model.config.model_id).resolve()  # Path('.') has no name and no parent
        if (folder / "trainer").is_dir() and (problem := damage(folder)):
            raise UserError(f"{folder} is damaged: {problem}")
        write_code(Path(code), type(model.thought))
        exported = build_exported(model, import_code(Path(code)))
        warnings = differing_prompts(model, exported, folder)
        exported.save_pretrained(aside)  # copies the code too
        options = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
        tokenizer = read_tokenizer(folder, **options)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if model.config.has_latents and not model.config.rules.output([model.markers.end], model.markers):
            tokenizer.add_special_tokens({"additional_special_tokens": [END]})
        tokenizer.save_pretrained(aside)
        with parsing(f"no model card: a file in {folder.parent}", OSError):
            card = make_card(folder, out.resolve().name, aside, exported, license)
        card.save(aside / "README.md")
        if (folder.parent / "config.yaml").is_file():
            shutil.copy(folder.parent / "config.yaml", aside)
    return warnings


def import_code(code: Path) -> ModuleType:
    """Imports the written modeling_coconut.py, so that the comparison and `save_pretrained` use the exported code."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.__path__ = [str(code)]
    return importlib.import_module(f"{PACKAGE}.{Path(MODELLING).stem}")


def build_exported(model: Coconut, code: ModuleType) -> PreTrainedModel:
    """Returns the model in the exported class, with shared weights. Raises UserError if its logits differ."""
    import torch
    from transformers import GenerationConfig

    from config import split_thought
    from model import lora
    from trainer.inference import prompts

    base, config = model.base_causallm, model.config
    if config.lora_rank is not None:
        lora.merge(base)
    base.config.name_or_path = ""  # it is a path of this machine
    if model.backbone.recomputes:
        raise UserError(f"a {base.config.model_type} cannot be exported: with a cache it generates other tokens")
    newline, endings = with_newline(model.tokenizer)
    appended = prompts(model, [""])[0][len(model.tokenizer("\n")["input_ids"]) :]
    if model.max_positions is not None and len(appended) + N_TRIED > model.max_positions:
        raise UserError(f"its {len(appended)} latents and markers fill all {model.max_positions} positions")
    n_latents = appended.count(model.latent_token_id)
    in_parallel = hasattr(model, "latent_updates") and n_latents > 0
    name, number = split_thought(config.thought)
    settings = code.CoconutConfig(
        text_config=base.config,
        thought=name,
        thought_number=number,
        latent_passes=model.latent_updates(n_latents) if in_parallel else None,
        stop_threshold=getattr(model, "stop_threshold", None),
        latent_token_id=model.latent_token_id,
        newline=newline,
        endings=endings,
        appended=appended,
        dtype=base.dtype,
    )
    with torch.device("meta"):
        exported = code.CoconutForCausalLM(settings)
    exported.base_causallm, exported.thought = base, type(exported.thought)(base, number)
    exported.thought.load_state_dict(model.thought.state_dict())
    if settings.stop_threshold is not None:
        exported.stop_head = model.stop_head
    # greedy as Coconut.generate, in place of the base model's settings
    end = {"eos_token_id": model.markers.eos, "pad_token_id": model.markers.eos}
    exported.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **end)
    check_same_logits(model, exported.eval())
    return exported


def with_newline(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], dict[int, list[int]]]:
    """Returns what a newline at the end of a text does to its tokens: the tokens that it adds and, for each token that
    the tokenizer joins with a newline (in Llama 3, "?" and a newline are one token), the tokens of both together."""
    tokens = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))  # no question ends with these
    texts = tokenizer.batch_decode([[token] for token in tokens])
    alone, ended = (tokenizer([text + end for text in texts])["input_ids"] for end in ("", "\n"))
    joined, added = {}, Counter()
    for token, before, after in zip(tokens, alone, ended, strict=True):
        if before[-1:] == [token] and after[: len(before) - 1] == before[:-1]:
            joined[token] = after[len(before) - 1 :]
            added[tuple(after[len(before) :])] += joined[token][0] == token
    if not added:
        raise UserError("the tokenizer appends tokens to each text, so that nothing can follow a question")
    newline = list(added.most_common(1)[0][0])
    return newline, {token: ids for token, ids in joined.items() if ids != [token, *newline]}


def check_same_logits(model: Coconut, exported: PreTrainedModel) -> None:
    """Raises UserError if the two models' logits differ after two questions, one of them padded, or if the exported
    model cannot generate."""
    import torch

    from trainer.check_family import COARSE, ORDINARY

    n_tokens = min(len(model.base_causallm.get_input_embeddings().weight), len(model.tokenizer))
    questions = torch.randint(n_tokens, (2, N_TRIED), generator=torch.Generator().manual_seed(0))
    attended = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    questions = questions.masked_fill(questions == (model.latent_token_id or -1), 0)
    ids, mask = exported.prompts(questions, attended)
    with torch.no_grad():
        wanted = model.head(model.states(ids, mask)[0][:, -1])  # (B, V)
        tolerance = (COARSE if wanted.dtype.itemsize == 2 else ORDINARY).logits
        try:
            found = exported(input_ids=ids, attention_mask=mask).logits[:, -1]
            problem = None if (found - wanted).norm() <= tolerance * wanted.norm() else "its logits differ"
            exported.generate(input_ids=questions[:, -1:], max_new_tokens=1)
        except Exception as error:  # an unknown family may raise anything
            problem = f"it raises {type(error).__name__}"
    if problem is not None:
        what = f"a {model.base_causallm.config.model_type} of method {model.config.method}"
        raise UserError(f"{what} cannot be exported: in transformers' code {problem}")


def differing_prompts(model: Coconut, exported: PreTrainedModel, folder: Path) -> list[str]:
    """Returns a warning if the exported model's prompts of validation questions differ from those of training."""
    import torch

    from trainer.inference import prompts

    path = folder / "predictions.jsonl"
    if not path.is_file():
        return []
    with parsing(path):
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a question may hold U+2028
        questions = [str(parse_json(line)["question"]) for line in lines if lines != [""]]
    n_differ = 0
    for question, wanted in zip(questions, prompts(model, questions), strict=True):
        ids, _ = exported.prompts(torch.tensor([model.tokenizer(question)["input_ids"]], dtype=torch.long))
        n_differ += ids[0].tolist() != wanted
    what = f"{n_differ} of {len(questions)} validation questions get other tokens than in training"
    return [f"{what}, because the exported model appends the newline after tokenization"] if n_differ else []


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an exported model")
    parser.add_argument("--license", help="license of the weights in the model card (default: the base model's)")
    options = parser.parse_args(arguments)
    check_checkpoint(options.checkpoint)
    for text in export(options.checkpoint, options.out, options.force, options.license):
        print(f"warning: {text}", file=sys.stderr)
    call = f"AutoModelForCausalLM.from_pretrained({str(options.out)!r}, trust_remote_code=True)"
    print_result(f"{options.out}: {call} reads it")


if __name__ == "__main__":
    sys.exit(main())
