"""Loads a run's data files as memory-mapped token arrays, and checks that their sequences fit the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from config import Config
from curriculum import kept_lengths, stage_of, thoughts_and_dropped
from methods import Texts
from preprocessing.examples import content_digest, load_examples
from preprocessing.tokens import ANSWER_PREFIX, Tokens, cache_tokens
from trainer.distributed import World, on_main_rank
from utils import UserError

DEBUG_EXAMPLES = {"train": 5000, "val": 32}


@dataclass
class Data:
    """The tokens of the validation and training files, and the validation examples as text."""

    val_examples: list[dict]
    val: Tokens
    val_digest: str | None = None  # SHA-256 of the file
    train: Tokens | None = None
    train_digest: str | None = None  # SHA-256 of its token ids


def load_data(config: Config, world: World, tokenizer) -> Data:
    """Tokenizes the files on rank 0, unless they are cached; all ranks memory-map the same arrays. Collective."""
    cache = Path(config.save_path) / ".tokens"
    limits = {"train": config.max_train_examples, "val": config.max_eval_examples}
    if config.debug:
        limits = {name: min(limit or DEBUG_EXAMPLES[name], DEBUG_EXAMPLES[name]) for name, limit in limits.items()}

    def tokens_of(path: str, limit: int | None, auxiliary: Texts | None = None) -> Path:
        options = {"step_separator": config.step_separator if auxiliary is None else "", "auxiliary": auxiliary}
        return on_main_rank(world, lambda: cache_tokens(path, tokenizer, cache, limit, **options))

    val = Tokens.open(tokens_of(config.val_path, limits["val"]))
    # after rank 0 has read the same file and reported its errors
    data = Data(load_examples(config.val_path, limits["val"]), val, content_digest(config.val_path))
    if not config.only_eval:
        folder = tokens_of(config.train_path, limits["train"])
        data.train = Tokens.open(folder)
        data.train_digest = on_main_rank(world, data.train.digest)  # all ranks
        if config.max_train_tokens is not None:
            data.train.leave_out_longer_than(config.max_train_tokens)
            if len(data.train) == 0:
                raise UserError(f"max_train_tokens {config.max_train_tokens} leaves no example of {config.train_path}")
        if (auxiliary := config.rules.texts(config)) is not None:
            data.train.auxiliary = Tokens.open(tokens_of(config.train_path, limits["train"], auxiliary))
            data.train.answer_prefix = tokenizer(ANSWER_PREFIX, add_special_tokens=False)["input_ids"]
            data.train.auxiliary.chosen = data.train.chosen
    return data


def check_lengths(config: Config, max_positions: int | None, data: Data, stage: int | None = None) -> None:
    """Raises UserError if an example does not fit the model, before training rather than in the middle of an epoch.

    stage: the only one that is run; None for those of a training run.
    """
    for path, tokens in ((config.train_path, data.train), (config.val_path, data.val)):
        if tokens is None or max_positions is None:
            continue
        # only training mixes stages
        own = config if tokens is data.train else replace(config, uniform_prob=0.0)
        length, record = longest_sequence(tokens, own, stage)
        if length > max_positions:
            raise UserError(
                f"{path}: record {record} (counted from 0) makes {length} tokens, but {config.model_id} has only "
                f"{max_positions} positions" + ("; see max_train_tokens" if tokens is data.train else "")
            )


def check_ids(config: Config, n_rows: int, data: Data) -> None:
    """Raises UserError if the tokenizer gives ids for which the model has no embedding row."""
    for path, tokens in ((config.train_path, data.train), (config.val_path, data.val)):
        if tokens is not None and (highest := int(tokens.ids.max())) >= n_rows:
            raise UserError(
                f"{path}: the tokenizer makes tokens with ids up to {highest}, but {config.model_id} has only {n_rows} "
                "embedding rows: the tokenizer belongs to another model, or its ids have gaps"
            )


def sequence_lengths(tokens: Tokens, config: Config, stage: int) -> np.ndarray:
    """Returns the length of each example's training sequence at a stage, (examples,) int64."""
    starts, ends = tokens.examples[:-1], tokens.examples[1:]
    if tokens.chosen is not None:
        starts, ends = starts[tokens.chosen], ends[tokens.chosen]
    n_steps = ends - starts - 2
    by_steps = np.array([thoughts_and_dropped(n, stage, config) for n in range(n_steps.max() + 1)])
    latents, dropped = by_steps[n_steps].T
    dropped = dropped.astype(np.int64)  # numbers of latents beyond int64 make an array of objects
    reasoning = kept_lengths(tokens.texts[ends - 1] - tokens.texts[starts + 1 + dropped], stage, config)
    question = tokens.texts[starts + 1] - tokens.texts[starts]
    answer = tokens.texts[ends] - tokens.texts[ends - 1] + 1  # EOS
    if config.has_latents and config.latent_markers == "both":
        latents = latents + 2
    return question + latents + reasoning + answer


def longest_sequence(tokens: Tokens, config: Config, stage: int | None = None) -> tuple[int, int]:
    """Returns (length, record in the file) of the longest sequence of this stage, by default of a training run's stages
    and of a method's own texts, or with eval_latents of the longest evaluated sequence."""
    if stage is not None:
        stages = {stage}
    elif not config.has_latents and config.method != "no_thoughts":
        stages = {0}
    elif config.uniform_prob:
        stages = {*range(config.last_stage + 1)}
    else:
        stages = {stage_of(config, epoch) for epoch in range(config.resume, config.num_epochs)}
    variants = [config] if config.only_eval else config.rules.variants(config)
    pairs = [(variant, stage) for variant in variants for stage in stages]
    if config.eval_latents is not None:
        latents = {"c_thought": 1, "max_latent_stage": config.eval_latents, "pad_latent_to_max": True}
        forced = replace(config, method="coconut", **latents)
        pairs.append((forced, forced.last_stage))
    lengths = reduce(np.maximum, (sequence_lengths(tokens, variant, stage) for variant, stage in pairs))
    if tokens.auxiliary is not None and config.rules.texts(config).in_one_sequence:
        lengths = np.maximum(lengths, tokens.auxiliary.written_lengths())
    index = int(lengths.argmax())
    return int(lengths[index]), tokens.record(index)
