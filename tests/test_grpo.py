"""GRPO: the gradient of the expected reward, by enumeration of all answers and by quadrature over the noise; the same
weights for any micro-batches, ranks and restarts."""

from itertools import product
from types import SimpleNamespace

import conftest
import numpy as np
import plain
import pytest
import torch
from conftest import ROOT, VOCABULARY, distance, equal, keys, main, refuses, steps, tiny_base, together, weights
from test_coconut import END, EOS, LATENT, START, gradients
from test_methods import MARKERS, make_dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from config import Config
from dataset import MicroBatch, collate_for_device
from methods import grpo
from methods.grpo import Grpo, Replay, advantages, checked
from tools import report
from trainer.pretrained import make_model, parts_of
from trainer.samples import Noise, Samples

PROMPT = [5, 9, 7, START, LATENT, LATENT, END]


def reward(answer: list[int]) -> float:
    """An arbitrary function of an answer."""
    return float(np.sin(sum(7 * index + token for index, token in enumerate(answer))))


def batch_of(answers: list[list[int]], prompt: list[int] = PROMPT) -> dict:
    rows = [(prompt + answer, [-100] * len(prompt) + answer) for answer in answers]
    return collate_for_device(rows, EOS, LATENT)


def make_grpo(family: str, temperature: float = 1.0, **keys) -> Grpo:
    return make_model(Config(method="grpo", temperature=temperature, **keys), tiny_base(family), MARKERS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_over_all_answers_the_gradient_is_that_of_the_expected_reward(family, temperature):
    """Answers of up to two tokens: EOS, or another token and any token; never the latent token."""
    model = make_grpo(family, temperature)
    base, others = model.base_causallm, [token for token in range(1, VOCABULARY) if token != LATENT]

    def distribution(embeds):
        """(..., V - 1) probabilities of the next token."""
        return (base(inputs_embeds=embeds).logits[:, -1, [EOS, *others]] / temperature).softmax(-1)

    embeds = plain.filled(base, PROMPT)
    first = distribution(embeds)[0]
    added = base.get_input_embeddings()(torch.tensor(others))[:, None]  # (V - 2, 1, D)
    second = first[1:, None] * distribution(torch.cat([embeds.expand(len(added), -1, -1), added], dim=1))
    answers = [[EOS], *([one, two] for one, two in product(others, [EOS, *others]))]
    p = torch.cat([first[:1], second.flatten()])
    assert abs(p.sum() - 1) < 1e-12
    rewards = torch.tensor([reward(answer) for answer in answers], dtype=torch.float64)
    wanted = gradients(model, -(p * rewards).sum())
    weighted = p.detach() * (rewards - 0.3) * len(answers)  # with any baseline
    found = gradients(model, model(**batch_of(answers), advantages=weighted.tolist()).loss)
    assert distance(found, wanted) < 1e-9


@pytest.mark.parametrize("size", [2, 3])
def test_the_groups_own_mean_as_baseline_shrinks_the_gradient_by_one_over_the_size(size):
    """Over all groups of one-token answers out of eight tokens; the other tokens have the remaining probability."""
    model = make_grpo("llama")
    answers = [[token] for token in range(8)]
    p = model.base_causallm(inputs_embeds=plain.filled(model.base_causallm, PROMPT)).logits[0, -1, :8].softmax(-1)
    rewards = torch.tensor([reward(answer) for answer in answers], dtype=torch.float64)
    wanted = torch.autograd.grad((p * rewards).sum(), p)[0]
    wanted = p.detach() * (wanted - (wanted * p.detach()).sum())  # with respect to the logits
    groups = torch.tensor(list(product(range(8), repeat=size)))
    chance = p.detach()[groups].prod(dim=1, keepdim=True)
    shares = (chance * advantages(rewards[groups], "mean") / size).flatten()
    weight = torch.zeros(8, dtype=torch.float64).index_add(0, groups.flatten(), shares)
    found = weight - weight.sum() * p.detach()
    assert (found - (1 - 1 / size) * wanted).abs().max() < 1e-12


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)
    assert advantages(rewards, "mean").tolist() == [[0.5, -0.5, -0.5, 0.5], [0] * 4, [0.75, -0.25, -0.25, -0.25]]
    found = advantages(rewards, "std")
    assert found[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-6)
    assert found[1].tolist() == [0] * 4
    assert found[2].tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3], abs=1e-6)


@pytest.mark.parametrize("spelling", [0.4, "absolute:0.9"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_noise_is_an_action_with_its_own_log_density(family, spelling):
    model = make_grpo(family, thought_noise=spelling)
    base, answers = model.base_causallm, [[6, EOS], [11, 12]]
    generator = torch.Generator().manual_seed(3)
    eps, weight = torch.randn(2, 2, 32, generator=generator, dtype=torch.float64), [0.7, -1.9]
    wanted = 0.0
    for row, answer in enumerate(answers):
        density = []

        def act(thought, row=row, density=density):
            relative = 0.4 * thought.norm() / 32**0.5
            scale = relative if spelling == 0.4 else torch.tensor(0.9, dtype=torch.float64)
            action = (thought + scale * eps[row, len(density)]).detach()
            density.append(torch.distributions.Normal(thought, scale).log_prob(action).sum())
            return action

        embeds = plain.filled(base, PROMPT, act)
        embeds = torch.cat([embeds, base.get_input_embeddings()(torch.tensor([answer]))], dim=1)
        logits = base(inputs_embeds=embeds).logits[0]
        logits[:, LATENT] = -torch.inf  # never sampled
        logits = logits.log_softmax(-1)
        likelihood = sum(logits[len(PROMPT) - 1 + index, token] for index, token in enumerate(answer))
        wanted = wanted - weight[row] * (likelihood + sum(density)) / 2
    expected = gradients(model, wanted)
    batch = batch_of(answers)
    edit = Replay(spelling, eps, batch["input_ids"][:, batch["latent_columns"]] == LATENT)
    output = model(**batch, advantages=weight, edit=edit)
    found = gradients(model, output.loss + output.auxiliary)
    assert distance(found, expected) < 1e-9


def tiny_llama() -> torch.nn.Module:
    """A Llama of two dimensions and six tokens."""
    sizes = {"vocab_size": 6, "hidden_size": 2, "intermediate_size": 4, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=1, rms_norm_eps=0.1, eos_token_id=0)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in base.parameters():
        parameter.data += 0.6 * torch.randn_like(parameter)
    return conftest.with_exact_norms(base)


@pytest.mark.parametrize("spelling", [0.3, "absolute:0.3"])
def test_over_all_noise_the_gradient_is_that_of_the_expected_reward(spelling):
    """Gauss-Hermite quadrature in two dimensions: the score-function gradient equals the one through the thought."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(40)
    shares = torch.from_numpy(np.outer(shares, shares).flatten() / (2 * np.pi))
    eps = torch.from_numpy(np.array(list(product(nodes, nodes))))[:, None]  # (nodes, 1, D)
    prompt, n = [5, 4, START, LATENT, END], len(shares)
    model = make_model(Config(method="grpo", temperature=1.0, thought_noise=spelling), tiny_llama(), MARKERS)
    tokens = [token for token in range(6) if token != LATENT]
    rewards = torch.tensor([reward([token]) for token in tokens], dtype=torch.float64)
    batch = batch_of([[0]] * n, prompt)
    is_latent = batch["input_ids"][:, batch["latent_columns"]] == LATENT
    labels, supervised = batch.pop("labels"), batch.pop("supervised")
    output = model(**batch, edit=Noise(spelling, eps, is_latent))  # Coconut's own forward
    p = output.logits[:, len(prompt) - 1, tokens].softmax(-1)  # (nodes, V - 1)
    wanted = gradients(model, -(shares[:, None] * p * rewards).sum())
    weighted, loss = shares[:, None] * p.detach() * (rewards - 0.1) * n, 0
    for index, token in enumerate(tokens):  # the same nodes for each answer
        labels[:, -1] = token
        answer = {"labels": labels.clone(), "supervised": supervised, "advantages": weighted[:, index].tolist()}
        output = model(**batch, **answer, edit=Replay(spelling, eps, is_latent))
        loss = loss + output.loss + output.auxiliary
    found = gradients(model, loss)
    assert max(value.abs().max() for value in wanted.values()) > 1e-2
    assert distance(found, wanted) < 1e-6


def test_a_batch_without_latents_gives_everything_a_gradient():
    model = make_grpo("llama", thought="projected", thought_noise=0.3)
    batch = batch_of([[6, EOS], [EOS]], [5, 9, START, END])
    edit = Replay(0.3, None, batch["input_ids"][:, []] == LATENT)
    output = model(**batch, advantages=[0.5, -0.5], edit=edit)
    (output.loss + output.auxiliary).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_policy_has_no_dropout():
    model = make_grpo("gpt2")
    assert not any(module.training for module in model.train().modules())


@pytest.mark.parametrize("epoch", [0, 3])
def test_each_epoch_samples_anew(epoch):
    dataset, _ = make_dataset(Config(method="grpo", seed=4), [2], epoch)
    assert dataset.collate([dataset[0, 1]])["keys"] == [(4, epoch, 0)]


# --- Rewards ---


def test_a_reward_must_be_a_number_for_each_answer():
    assert checked("match", [True, False], 2) == [1.0, 0.0]
    refuses(r"reward 'own\.py' returned 1 numbers for 2 answers", checked, "own.py", [1.0], 2)
    for value in (float("nan"), float("inf")):
        refuses(r"reward 'own\.py' returned (nan|inf)", checked, "own.py", [0.0, value], 2)


def test_a_reward_of_ones_own(tmp_path):
    own = grpo.reward_function(str(ROOT / "tests" / "own_reward.py"), "text")
    assert own("1+2", "3", ["### 3", "3.0 as it is", "4"]) == pytest.approx([0.95, 0.88, -0.01])
    assert grpo.reward_function("match", "text")("1+2", "3", ["### 3", "### 3.0"]) == [True, False]
    assert grpo.reward_function("match", "number")("1+2", "3", ["### 3.0"]) == [True]
    (tmp_path / "none.py").write_text("score = 1\n")
    refuses("has no function reward", grpo.reward_function, str(tmp_path / "none.py"), "text")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"reward": "absent.py"}, "'absent.py' is neither match nor a Python file"),
        ({"method": "coconut", "group_size": 4}, "group_size is for method grpo, not coconut"),
        ({"thought": "pause", "thought_noise": 0.1}, "need latents and a thought other than pause"),
        ({"latent_passes": "2", "thought_noise": 0.1}, "need sequential thoughts"),
    ],
)
def test_invalid_combinations_are_rejected(keys, problem):
    assert problem in " ".join(Config(**{"method": "grpo"} | keys).problems(needs_files=False))


def test_measures_are_sums_and_100_steps_without_signal_are_a_warning(caplog):
    model, logged = make_grpo("gpt2"), {}

    def measure(name, total, number):
        logged[name] = (total, number)

    run = SimpleNamespace(model=model, progress=SimpleNamespace(step=0), measure=measure)
    drawn, same = Samples([], None, (6.0, 4), (8.0, 2)), torch.zeros(2, 4, dtype=torch.float64)
    grpo.log.addHandler(caplog.handler)
    try:
        for step in range(205):
            run.progress.step = step
            rewards = same.clone()
            rewards[0, 0] = step == 50
            grpo._measure(run, rewards, drawn, counts=True)
            assert len(caplog.records) == (step >= 150)
            if step == 50:
                assert logged["groups_without_signal"] == (1, 2)
                assert logged["reward"] == (1, 8)
    finally:
        grpo.log.removeHandler(caplog.handler)
    assert "for 100 steps all answers to a question had the same reward (now 0 on average)" in caplog.text
    assert logged["groups_without_signal"] == (2, 2)
    assert logged["entropy"] == (6.0, 4)
    grpo._measure(run, same, drawn, counts=False)
    assert set(logged.values()) == {(0, 0)}


def test_an_idle_ranks_samples_do_not_count(world):
    """Bug: their tokens were in tokens_per_second."""
    config, lengths = Config(method="grpo", group_size=2, max_new_tokens=1), []
    model, dataset = make_grpo("gpt2"), make_dataset(config, [2])[0]
    throughput = SimpleNamespace(add=lambda rows, _: lengths.extend(rows), count=lambda *_: None)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids))
    run = SimpleNamespace(config=config, world=world, pretrained=(model, tokenizer, MARKERS), throughput=throughput)
    run.model, run.progress, run.measure = model, SimpleNamespace(step=0), lambda *_: None
    for weight in (1.0, 0.0):
        grpo.on_device(run, dataset.micro_batch(MicroBatch([0], weight), 1))
        assert lengths == [len(dataset[0, 1][0]) + 1] * 2


# --- Runs ---

RUN = keys("""
    method=grpo group_size=4 thought_noise=0.1 c_thought=2 uniform_prob=0.4 num_epochs=3 log_every_steps=1
    max_train_examples=32 max_eval_examples=4 max_new_tokens=1 global_batch_size=16 batch_size_training=16
""")


def logged_means(folder) -> list[dict[str, float]]:
    names = {"reward", "reward_std", "groups_without_signal", "entropy", "thought_norm"}
    return [{name: record[name] for name in names & record.keys()} for record in steps(folder)]


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of weights, without the biases of keys: their gradient is 0, and AdamW amplifies its
    rounding errors."""
    differences = {name: (first[name] - second[name]).abs() for name in first}
    differences["transformer.h.0.attn.c_attn.bias"][32:64] = 0
    return max(difference.max().item() for difference in differences.values())


def test_a_restart_is_bitwise_an_undisturbed_run_and_micro_batches_of_any_size_train_the_same(place):
    whole = main(place, *RUN, "name=grpo-whole", "save_every_steps=1")
    main(place, *RUN, "name=grpo-parts", "num_epochs=2")
    parts = main(place, *RUN, "name=grpo-parts")
    first = weights(whole / "checkpoint_3")
    assert equal(first, weights(parts / "checkpoint_3"))
    for key in ("max_new_tokens=2", "answer_match=number"):  # bug: the run went on, with other samples or rewards
        main(place, *RUN, "name=grpo-parts", key, code=2)
    cut = main(place, *RUN, "name=grpo-cut", "batch_size_training=4")
    assert difference(first, weights(cut / "checkpoint_3")) < 1e-5
    assert logged_means(cut) == [pytest.approx(means, rel=1e-4) for means in logged_means(whole)]
    assert {len(means) for means in logged_means(whole)} == {5}
    assert any(record["groups_without_signal"] < 1 for record in steps(whole))
    for record, other in zip(steps(whole), steps(cut), strict=True):
        assert 0 < record["rollout_share"] < 1
        assert 0 <= record["reward"] <= 1
        assert record["auxiliary_loss"] == pytest.approx(other["auxiliary_loss"], abs=1e-4)
    captions = [figure.caption for figure in report.training(report.read_runs([whole])).figures]
    assert len(captions) == 2 + len(report.STEP_COLUMNS) - 1  # grad_norm is not computed
    assert captions[2].startswith("mean reward by optimizer step")


@pytest.mark.slow
def test_two_ranks_and_shards_train_the_same(place):
    """In the last step of an epoch, of 4 examples, a rank is idle."""
    arguments = (*RUN, "max_train_examples=36")
    whole = main(place, *arguments, "name=grpo-one")
    wanted, cut = weights(whole / "checkpoint_3"), (*arguments, "batch_size_training=4")
    main(place, *cut, "name=grpo-alone-fsdp", "strategy=fsdp")
    for strategy in ("ddp", "fsdp"):
        together(place / "run.yaml", *cut, f"name=grpo-{strategy}", f"strategy={strategy}")
    for name in ("alone-fsdp", "ddp", "fsdp"):
        folder = place / "runs" / f"grpo-{name}"
        assert difference(weights(folder / "checkpoint_3"), wanted) < 1e-5
        assert logged_means(folder) == [pytest.approx(means, rel=1e-4) for means in logged_means(whole)]


def test_the_parts_of_the_method():
    parts = parts_of(Config(method="grpo"))
    assert (parts.model, parts.dataset, parts.on_device) == (Grpo, grpo.QuestionDataset, grpo.on_device)
    batch = {"a": 1}
    assert parts_of(Config()).on_device(None, batch) is batch
