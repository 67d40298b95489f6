"""Random positions: their distribution, and the loss at them, which equals the plain definition."""

from collections import Counter
from itertools import pairwise

import numpy as np
import plain
import pytest
import torch
from conftest import tiny_base
from test_coconut import EOS, LATENT
from test_latent_block import largest
from test_methods import MARKERS, make_dataset
from transformers import AutoModelForCausalLM, BloomConfig

from coconut import Coconut
from config import Config
from dataset import MicroBatch, StageDataset, collate_prompts, sequences_in
from methods.random_positions import draw_positions
from trainer.pretrained import make_model, parts_of
from utils import UserError

RANGE = 60  # longer than all sequences here; tiny models have 64 positions
EXAMPLES = [0, 1, 2, 3]


def micro_batch(indices=EXAMPLES, stage: int = 2, epoch: int = 0, **keys) -> dict:
    """The arguments of the model's forward."""
    dataset, _ = make_dataset(Config(position_range=RANGE, **keys), [1, 5, 3, 2], epoch)
    batch = dataset.micro_batch(MicroBatch(list(indices), 1.0), stage)
    return {name: value for name, value in batch.items() if name not in ("weight", "loss_counts")}


def rows_of(batch: dict, name: str = "position_ids") -> list[list[int]]:
    """The unpadded part of each row."""
    return [row[mask == 1].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]


def loss_at_positions(base, batch: dict) -> torch.Tensor:
    """The definition: each row alone, without padding or cache, recomputing everything for each thought, each token at
    its position. Without a mask, transformers would take gaps for the ends of packed sequences."""
    total, count = 0, 0
    parts = (rows_of(batch, name) for name in ("input_ids", "labels", "position_ids"))
    for ids, labels, positions in zip(*parts, strict=True):
        embeds, at = base.get_input_embeddings()(torch.tensor([ids])), torch.tensor([positions])
        mask = torch.ones_like(at)

        def options(end: int, at=at, mask=mask) -> dict:
            return {"position_ids": at[:, :end], "attention_mask": mask[:, :end], "use_cache": False}

        for column, token in enumerate(ids):
            if token == LATENT:
                states = base.get_decoder()(inputs_embeds=embeds[:, :column], **options(column)).last_hidden_state
                embeds = torch.cat([embeds[:, :column], states[:, -1:], embeds[:, column + 1 :]], dim=1)
        loss, n_tokens = plain.summed(base(inputs_embeds=embeds, **options(len(ids))).logits[0], labels)
        total, count = total + loss, count + n_tokens
    return total / count


@pytest.mark.parametrize("positions", ["offset", "spaced"])
def test_the_loss_equals_the_definition_at_these_positions(family, positions):
    batch = micro_batch(positions=positions)
    model = make_model(Config(), tiny_base(family), MARKERS)
    loss, wanted = model(**batch).loss, loss_at_positions(model.base_causallm, batch)
    assert largest(model, loss, wanted) < 1e-9


def test_positions_are_drawn_as_defined():
    random = np.random.default_rng(0)
    n_draws = 6000
    for positions, shares in {
        "offset": {(0, 1): 1 / 3, (1, 2): 1 / 3, (2, 3): 1 / 3},
        # two of the first two, of the first three, or of the first four positions, a third each
        "spaced": {
            (0, 1): 1 / 3 + 1 / 9 + 1 / 18,
            **dict.fromkeys([(0, 2), (1, 2)], 1 / 9 + 1 / 18),
            **dict.fromkeys([(0, 3), (1, 3), (2, 3)], 1 / 18),
        },
    }.items():
        drawn = Counter(tuple(draw_positions(2, positions, 4, random).tolist()) for _ in range(n_draws))
        assert drawn.keys() == shares.keys()
        assert all(abs(drawn[pair] / n_draws - share) < 0.03 for pair, share in shares.items())


@pytest.mark.parametrize("positions", ["offset", "spaced"])
def test_sequences_that_fill_the_range_have_plain_positions(positions):
    for position_range in (1, 4, 5):
        assert draw_positions(5, positions, position_range, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("positions", ["offset", "spaced"])
def test_a_draw_depends_on_the_example_and_the_epoch_only(positions):
    """It depends neither on the micro-batch nor on the draw of the stage."""
    together = micro_batch(positions=positions, uniform_prob=0.5)
    drawn = rows_of(together)
    assert [rows_of(micro_batch([index], positions=positions, uniform_prob=0.5))[0] for index in EXAMPLES] == drawn
    assert rows_of(micro_batch(positions=positions, uniform_prob=0.5, epoch=1)) != drawn
    assert len({row[0] for row in drawn}) > 1
    for row in drawn:
        assert all(before < after for before, after in pairwise(row))
        assert row[-1] < RANGE
        assert positions == "spaced" or row == list(range(row[0], row[0] + len(row)))
    assert together["position_ids"][together["attention_mask"] == 0].eq(0).all()


@pytest.mark.parametrize("method", ["cot", "codi", "multi_mode", "sim_cot", "lotus", "icot", "latents_by_steps"])
def test_all_sequences_of_any_method_are_at_random_positions(method):
    keys = {"step_decoder": "copy"} if method == "sim_cot" else {}
    plainly, batch = (micro_batch(method=method, positions=positions, **keys) for positions in ("plain", "spaced"))
    parts = list(zip(sequences_in(plainly), sequences_in(batch), strict=True))
    assert len(parts) == {"codi": 2, "multi_mode": 3}.get(method, 1)
    drawn = [rows_of(part) for _, part in parts]
    for (before, after), rows in zip(parts, drawn, strict=True):
        assert torch.equal(before["input_ids"], after["input_ids"])
        assert rows != rows_of(before)
    assert all(rows != drawn[0] for rows in drawn[1:])


def test_evaluation_counts_from_0():
    """Validation, generation and eval-only runs have plain positions."""
    config = Config(method="cot", positions="spaced", position_range=RANGE, only_eval=True)
    assert parts_of(config)[:3] == (Coconut, {}, StageDataset)
    prompts = collate_prompts([[5, 6, 7], [8, 9]], EOS)
    models = [
        make_model(Config(**keys), tiny_base("gpt2"), MARKERS)
        for keys in ({}, {"positions": "offset", "position_range": 64})
    ]
    assert torch.equal(*(model.generate(**prompts, max_new_tokens=5) for model in models))


def test_models_without_these_positions_are_rejected():
    config = Config(positions="offset", position_range=65)
    with pytest.raises(UserError, match="position_range 65 is more than the model's 64 positions"):
        make_model(config, tiny_base("gpt2"), MARKERS)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(UserError, match="that takes position_ids, which family bloom does not"):
        make_model(Config(positions="offset", position_range=64), bloom, MARKERS)
