"""SIM-CoT: the step decoder's loss and all gradients equal the plain definition, on any number of ranks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from conftest import (
    distance,
    keys,
    last_of_each,
    lines_of,
    main,
    read_json,
    refuses,
    steps,
    tiny_base,
    together,
    weights,
)
from test_coconut import END, EOS, LATENT, START
from test_methods import MARKERS, make_dataset, stages_of

import run
from config import Config
from dataset import EpochPlan, MicroBatch, PlannedStep
from methods.sim_cot import SimCot, StepDecoder, group_targets, step_targets
from trainer.pretrained import load_model, make_model


def make_sim_cot(config: Config, family: str, tied: bool = True) -> SimCot:
    model = make_model(config, tiny_base(family, tied), MARKERS)
    model.add_companion(tiny_base(family, tied, seed=5))
    return model.train()


CASES = {
    "ragged": {"c_thought": 2, "max_latent_stage": 3},
    "means": {"c_thought": 1, "max_latent_stage": 3, "step_decoder_reduction": "mean"},
    "no surplus": {"c_thought": 2, "max_latent_stage": 4, "step_decoder_surplus": "none"},
    "mixed stages": {"c_thought": 1, "max_latent_stage": 4, "uniform_prob": 1.0},
    "in parallel": {"c_thought": 2, "max_latent_stage": 3, "latent_passes": "2"},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", ["last", "before"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_all_gradients_equal_the_plain_definition(family, tied, case, stage):
    """With parallel latents, the decoder could get the inputs of the first pass."""
    config = Config(method="sim_cot", step_decoder="copy", step_decoder_weight=0.5, **CASES[case])
    last, c = config.max_latent_stage, config.c_thought
    stage = last + 1 if stage == "last" else last
    dataset, examples = make_dataset(config, [1, 5, 3, 2])
    stages = stages_of(config, examples, stage)
    rows = [plain.coconut_row(one, its, last, c) for one, its in zip(examples, stages, strict=True)]
    texts = [
        plain.step_texts(one, its, last, row[0].count(LATENT) // c, config.step_decoder_surplus == "answer")
        for one, its, row in zip(examples, stages, rows, strict=True)
    ]
    model = make_sim_cot(config, family, tied)
    base, decoder = model.base_causallm, model.step_decoder.base_causallm
    batch = dataset.collate([dataset[index, stage] for index in range(4)])
    n_groups = batch.pop("loss_counts")["auxiliary"]
    output = model(**batch)
    how = {"passes": 2} if case == "in parallel" else {}
    total, count = plain.sim_cot_loss(base, decoder, rows, texts, c, config.step_decoder_reduction == "mean", **how)
    assert n_groups == count > 2
    assert abs(output.auxiliary - 0.5 * total) < 1e-9
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    embeddings = decoder.get_input_embeddings().weight
    assert embeddings.requires_grad == (embeddings is decoder.get_output_embeddings().weight)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), retain_graph=True), strict=True))

    found, loss = gradients(output.loss + output.auxiliary / n_groups), plain.loss(base, rows, **how)
    assert distance(found, gradients(loss + 0.5 * total / count)) < 1e-9
    name, parameter = next(iter(trained.items()))
    without_decoder = torch.autograd.grad(loss, parameter)[0]
    assert (without_decoder - found[name]).abs().max() > 1e-6  # the decoder's gradient reaches the base


def test_target_texts_of_thoughts():
    """The last group predicts later steps only once no step is written (it did so one stage too early)."""
    assert step_targets(["a", "b"], 3) == ["a", "b"]
    assert step_targets(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert step_targets(["a", "b", "c", "d"], 2) == ["a", "b", "b\nc\nd"]
    assert step_targets(["a", "b"], 1) == ["a", "a\nb"]
    assert step_targets(["a", "b"], 0) == []
    three, config = [[5], [6], [6, 10, 7]], Config(max_latent_stage=2)  # steps 5, 6, 7
    assert group_targets(three, [8], 1, 1, config) == [[5]]
    assert group_targets(three, [8], 2, 2, config) == [[5], [6]]
    assert group_targets(three, [8], 2, 3, config) == [[5], [6, 10, 7]]
    texts, answer = [[5], [6, 7]], [8, 9]
    config = Config(c_thought=2, step_decoder_surplus="answer")
    assert group_targets(texts, answer, 2, 1, config) == [[5]]
    assert group_targets(texts, answer, 8, 4, config) == [[5], [6, 7], [8, 9], [8, 9]]
    assert group_targets(texts, answer, 6, 3, Config(c_thought=2, step_decoder_surplus="none")) == [[5], [6, 7], None]
    assert group_targets(texts, answer, 0, 0, config) == []
    # a step's text has no newline; the last thoughts predict all later steps
    config = Config(method="sim_cot", step_decoder="copy", max_latent_stage=2, c_thought=1)
    dataset, (example,) = make_dataset(config, [4])
    assert dataset[0, 3][2] == [plain.ids(example["steps"][0]), plain.ids("\n".join(example["steps"][1:]))]


def test_a_batch_without_thoughts_still_gives_the_decoder_a_gradient(family):
    config = Config(method="sim_cot", step_decoder="copy")
    dataset, _ = make_dataset(config, [2, 3], epoch=None)
    batch = dataset.collate([dataset[0, 0], dataset[1, 0]])
    assert batch.pop("loss_counts") == {"auxiliary": 0}
    model = make_sim_cot(config, family)
    output = model(**batch)
    assert output.auxiliary == 0
    (output.loss + output.auxiliary).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.step_decoder.parameters() if p.requires_grad)


def test_mixed_stages_have_the_targets_of_their_own_stage():
    """Of more steps than there are targets."""
    config = Config(method="sim_cot", step_decoder="copy", c_thought=1, max_latent_stage=2, uniform_prob=1.0)
    dataset, examples = make_dataset(config, [9] * 20)
    for index, stage in enumerate(stages_of(config, examples, 2)):
        input_ids, _, targets = dataset[index, 2]
        assert targets == plain.step_texts(examples[index], stage, 2, input_ids.count(LATENT))


def test_an_idle_ranks_example_does_not_count(world):
    """Neither do its tokens in tokens_per_second (bug)."""
    dataset, _ = make_dataset(Config(method="sim_cot", step_decoder="copy", c_thought=1), [2, 3])
    planned = PlannedStep([MicroBatch([0], 1.0), MicroBatch([1], 0.0)], 1)
    parts = SimpleNamespace(dataset=type(dataset), on_device=lambda _, batch: batch)
    lengths = []
    throughput = SimpleNamespace(waiting=0, add=lambda rows, _: lengths.extend(rows))
    world = replace(world, device=torch.device("meta"))  # where nothing can be read: the weights stay on the CPU
    one = SimpleNamespace(world=world, parts=parts, throughput=throughput)
    batches = (dataset.micro_batch(micro, 2) for micro in planned.micro_batches)
    assert [auxiliary for _, (_, auxiliary) in run.weighted_batches(one, planned, batches)] == [1 / 2, 0]
    assert lengths == [len(dataset[0, 2][0])]


def test_the_decoder_has_no_dropout_and_evaluation_has_no_decoder():
    base = tiny_base("gpt2")
    model = SimCot(tiny_base("gpt2"), LATENT, START, END, EOS)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.add_companion(base)
    assert model.train().training
    assert not any(module.training for module in model.step_decoder.modules())
    assert model(torch.tensor([[5, 6, LATENT, 7]]), labels=torch.tensor([[-100, -100, -100, 7]])).auxiliary is None


# ---- runs ----

KEYS = keys("step_decoder=copy num_epochs=3 max_train_examples=40 max_new_tokens=2 global_batch_size=16")


@pytest.mark.slow
def test_ranks_and_micro_batches_share_one_mean(place):
    """Mixed stages and a last step of 4 examples: some micro-batches have no thoughts, and one rank is idle: it runs an
    example with thoughts that does not count."""
    arguments = (*KEYS, "uniform_prob=0.5", "batch_size_training=4", "max_train_examples=36")
    plan = EpochPlan(
        np.arange(36), Config.from_file(place / "run.yaml", last_of_each(*arguments)), rank=1, world_size=2
    )
    assert [micro.weight for micro in plan[2].micro_batches] == [0]
    folders = [
        main(place, *arguments, "name=sim-alone"),
        main(place, *arguments, "name=sim-fsdp-alone", "strategy=fsdp"),
    ]
    for strategy in ("ddp", "fsdp"):
        done = together(place / "run.yaml", *arguments, f"name=sim-{strategy}", f"strategy={strategy}")
        assert f"on 2 x cpu ({strategy})" in done.stderr
        folders.append(place / "runs" / f"sim-{strategy}")
    wanted, *others = ([record["auxiliary_loss"] for record in steps(folder)] for folder in folders)
    assert 0 < min(wanted) < max(wanted)
    for found in others:
        assert found == pytest.approx(wanted, rel=2e-5)
    whole = main(place, *arguments, "name=sim-one-pass", "batch_size_training=16")
    # the answer's loss is a mean of means, and from then on the weights differ
    assert steps(whole)[0]["auxiliary_loss"] == pytest.approx(wanted[0], rel=1e-6)


def test_only_the_trainer_saves_the_decoder(place):
    run = main(place, *KEYS, "name=sim-whole")
    trained = weights(run / "checkpoint_3")
    assert not any("step_decoder" in name for name in trained)
    without = main(place, *KEYS, "name=sim-none", "step_decoder=none")
    assert distance(trained, weights(without / "checkpoint_3")) > 0
    evaluated = main(place, "name=sim-eval", "step_decoder=copy", "only_eval=true", f"load_model_path={run}")
    assert read_json(evaluated / "eval" / "metrics.json")["stage"] == 2


def test_a_decoder_whose_loss_is_not_finite_stops_the_run_at_that_step(place, monkeypatch, capsys):
    """Only the answer's loss was checked, so the error named the next step."""
    original, calls = StepDecoder.forward, []

    def broken(self, *args):
        calls.append(args)
        return original(self, *args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(StepDecoder, "forward", broken)
    folder = main(place, *KEYS, "name=sim-nan", "batch_size_training=16", code=2)
    assert "the loss of step 2" in capsys.readouterr().err
    (record,) = lines_of(folder / "nonfinite.jsonl")
    assert (record["step"], len(record["examples"])) == (2, 16)


def test_a_pretrained_decoder_has_the_weights_of_model_id_and_no_markers(place, tmp_path):
    model = load_model(Config(model_id=str(place / "model"), step_decoder="pretrained"), None).model
    base, decoder = model.base_causallm, model.step_decoder.base_causallm
    ours, theirs = base.get_input_embeddings().weight, decoder.get_input_embeddings().weight
    assert len(theirs) == len(ours) - 3
    assert theirs is not ours
    assert torch.equal(decoder.transformer.h[0].mlp.c_fc.weight, base.transformer.h[0].mlp.c_fc.weight)
    refuses("model_id", load_model, Config(model_id=str(tmp_path), step_decoder="pretrained"), None)
