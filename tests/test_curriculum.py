"""The token sequences of every method and stage, written out, and the stages of the epochs."""

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import curriculum
from config import Config
from curriculum import IGNORE, NO_REASONING, Markers, prompt, schedule, stage_of, stage_of_step, training_sequence

M = Markers(start=90, latent=91, end=92, eos=99)
Q, S, A = [1, 2, 3], [[10, 11], [20], [30, 31, 32]], [40, 41]
B, T, E = M.start, M.latent, M.end  # begin, thought, end


def sequence(stage: int, **keys) -> tuple[list[int], list[int]]:
    return training_sequence(Q, S, A, stage, Config(**keys), M)


ALL = [10, 11, 20, 30, 31, 32, 40, 41, 99]
REST = [40, 41, 99]
AFTER_1, AFTER_2 = [20, 30, 31, 32, *REST], [30, 31, 32, *REST]

# method, other keys, stage, unsupervised part, supervised part
LITERAL = [
    ("cot", {}, 0, [1, 2, 3], ALL),
    ("no_cot", {}, 0, [1, 2, 3], REST),
    ("coconut", {}, 0, [1, 2, 3, B, E], ALL),
    ("coconut", {}, 1, [1, 2, 3, B, T, E], AFTER_1),
    ("coconut", {}, 2, [1, 2, 3, B, T, T, E], AFTER_2),
    ("coconut", {}, 3, [1, 2, 3, B, T, T, T, E], REST),
    ("coconut", {}, 4, [1, 2, 3, B, T, T, T, T, E], REST),
    ("coconut", {"c_thought": 2}, 1, [1, 2, 3, B, T, T, E], AFTER_1),
    ("coconut", {"c_thought": 2}, 2, [1, 2, 3, B, T, T, T, T, E], AFTER_2),
    ("coconut", {"max_latent_stage": 2}, 3, [1, 2, 3, B, T, T, E], REST),
    ("coconut", {"max_latent_stage": 2, "c_thought": 2}, 3, [1, 2, 3, B, T, T, T, T, E], REST),
    ("coconut", {"max_latent_stage": 4}, 5, [1, 2, 3, B, T, T, T, T, E], REST),
    ("coconut", {"max_latent_stage": 4, "pad_latent_to_max": False}, 4, [1, 2, 3, B, T, T, T, T, E], REST),
    ("coconut", {"max_latent_stage": 4, "pad_latent_to_max": False}, 5, [1, 2, 3, B, T, T, T, E], REST),
    ("coconut", {"max_latent_stage": 2, "pad_latent_to_max": False}, 3, [1, 2, 3, B, T, T, E], REST),
    ("no_thoughts", {}, 0, [1, 2, 3], ALL),
    ("no_thoughts", {"c_thought": 2}, 1, [1, 2, 3], AFTER_1),
    ("no_thoughts", {}, 2, [1, 2, 3], AFTER_2),
    ("no_thoughts", {"max_latent_stage": 2}, 3, [1, 2, 3], REST),
    # w/o curriculum, pause token and pause as thought have coconut's sequences: schedule and model differ
    ("coconut", {"curriculum": "none", "max_latent_stage": 3}, 4, [1, 2, 3, B, T, T, T, E], REST),
    ("coconut", {"curriculum": "none", "max_latent_stage": 3, "thought": "pause"}, 4, [1, 2, 3, B, T, T, T, E], REST),
    ("coconut", {"thought": "pause"}, 2, [1, 2, 3, B, T, T, E], AFTER_2),
    # without markers, the hidden state of the position that predicted a step becomes its thought
    ("coconut", {"latent_markers": "none"}, 0, [1, 2, 3], ALL),
    ("coconut", {"latent_markers": "none"}, 2, [1, 2, 3, T, T], AFTER_2),
    ("coconut", {"latent_markers": "none", "max_latent_stage": 2, "c_thought": 2}, 3, [1, 2, 3, *[T] * 4], REST),
    # as many thoughts as steps, without an upper limit
    ("latents_by_steps", {}, 2, [1, 2, 3, B, T, T, E], AFTER_2),
    ("latents_by_steps", {}, 5, [1, 2, 3, B, T, T, T, E], REST),
    ("latents_by_steps", {"max_latent_stage": 1}, 1, [1, 2, 3, B, T, E], AFTER_1),
    ("latents_by_steps", {"max_latent_stage": 1}, 2, [1, 2, 3, B, T, T, T, E], REST),
    ("latents_by_steps", {"max_latent_stage": 2, "c_thought": 2}, 3, [1, 2, 3, B, *[T] * 6, E], REST),
    # icot counts removed tokens, from the left
    ("icot", {}, 0, [1, 2, 3], ALL),
    ("icot", {}, 1, [1, 2, 3], [11, *AFTER_1]),
    ("icot", {}, 4, [1, 2, 3], [31, 32, *REST]),
    ("icot", {}, 6, [1, 2, 3], REST),
    ("icot", {}, NO_REASONING, [1, 2, 3], REST),
]


@pytest.mark.parametrize(("method", "keys", "stage", "before", "after"), LITERAL)
def test_sequences(method, keys, stage, before, after):
    config = Config(method=method, **keys)
    for answer in (A, [*A, M.eos]):  # EOS is added once
        found = training_sequence(Q, S, answer, stage, config, M)
        assert found == (before + after, [-100] * len(before) + after)
    assert prompt(Q, S, stage, config, M) == before


def test_eval_latents_from_steps():
    keys = {"max_latent_stage": 6, "pad_latent_to_max": False}
    assert prompt(Q, S, 5, Config(**keys), M).count(T) == 5
    assert prompt(Q, S, 5, Config(**keys, eval_latents_from_steps=True), M).count(T) == 3
    assert prompt(Q, S, 5, Config(**keys, eval_latents_from_steps=True, c_thought=2), M).count(T) == 6
    assert sequence(5, **keys, eval_latents_from_steps=True)[0].count(T) == 5


@pytest.mark.parametrize("n_latents", [0, 1, 7])
@pytest.mark.parametrize("stage", [0, 2, 7])
def test_eval_latents_sets_the_number_of_thoughts(stage, n_latents):
    config = Config(only_eval=True, eval_latents=n_latents)
    assert prompt(Q, S, stage, config, M) == [*Q, M.start, *[T] * n_latents, M.end]
    assert training_sequence(Q, S, A, stage, config, M) == sequence(stage)  # the loss keeps the stage


@given(
    n_steps=st.integers(0, 7),
    stage=st.integers(0, 9),
    c_thought=st.integers(0, 3),
    last=st.integers(0, 7),
    padded=st.booleans(),
    method=st.sampled_from(["coconut", "cot", "no_cot", "no_thoughts", "icot"]),
)
def test_training_and_evaluation_agree(n_steps, stage, c_thought, last, padded, method):
    """The prompt is the training sequence up to the first supervised token."""
    config = Config(method=method, c_thought=c_thought, max_latent_stage=last, pad_latent_to_max=padded)
    steps = [[10 + number] for number in range(n_steps)]
    input_ids, labels = training_sequence(Q, steps, A, stage, config, M)
    before = prompt(Q, steps, stage, config, M)
    assert input_ids[: len(before)] == before
    assert labels == [IGNORE] * len(before) + input_ids[len(before) :]
    assert input_ids[-3:] == [*A, M.eos]
    assert not {B, T, E} & set(input_ids[len(before) :])


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({"epochs_per_stage": 2, "max_latent_stage": 2}, [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]),
        ({"epochs_per_stage": [3, 1, 2], "max_latent_stage": 2}, [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]),
        ({"epochs_per_stage": 2, "max_latent_stage": 2, "curriculum": "none"}, [3] * 10),
        ({"epochs_per_stage": 2, "method": "cot"}, [0] * 10),
        ({"epochs_per_stage": 2, "method": "no_thoughts", "max_latent_stage": 1}, [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_stage_of(keys, stages):
    assert [stage_of(Config(**keys), epoch) for epoch in range(10)] == stages


def test_icot_removes_a_token_every_eighth_of_an_epoch():
    config = Config(method="icot", icot_remove_all_after=20)
    stages = [stage_of_step(config, epoch, step, 80) for epoch in range(3) for step in range(80)]
    assert stages == [min(step // 10, NO_REASONING) if step < 200 else NO_REASONING for step in range(240)]
    assert [stage_of(config, epoch) for epoch in range(3)] == stages[79::80]
    assert stage_of_step(Config(method="icot"), 100, 0, 80) == 800
    assert {stage_of_step(Config(method="coconut"), 7, step, 80) for step in range(80)} == {stage_of(Config(), 7)}


@pytest.mark.parametrize("name", ["gsm", "prontoqa", "prosqa"])
def test_most_epochs_of_icot_are_in_one_stage(name):
    """Bug: in each of 200 epochs a stage of its own, so save_only_improve kept the last checkpoint, which was @best."""
    config = Config.from_file(ROOT / "args" / f"{name}.yaml", ["row=icot"], needs_files=False)
    stages = [stage_of(config, epoch) for epoch in range(config.num_epochs)]
    assert stages.count(NO_REASONING) > 0.8 * len(stages)


def test_icot_smoothing_removes_a_few_more_tokens():
    config = Config(method="icot", icot_smoothing=1.0)
    draws = [curriculum.stage_of_example(config, 5, 2, index, 3) - 5 for index in range(4000)]
    for more in range(3):
        assert draws.count(more) / 4000 == pytest.approx((1 - np.exp(-1)) * np.exp(-more), abs=0.03)
    assert draws == [curriculum.stage_of_example(config, 5, 2, index, 3) - 5 for index in range(4000)]
    config = Config(method="icot", icot_smoothing=None)
    assert {curriculum.stage_of_example(config, 5, 2, index, 3) for index in range(99)} == {5}


def test_icot_resets_the_optimizer_while_reasoning_is_left():
    """Of four steps an epoch, every second one removes a token more."""
    asked, examples = [], [(0, [[1], [2, 3]]), (1, [])]

    def trained_on(*moment: int) -> list:
        asked.append(moment)
        return examples

    def resets(**keys) -> list[tuple[int, int]]:
        config = Config(method="icot", icot_tokens_per_epoch=2, reset_optimizer="stage", **keys)
        moments = [(epoch, step) for epoch in range(3) for step in range(4)]
        return [one for one in moments if curriculum.should_reset_optimizer(config, *one, 4, trained_on)]

    assert resets(icot_smoothing=None) == [(0, 2), (1, 0), (1, 2)]
    assert asked == [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1)]  # the steps before
    assert resets(icot_smoothing=1e-4) == []  # thousands of tokens more are removed


def test_the_schedule_of_gsm8k():
    lines = schedule(Config.from_file(ROOT / "args" / "gsm_coconut.yaml", needs_files=False), 4).splitlines()
    assert len(lines) == 1 + 22  # epochs 0 to 2, those of the CoT model, are skipped
    assert lines[1].split() == ["3", "1", "2", "from", "step", "2", "on", "new", "128"]
    assert lines[10].split() == ["12", "4", "6", "none", "new", "128"]


def test_the_learning_rate_decays_over_the_epochs_from_resume_on():
    config = Config(resume=1, num_epochs=3, lr_scheduler="linear")
    assert [curriculum.lr_factor(config, 1, *moment, 4) for moment in ((1, 0), (1, 2), (2, 3))] == [1, 0.75, 0.125]


def test_the_learning_rate_decays_after_the_warm_up():
    config = Config(num_epochs=3, warmup_steps=4, lr_scheduler="linear")
    moments = ((0, 0), (0, 3), (1, 0), (2, 0))  # of 4 steps an epoch
    assert [curriculum.lr_factor(config, 0, *moment, 4) for moment in moments] == [0.25, 1, 1, 0.5]


def test_mixing_depends_on_seed_epoch_and_example_only():
    config = Config(uniform_prob=0.5, seed=3)
    draws = [curriculum.stage_of_example(config, 9, 4, index, 3) for index in range(400)]
    assert draws == [curriculum.stage_of_example(config, 9, 4, index, 3) for index in range(400)]
    assert draws != [curriculum.stage_of_example(config, 9, 5, index, 3) for index in range(400)]
    assert set(draws) == {0, 1, 2, 3, 9}
    assert 150 < draws.count(9) < 250
    assert {curriculum.stage_of_example(Config(), 9, 4, index, 3) for index in range(50)} == {9}


def test_advance_at_ends_a_stage_early():
    config = Config(epochs_per_stage=[3, 2, 2], max_latent_stage=1, num_epochs=9, advance_at=0.9)
    assert [curriculum.next_epoch(config, epoch, 0.89, 0)[0] for epoch in range(9)] == list(range(1, 10))
    assert [curriculum.next_epoch(config, epoch, 0.9, 0)[0] for epoch in range(9)] == [3, 3, 3, 5, 5, 9, 9, 9, 9]
    assert curriculum.next_epoch(Config(num_epochs=9), 0, 1.0, 0) == (1, 0)


def test_advance_after_needs_consecutive_epochs():
    config = Config(epochs_per_stage=[4, 2], max_latent_stage=1, num_epochs=9, advance_at=0.9, advance_after=2)
    assert curriculum.next_epoch(config, 0, 0.9, 0) == (1, 1)
    assert curriculum.next_epoch(config, 1, 0.8, 1) == (2, 0)
    assert curriculum.next_epoch(config, 1, 0.9, 1) == (4, 0)  # the next stage counts from 0
    assert curriculum.next_epoch(config, 3, 0.9, 0) == (4, 0)  # the stage's epochs are over
    assert curriculum.next_epoch(config, 5, 0.9, 1) == (9, 0)
    assert "a stage ends early after" in schedule(config, 1).splitlines()[-1]
