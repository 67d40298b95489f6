"""LOTUS: the latents' labels; loss and all gradients equal the plain definition; one mean over all ranks."""

import plain
import pytest
from conftest import check_ranks_and_restart, distance, keys, main, steps, tiny_base, weights
from test_latent_block import largest
from test_methods import MARKERS, make_dataset, stages_of

from config import Config
from curriculum import stage_of
from methods.lotus import Lotus, latent_labels
from trainer.pretrained import make_model

KEYS = {"method": "lotus", "c_thought": 2, "max_latent_stage": 3, "latent_labels": 0.3}


def make_lotus(config: Config, family: str, tied: bool = True) -> Lotus:
    return make_model(config, tiny_base(family, tied), MARKERS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral"])  # mistral has a window
@pytest.mark.parametrize(("stage", "mixed"), [(3, 0.0), (3, 1.0), (4, 0.0)])
def test_loss_and_all_gradients_equal_the_plain_definition(family, tied, stage, mixed):
    config = Config(**KEYS, pad_latent_to_max=False, uniform_prob=mixed)
    dataset, examples = make_dataset(config, [1, 5, 3, 2])
    stages = stages_of(config, examples, stage)
    # a stage above 3, which uniform_prob draws for five steps, keeps the steps beyond the third (bug: it dropped them)
    rows = [plain.coconut_row(one, min(its, 3), 3, 2) for one, its in zip(examples, stages, strict=True)]
    model = make_lotus(config, family, tied)
    batch = dataset.collate([dataset[index, stage] for index in range(4)])
    counts = batch.pop("loss_counts")
    output = model(**batch)
    base = model.base_causallm
    total, count = plain.lotus_labels(base, rows, examples, 2)
    assert counts == {"loss": sum(label != -100 for _, labels in rows for label in labels), "auxiliary": count}
    assert count > 8
    assert abs(output.auxiliary - 0.3 * total) < 1e-9
    wanted = plain.loss(base, rows, group=2) + 0.3 * total / count
    assert largest(model, output.loss + output.auxiliary / count, wanted) < 1e-9


@pytest.mark.parametrize("thought", ["last", "layer:1"])
def test_sequential_latents_can_be_labelled_too(family, thought):
    """A thought that needs layers was rejected as if its latents were parallel."""
    config = Config(**KEYS | {"latent_passes": "sequential", "thought": thought})
    dataset, _ = make_dataset(config, [1, 5, 3, 2])
    batch = dataset.collate([dataset[index, 3] for index in range(4)])
    del batch["loss_counts"]
    output = make_lotus(config, family)(**batch)
    del batch["label_positions"], batch["label_targets"]
    assert output.loss == make_model(Config(thought=thought), tiny_base(family), MARKERS)(**batch).loss
    assert output.auxiliary > 0


def test_steps_beyond_the_last_stage_with_latents_stay_written():
    """With the method's defaults they were dropped from the eighth epoch on."""
    config = Config(method="lotus")
    assert [stage_of(config, epoch) for epoch in (0, 1, 6, 7, 29)] == [0, 1, 6, 6, 6]


def test_labels_of_latents():
    steps = [[10, 11, 12], [20, 21], [30, 31, 32, 33, 34]]
    assert latent_labels(steps, 0, 2) == []
    assert latent_labels(steps, 2, 2) == [(0, 10), (1, 11), (2, 12)]
    assert latent_labels(steps, 4, 2) == [(0, 10), (1, 11), (2, 12), (2, 20), (3, 21)]
    assert latent_labels(steps, 6, 2)[5:] == [(4, 30), (5, 31), (6, 32)]  # no latent for the other two tokens
    assert latent_labels(steps, 8, 2)[5:] == [(4, 30), (5, 31), (6, 32), (7, 33), (8, 34)]
    assert latent_labels([[1, 2, 3, 4, 5, 6]], 4, 1) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert latent_labels(steps, 8, 2)[:5] == latent_labels(steps, 4, 2)
    assert latent_labels(steps[:1], 6, 3) == [(0, 10), (1, 11), (2, 12)]


def test_a_batch_without_latents_has_no_labels(family):
    config = Config(**KEYS)
    dataset, _ = make_dataset(config, [2, 3], epoch=None)
    batch = dataset.collate([dataset[0, 0], dataset[1, 0]])
    assert batch.pop("loss_counts")["auxiliary"] == 0
    output = make_lotus(config, family)(**batch)
    assert output.auxiliary == 0
    (output.loss + output.auxiliary).backward()


# --- Runs ---

RUN = keys("""
    latent_labels=0.05 latent_passes=stage thought=looped c_thought=2 uniform_prob=0.4
    num_epochs=3 max_train_examples=40 max_new_tokens=2 global_batch_size=16
""")


@pytest.mark.slow
def test_a_step_is_one_mean_whatever_the_passes_and_ranks_and_a_restart_is_bitwise_the_same(place):
    whole = main(place, *RUN, "name=lotus", "batch_size_training=16")
    wanted = weights(whole / "checkpoint_3")
    losses = [(record["loss"], record["auxiliary_loss"]) for record in steps(whole)]
    assert all(all(loss) for loss in losses[-3:])
    cut = (*RUN, "batch_size_training=4")
    alone = check_ranks_and_restart(place, "lotus-cut", cut)
    sharded = main(place, *cut, "name=lotus-alone-fsdp", "strategy=fsdp")
    for folder in (alone, sharded, *(place / "runs" / f"lotus-cut-{strategy}" for strategy in ("ddp", "fsdp"))):
        assert distance(weights(folder / "checkpoint_3"), wanted) < 5e-6
        for record, loss in zip(steps(folder), losses, strict=True):
            assert (record["loss"], record["auxiliary_loss"]) == pytest.approx(loss, rel=1e-4)
