"""LOTUS: labels of latents, their loss and all gradients against the plain definition, one mean over all ranks."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_base
from test_coconut import END, EOS, LATENT, START
from test_latent_block import largest, plain_parallel
from test_run import main, together, weights
from test_run import place as place  # a fixture
from test_sim_cot import MARKERS, make_tokens

from config import Config
from methods.lotus import LabelledDataset, Lotus, latent_labels


def make_lotus(family: str, tied: bool, c_thought: int, weight: float) -> Lotus:
    base = tiny_base(family, tied)
    options = {"latent_passes": "stage", "c_thought": c_thought, "latent_labels": weight}
    return Lotus(base, LATENT, START, END, EOS, "looped", **options)


def plain_labels(model: Lotus, rows, steps_of, c: int) -> tuple[torch.Tensor, int]:
    """The definition: the sum of the labels' cross-entropies, each row by itself, and their number."""
    base, total, count = model.base_causallm, torch.zeros(()), 0
    for (input_ids, _), steps in zip(rows, steps_of, strict=True):
        latents = [column for column, token in enumerate(input_ids) if token == LATENT]
        if not latents:
            continue
        embeds = base.get_input_embeddings()(torch.tensor([input_ids]))
        learned = embeds
        for loop in range(len(latents) // c + 1):  # pass 0 over the plain embeddings, then as many as groups
            states = base.get_decoder()(inputs_embeds=embeds).last_hidden_state
            if loop == len(latents) // c:
                break
            fed = [learned[:, p] + states[:, p] if p in latents else embeds[:, p] for p in range(len(input_ids))]
            embeds = torch.stack(fed, dim=1)
        scores = base.lm_head(states[0])
        begin, n_groups = latents[0] - 1, len(latents) // c
        for k in range(min(n_groups, len(steps))):
            for j, token in enumerate(steps[k]):
                in_next_group = c <= j < 2 * c and k + 1 < n_groups
                if j < c or in_next_group:
                    total = total + F.cross_entropy(scores[begin + k * c + j], torch.tensor(token))
                    count += 1
    return total, count


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [{}, {"uniform_prob": 1.0}])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral"])  # the last with a window
def test_its_loss_and_all_gradients_are_the_plain_definition(family, tied, keys):
    config = Config(c_thought=2, max_latent_stage=3, latent_labels=0.3, pad_latent_to_max=False, **keys)
    _, tokens, _ = make_tokens([1, 5, 3, 2], 3)
    dataset = LabelledDataset(tokens, config, MARKERS, epoch=0)
    items = [dataset[index, 3] for index in range(4)]
    rows = [(input_ids, labels) for input_ids, labels, _ in items]
    model = make_lotus(family, tied, 2, 0.3)
    batch = dataset.collate(items)
    units = batch.pop("loss_counts")
    output = model(**batch)
    total, count = plain_labels(model, rows, [tokens[index][1] for index in range(4)], 2)
    assert units == {"loss": sum(label != -100 for _, labels in rows for label in labels), "auxiliary": count}
    assert count > 8
    assert abs(output.auxiliary - 0.3 * total) < 1e-9
    plain = plain_parallel(model, rows, in_place=True, c_thought=2) + 0.3 * total / count
    assert largest(model, output.loss + output.auxiliary / count, plain) < 1e-9


def test_what_latents_are_told():
    steps = [[10, 11, 12], [20, 21], [30, 31, 32, 33, 34]]
    assert latent_labels(steps, 0, 2) == []
    assert latent_labels(steps, 2, 2) == [(0, 10), (1, 11)]  # there is no next group to read the third token in
    assert latent_labels(steps, 4, 2) == [(0, 10), (1, 11), (2, 12), (2, 20), (3, 21)]
    assert latent_labels(steps, 8, 2)[5:] == [(4, 30), (5, 31), (6, 32), (7, 33)]  # not in the group after the next
    assert latent_labels(steps, 8, 2)[:5] == latent_labels(steps, 4, 2)
    assert latent_labels(steps[:1], 6, 3) == [(0, 10), (1, 11), (2, 12)]


def test_a_batch_without_latents_has_no_labels(family):
    config = Config(c_thought=2, latent_labels=0.05)
    _, tokens, _ = make_tokens([2, 3], 6)
    dataset = LabelledDataset(tokens, config, MARKERS)
    batch = dataset.collate([dataset[0, 0], dataset[1, 0]])
    assert batch.pop("loss_counts")["auxiliary"] == 0
    output = make_lotus(family, True, 2, 0.05)(**batch)
    assert output.auxiliary == 0
    (output.loss + output.auxiliary).backward()


@pytest.mark.parametrize("keys", [{"method": "cot"}, {"step_decoder": "copy"}])
def test_labels_without_latents_are_a_mistake(keys):
    assert "latent_labels" in Config(latent_labels=0.1, **keys).problems(needs_files=False)[0]


KEYS = (
    *("latent_labels=0.05", "latent_passes=stage", "thought=looped", "c_thought=2", "num_epochs=3", "uniform_prob=0.4"),
    *("max_train_examples=40", "max_new_tokens=2", "global_batch_size=16"),
)


@pytest.mark.slow
def test_the_means_are_those_of_a_step_however_it_is_cut(place):
    whole = main(place, *KEYS, "name=lotus", "batch_size_training=16")
    wanted = weights(whole / "checkpoint_3")
    main(place, *KEYS, "name=lotus-cut", "batch_size_training=4")
    main(place, *KEYS, "name=lotus-alone-fsdp", "batch_size_training=4", "strategy=fsdp")
    for strategy in ("ddp", "fsdp"):
        more = ("batch_size_training=4", f"name=lotus-{strategy}", f"strategy={strategy}")
        together(place / "run.yaml", *KEYS, *more)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["loss"], record["auxiliary_loss"]) for record in records if record["event"] == "step"]
    assert all(all(loss) for loss in losses[-3:])
    for name in ("cut", "alone-fsdp", "ddp", "fsdp"):
        folder = place / "runs" / f"lotus-{name}"
        found = weights(folder / "checkpoint_3")
        assert max((found[key] - wanted[key]).abs().max() for key in wanted) < 5e-6
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if record["event"] == "step"]
        for record, (loss, auxiliary) in zip(steps, losses, strict=True):
            assert record["loss"] == pytest.approx(loss, rel=1e-4)
            assert record["auxiliary_loss"] == pytest.approx(auxiliary, rel=1e-4)


def test_a_restart_is_bitwise_an_undisturbed_run(place):
    whole = main(place, *KEYS, "name=lotus-whole")
    main(place, *KEYS, "name=lotus-parts", "num_epochs=2")
    parts = main(place, *KEYS, "name=lotus-parts")
    first, second = (weights(folder / "checkpoint_3") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
