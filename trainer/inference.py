"""Loads, asks, saves and uploads a trained model: the methods of Coconut that need files and a tokenizer.

`load` adds attributes to coconut.Coconut: `tokenizer` (with the markers), `markers` (their ids), `config` (the keys
that shape the sequences, `checkpoint.DESCRIBED`, and the defaults of all others) and `stage`.

Legend: B rows, K latents, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from coconut import Coconut, Edit
from config import GENERATION_KEYS, Config
from curriculum import prompt, thoughts_and_dropped
from dataset import collate_prompts, latent_columns, to_device
from preprocessing.tokens import batched, question_ids
from trainer.checkpoint import DESCRIBED, damage, write_model
from trainer.evaluate import extract_answer, generate_tokens, texts_of
from trainer.files import replaced
from trainer.pretrained import Pretrained, hub_problem, load_model, loading, read_description, shape_of
from trainer.run_folder import HUB_ID, resolve
from trainer.samples import Policy
from trainer.samples import generate as generate_samples
from utils import UserError, log

TOP = 5  # number of tokens that decoded_thoughts returns for each thought
CARD = """\
# {name}

A Coconut of method `{method}` at stage {stage} (chain of continuous thought, arXiv 2412.06769), for the trainer that
saved it:

    from coconut import Coconut

    Coconut.from_pretrained("{name}").ask("...")
"""


# --- Loading and saving ---


def load(source: str | Path, trust_remote_code: bool = False, **hub_options) -> Coconut:
    """Loads a checkpoint, a run's newest checkpoint or a hub id: see Coconut.from_pretrained."""
    folder = _local_folder(source, hub_options)
    if (folder / "trainer").is_dir() and (problem := damage(folder, weights_only=True)):
        raise UserError(f"{folder} is damaged: {problem}")
    description = read_description(folder)
    if not (folder / "coconut.json").is_file():
        raise UserError(f"{folder} lacks coconut.json, which describes the training: it is no checkpoint of run.py")
    if lacking := [name for name in ("stage", "method") if name not in description]:
        raise UserError(f"{folder / 'coconut.json'} is damaged: it lacks {' and '.join(lacking)}")
    known = {name: description[name] for name in DESCRIBED if name in description}
    config = Config(model_id=str(folder), only_eval=True, trust_remote_code=trust_remote_code, **known)
    config.bf16_weights = shape_of(config, folder).dtype == torch.bfloat16
    model, tokenizer, markers = load_model(config, folder)
    model.tokenizer, model.markers, model.config, model.stage = tokenizer, markers, config, description["stage"]
    return model.eval()


def load_for_use(source: str, seed: int = 0, trust_remote_code: bool = False) -> Coconut:
    """Loads, without progress bars, onto a GPU if there is one, and seeds torch. Raises UserError."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    return load(source, trust_remote_code).to("cuda" if torch.cuda.is_available() else "cpu")


def save(
    model: Coconut, folder: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **hub_options
) -> None:
    """Writes a new folder for `load`, atomically, and uploads it if push_to_hub is set; repo_id defaults to the
    folder's name. Raises UserError."""
    if not push_to_hub and (hub_options or repo_id):
        raise TypeError(f"{', '.join(['repo_id', *hub_options])} are options of push_to_hub=True")
    with replaced(Path(folder), ()) as aside:
        own = {name: getattr(model, name) for name in GENERATION_KEYS if hasattr(model, name)}  # set in Python
        write_model(aside, replace(model.config, **own), _pretrained(model), model.stage, model.state_dict())
    if push_to_hub:
        push(model, repo_id or Path(folder).name, **hub_options)


def push(model: Coconut, repo_id: str, private: bool | None = None, token: str | None = None, **upload_options) -> str:
    """Uploads a folder for `load` with a short model card; returns the commit's URL. Raises the hub's exceptions."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    data = ModelCardData(library_name="coconut", pipeline_tag="text-generation", tags=["coconut", "latent-reasoning"])
    text = CARD.format(name=repo_id, method=model.config.method, stage=model.stage)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(model, folder)
        ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload_options))


def _pretrained(model: Coconut) -> Pretrained:
    return Pretrained(model, model.tokenizer, model.markers)


def _local_folder(source: str | Path, hub_options: dict) -> Path:
    """Returns the folder of a local checkpoint or, for a hub id, of the downloaded files. Raises UserError."""
    if os.path.exists(source) or not HUB_ID.fullmatch(str(source)):
        return resolve(str(source))
    with loading("checkpoint", source):
        cached_only = {"local_files_only": True} if hub_problem() else {}
        folder = snapshot_download(str(source), **cached_only | hub_options)
    return resolve(str(folder))


# --- Asking ---


def answers(
    model: Coconut,
    questions: list[str],
    max_new_tokens: int = 128,
    n_thoughts: int | None = None,
    mode: str | None = None,
    show_thoughts: bool = False,
    **sampling,
) -> list[dict]:
    """Answers questions as one batch: see Coconut.answers."""
    if not questions:
        return []
    rows = _answerable(model, questions, n_thoughts, mode)
    results = []
    for new in generate_tokens(_pretrained(model), model.config.method, rows, max_new_tokens, **sampling):
        text = model.tokenizer.decode(new, skip_special_tokens=True)
        results.append({"output": text, "answer": extract_answer(text)})
    if show_thoughts:
        batch = to_device(collate_prompts(rows, model.markers.eos), model.base_causallm.device)
        for result, thoughts, run in zip(results, decoded_thoughts(model, batch), model.shortened(rows), strict=True):
            result["thoughts"] = thoughts[: run.count(model.markers.latent)]
    return results


def samples(
    model: Coconut,
    questions: list[str],
    keys: list[tuple[int, ...]],
    n_samples: int,
    policy: Policy,
    max_new_tokens: int = 128,
    n_thoughts: int | None = None,
    mode: str | None = None,
) -> list[dict[str, int]]:
    """Samples n_samples answers to each question; returns {answer: count} for each, the most frequent answer first.
    keys: one a question, see `samples.generate`. Raises UserError."""
    rows = _answerable(model, questions, n_thoughts, mode)
    drawn = generate_samples(model, rows, keys, n_samples, policy, max_new_tokens)
    found = map(extract_answer, texts_of(drawn.tokens, model.config.method, _pretrained(model)))
    return [dict(Counter(group).most_common()) for group in batched(found, n_samples)]


def prompts(
    model: Coconut, questions: list[str], n_thoughts: int | None = None, mode: str | None = None
) -> list[list[int]]:
    """Returns each question's prompt as token ids: question, newline, markers and latents. Raises UserError."""
    config = config_for(model, n_thoughts, mode)
    for question in questions:
        if not isinstance(question, str):
            raise TypeError(f"a question must be a str, not {type(question).__name__}: answers([...]) takes several")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise UserError(f"a question is not valid UTF-8: {question[:60]!r}")
        if unknown := unknown_characters(model.tokenizer, question):
            log.warning("the tokenizer does not know %r in the question %r", unknown, question[:60])
    ids = question_ids(model.tokenizer, questions)
    for question, row in zip(questions, ids, strict=True):
        if {model.markers.start, model.markers.latent, model.markers.end}.intersection(row):
            raise UserError(f"a question holds a marker of the latent positions: {question[:60]!r}")
    return [prompt(row, [], model.stage, config, model.markers) for row in ids]


def _answerable(model: Coconut, questions: list[str], n_thoughts: int | None, mode: str | None) -> list[list[int]]:
    """Returns `prompts` after checking that each holds a question and leaves a position for the answer. Raises
    UserError."""
    rows, limit = prompts(model, questions, n_thoughts, mode), model.max_positions or math.inf
    for question, row in zip(questions, rows, strict=True):
        if not row or row[0] == model.markers.latent:
            raise UserError(f"the tokenizer leaves nothing of the question {question[:60]!r}")
        if len(row) >= limit:
            raise UserError(f"a question of {len(row)} tokens fills all {limit} positions: {question[:60]!r}")
    return rows


def unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Returns the characters of a text, each once, that the tokenizer maps to the unknown token or drops; dropped
    whitespace does not count."""
    if not tokenizer.is_fast:
        return ""
    found = tokenizer(text, return_offsets_mapping=True)
    known = set()
    for token, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token != tokenizer.unk_token_id:
            known.update(range(begin, end))
    return "".join(dict.fromkeys(c for i, c in enumerate(text) if i not in known and not c.isspace()))


def config_for(model: Coconut, n_thoughts: int | None = None, mode: str | None = None) -> Config:
    """Returns the model's configuration with another number of latents or another mode. Raises UserError."""
    config = replace(model.config, pad_latent_to_max=True)  # the number of steps is unknown
    if mode is not None:
        problems, config = Config.problems_of({"mode": mode}), replace(config, mode=mode)
        problems += [text for text in config.problems(needs_files=False) if text.startswith("mode")]
        if problems:
            raise UserError(f"{problems[0]}: this model is of method {config.method}")
    if n_thoughts is None:
        numbers = {thoughts_and_dropped(n, model.stage, config)[0] for n in range(1, config.max_latent_stage + 2)}
        if len(numbers) > 1:
            raise UserError(
                f"method {config.method} makes as many thoughts as an example has steps, which are unknown: choose a "
                "number with --thoughts (n_thoughts); it cannot be exported"
            )
        return config
    if not config.has_latents:
        raise UserError(f"a number of thoughts is for models with latents, and this one is of method {config.method}")
    if model.max_positions is not None and n_thoughts >= model.max_positions:
        raise UserError(f"{n_thoughts} thoughts do not fit into {model.max_positions} positions")
    return replace(config, eval_latents=n_thoughts)


@torch.no_grad()
def thought_logits(
    model: Coconut, input_ids: torch.Tensor, edit: Edit | None = None, **batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (B, K, V) at the positions before the latents, whose hidden states become the thoughts, and
    the thoughts (B, K, D). The batch is that of Coconut.states; all rows have their K latents in the same columns."""
    hidden, embeds = model.states(input_ids, edit=edit, **batch)
    columns = latent_columns(input_ids, model.latent_token_id)
    return model.head(hidden[:, [column - 1 for column in columns]]), embeds[:, columns]


def decoded_thoughts(model: Coconut, batch: dict[str, torch.Tensor]) -> list[list[list[tuple[str, float]]]]:
    """Returns, for each row and each latent, the TOP likeliest (token, probability) pairs at the position before it."""
    top = thought_logits(model, **batch)[0].float().softmax(dim=-1).topk(TOP)  # (B, K, TOP) each

    def pairs(ids: list[int], shares: list[float]) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([token]), round(share, 4)) for token, share in zip(ids, shares, strict=True)]

    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[pairs(ids, shares) for ids, shares in zip(*row, strict=True)] for row in rows]
