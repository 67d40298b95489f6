"""Sampled thoughts and answers equal a plain definition token by token, for any batch and ranks; pass@k; vote."""

import json
from collections import Counter
from functools import partial
from itertools import combinations
from math import comb

import numpy as np
import plain
import pytest
import torch
from conftest import keys, main, read_json, refusal, refuses, tiny_base, together
from family_table import tiny_model
from test_coconut import END, EOS, LATENT, START, make_model, prompts
from test_evaluate import scripted
from test_generate import folders as folders  # a fixture
from test_methods import MARKERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coconut import Coconut
from config import Config
from curriculum import prompt
from model.backbone import Backbone
from preprocessing.tokens import tokenize
from tools import generate as generate_tool
from trainer import evaluate as evaluate_module
from trainer import samples
from trainer.data import Data
from trainer.distributed import World
from trainer.evaluate import evaluate, summary, wilson
from trainer.pretrained import make_model as configured
from trainer.samples import Policy, choose, generate, pass_at_k, sampled_from, vote

# --- Measures ---


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / comb(n, k), abs=1e-12)


def test_pass_at_k_of_large_and_of_too_few_samples():
    assert pass_at_k(4000, 1, 1000) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples, not 4"):
        pass_at_k(4, 1, 5)


def test_the_vote_is_the_most_frequent_answer_and_the_first_of_a_tie():
    assert vote(["a", "b", "b", "c"]) == 1
    assert vote(["c", "a", "b", "b", "a"]) == 1
    assert vote([None, 7.0, 7.0]) == 1


def test_measures_have_no_k_above_the_number_of_samples():
    assert list(samples.measures([[True, False, False]], [True])) == ["vote@3", "pass@1", "pass@3"]
    found = samples.measures([[True] * 5 + [False] * 15, [False] * 20], [False, False])
    assert list(found) == ["vote@20", "pass@1", "pass@4", "pass@16", "pass@20"]
    assert found["pass@1"] == 0.125
    assert found["pass@4"] == pytest.approx((1 - comb(15, 4) / comb(20, 4)) / 2)


# --- Draws ---


def test_tokens_are_drawn_from_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, -30.0, 0.0], dtype=torch.float64)
    for temperature in (0.5, 1.0, 3.0):
        wanted = (logits / temperature).softmax(-1)
        uniform = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)[:, None]
        tokens, entropies = choose(sampled_from(logits.expand(10_000, 1, 5), temperature, None), uniform)
        shares = torch.bincount(tokens.flatten(), minlength=5) / 10_000
        assert (shares - wanted).abs().max() < 2e-4
        assert entropies[0].item() == pytest.approx(-(wanted * wanted.log()).sum().item(), abs=1e-12)
    tokens, entropies = choose(sampled_from(logits.expand(2, 1, 5), 0, 2), torch.tensor([[0.0], [0.999]]))
    assert tokens.tolist() == [[2], [2]]  # greedy decoding, whatever the likeliest token is
    assert not entropies.any()
    found = sampled_from(logits, 1.0, 2).softmax(-1)
    assert found[2] == 0
    assert (found[0] / found[4]).item() == pytest.approx(np.exp(0.3))


def test_a_uniform_number_rounded_to_one_draws_a_token_that_is_possible():
    logits = torch.randn(2000, 1, 50, generator=torch.Generator().manual_seed(0))
    logits[..., -1] = -torch.inf
    tokens, _ = choose(logits, torch.ones(2000, 1))
    assert tokens.max() < 49


class Float64Refused(TorchDispatchMode):
    """Refuses float64 results, as MPS does, except of torch.from_numpy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        dtypes = [leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert function is torch.ops.aten.lift_fresh.default or torch.float64 not in dtypes
        return result


@pytest.mark.parametrize("policy", [Policy(1.5), Policy(1.0, 0.5), Policy(1.0, dropout=0.2)], ids=str)
def test_samples_need_no_float64_on_mps(monkeypatch, policy):
    model, rows = make_model("gpt2").float(), prompts([3, 2])
    wanted = generate(model, rows, [(7, 1), (7, 2)], 3, policy, 6)
    assert samples._widest(torch.device("mps")) == torch.float32
    monkeypatch.setattr(samples, "_widest", lambda device: torch.float32)
    with Float64Refused():
        found = generate(model, rows, [(7, 1), (7, 2)], 3, policy, 6)
    assert found.tokens == wanted.tokens
    assert found.norms == pytest.approx(wanted.norms)


def random(key: tuple, stream: int) -> np.random.Generator:
    return np.random.default_rng((*key, stream))


def plainly(model, prompt: list[int], key: tuple, policy: Policy, n_new: int) -> list[int]:
    """The definition: one row alone, without padding or cache, recomputing everything for each token."""
    base, width = model.base_causallm, model.base_causallm.config.hidden_size
    eps = iter(torch.from_numpy(random(key, 1).standard_normal((prompt.count(LATENT), width))))

    def disturbed(thought: torch.Tensor) -> torch.Tensor:
        if str(policy.noise).startswith("absolute:"):
            return thought + float(policy.noise[9:]) * next(eps)
        return thought + policy.noise * thought.norm() / width**0.5 * next(eps)

    embeds, uniform, new = plain.filled(base, prompt, disturbed), random(key, 2).random(n_new), []
    while len(new) < min(n_new, 64 - len(prompt)) and EOS not in new:
        logits = plain.logits_after(base, embeds, new)
        if policy.temperature:
            logits[LATENT] = -torch.inf
            edges = (logits / policy.temperature).softmax(-1).cumsum(-1)
            new.append(int((edges < uniform[len(new)]).sum()))
        else:
            new.append(int(logits.argmax()))
    return new


POLICIES = [Policy(1.5), Policy(0, 2.0), Policy(0, "absolute:1.5"), Policy(1.0, 0.5), Policy()]


def test_the_entropy_is_that_of_the_new_tokens():
    """A row that has ended goes on with tokens that do not count."""
    model, rows, keys = make_model("gpt2"), [[5] * 58 + [START, LATENT, END], prompts([1])[0]], [(0, 0), (0, 1)]
    together = generate(model, rows, keys, 1, Policy(1.0), 9)
    alone = [generate(model, [row], [key], 1, Policy(1.0), 9) for row, key in zip(rows, keys, strict=True)]
    assert len({len(row) for row in together.tokens}) == 2
    assert together.entropy[0] == pytest.approx(sum(one.entropy[0] for one in alone))


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("n_latents", [[3, 3, 3], [2, 0, 4], [0, 0]])
def test_each_sample_equals_the_plain_definition(family, policy, n_latents):
    model, rows = make_model(family), prompts(n_latents)
    keys = [(7, 30 + index) for index in range(len(rows))]
    found = generate(model, rows, keys, 3, policy, max_new_tokens=6)
    wanted = [plainly(model, row, (*key, j), policy, 6) for row, key in zip(rows, keys, strict=True) for j in range(3)]
    assert found.tokens == wanted
    disturbed = policy.noise != 0 and any(n_latents)
    assert (len({tuple(row) for row in wanted}) > len(rows)) == bool(disturbed or policy.temperature)
    # and each alone
    alone = [generate(model, [row], [key], 3, policy, 6).tokens for row, key in zip(rows, keys, strict=True)]
    assert [new for of_one in alone for new in of_one] == wanted
    assert found.entropy[1] == sum(map(len, wanted))
    assert found.norms[1] == 3 * sum(n_latents)


@torch.no_grad()
def test_the_cache_of_a_sliding_window_is_forked_too():
    model, rows = make_model("mistral"), prompts([2, 0, 4])
    keys = [(1, index) for index in range(3)]
    found = generate(model, rows, keys, 2, Policy(1.0, 0.5), max_new_tokens=5)
    wanted = [
        plainly(model, r, (*key, j), Policy(1.0, 0.5), 5) for r, key in zip(rows, keys, strict=True) for j in (0, 1)
    ]
    assert found.tokens == wanted


@torch.no_grad()
@pytest.mark.parametrize("thought", ["layer:0.5", "last+suppressed"])
def test_thoughts_from_layers_take_noise(family, thought):
    """Bug: the first pass ran once for all samples, and recorded one row where there were several."""
    model, rows, keys = make_model(family, thought=thought), prompts([2, 0, 4]), [(1, index) for index in range(3)]
    found = generate(model, rows, keys, 3, Policy(1.0, 0.5), max_new_tokens=5).tokens
    assert found[::3] == generate(model, rows, keys, 1, Policy(1.0, 0.5), max_new_tokens=5).tokens


@torch.no_grad()
@pytest.mark.parametrize("policy", [Policy(), Policy(0, 0.5)], ids=str)
def test_recurrent_states_beside_keys_and_values_are_not_forked(policy):
    """Bug: falcon_h1 has both in each layer, and its cache was forked without the recurrent states."""
    model = Coconut(tiny_model("falcon_h1"), LATENT, START, END, EOS).eval()
    rows, keys = prompts([2, 0, 4]), [(1, index) for index in range(3)]
    found = generate(model, rows, keys, 2, policy, max_new_tokens=5).tokens
    assert found[::2] == generate(model, rows, keys, 1, policy, max_new_tokens=5).tokens


@pytest.mark.parametrize("keys", [{"latent_passes": "2"}, {"thought": "projected"}, {"method": "cot"}])
def test_tokens_are_sampled_with_any_thoughts(family, keys):
    """With temperature 0 a sample is what the model generates greedily."""
    model = configured(Config(**keys), tiny_base(family), MARKERS).eval()
    rows = prompts([0, 0] if keys == {"method": "cot"} else [3, 3])
    greedy = [model.generate(torch.tensor([row]), max_new_tokens=5)[0].tolist() for row in rows]
    found = generate(model, rows, [(0, 0), (0, 1)], 2, Policy(), 5).tokens
    assert found == [greedy[0], greedy[0], greedy[1], greedy[1]]
    hot = generate(model, rows, [(0, 0), (0, 1)], 8, Policy(2.0), 5).tokens
    assert len({tuple(row) for row in hot}) > 8


@pytest.mark.parametrize(
    ("policy", "widths"), [(Policy(1.0), [2] * 4), (Policy(1.0, 0.3), [2, 6, 6, 6]), (Policy(0, 0, 0.1), [6] * 4)]
)
def test_questions_run_once_and_without_noise_thoughts_too(monkeypatch, policy, widths):
    model, seen, original = make_model("gpt2"), [], Backbone.span
    monkeypatch.setattr(Backbone, "span", lambda self, e, *a, **k: seen.append(len(e)) or original(self, e, *a, **k))
    generate(model, prompts([3, 3]), [(0, 0), (0, 1)], 3, policy, 1)
    assert seen == widths


@torch.no_grad()
def test_dropout_acts_on_the_residual_branches_before_the_last_latent():
    """Compared with GPT-2's own residual dropout modules, with the masks drawn from the key."""
    model, rows, share = make_model("gpt2"), prompts([3, 1, 0]), 0.6
    keys = [(3, index) for index in range(3)]
    found = generate(model, rows, keys, 2, Policy(0, 0, share), 6).tokens
    assert "span" not in vars(model.backbone)
    greedy = [plainly(model, row, key, Policy(), 6) for row, key in zip(rows, keys, strict=True)]

    class Masked(torch.nn.Module):
        def __init__(self, masks):
            super().__init__()
            self.masks = masks  # (last latent's position, D)

        def forward(self, states):
            kept = torch.ones_like(states)
            n = min(len(self.masks), states.shape[1])
            kept[:, :n] = torch.from_numpy(self.masks[:n] / (1 - share))
            return states * kept

    for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
        last = max((column for column, token in enumerate(row) if token == LATENT), default=0)
        for sample in (0, 1):
            masks = random((*key, sample), 3).random((last, 4, 32), dtype=np.float32) >= share
            for layer, block in enumerate(model.base_causallm.transformer.h):
                block.attn.resid_dropout = Masked(masks[:, 2 * layer])
                block.mlp.dropout = Masked(masks[:, 2 * layer + 1])
            assert found[2 * number + sample] == plainly(model, row, key, Policy(), 6)
    assert found[4] == found[5] == greedy[2]  # without latents there is no dropout
    assert found[:4] != [greedy[0], greedy[0], greedy[1], greedy[1]]


def test_rows_end_at_the_models_last_position():
    model = make_model("gpt2")
    rows = [[5] * 58 + [START, LATENT, END], prompts([1])[0]]
    found = generate(model, rows, [(0, 0), (0, 1)], 2, Policy(1.0), 9).tokens
    assert [len(row) for row in found[:2] if EOS not in row] == [3] * sum(EOS not in row for row in found[:2])
    assert found[2:] == generate(model, rows[1:], [(0, 1)], 2, Policy(1.0), 9).tokens


# --- Evaluation ---


def sampled(world, **keys):
    """A tiny model with random weights, examples of one letter, and a configuration."""
    config = Config(max_latent_stage=2, max_new_tokens=1, **keys)
    loaded = scripted({})
    loaded.model.__class__ = loaded.model.__class__.__bases__[0]  # Coconut itself
    torch.manual_seed(0)
    for parameter in loaded.model.parameters():
        parameter.data *= 1.5
    examples = [{"question": q, "steps": ["1"], "answer": a} for q, a in zip("123456+5", "12345671", strict=True)]
    return loaded, Data(examples, tokenize(examples, loaded.tokenizer)), config


def test_without_noise_all_samples_are_the_greedy_answer(world):
    loaded, data, config = sampled(world, val_samples=5)
    metrics, predictions = evaluate(loaded, data, 2, config, world)
    for prediction in predictions:
        assert prediction["sample_answers"] == [prediction["answer"]] * 5
        assert prediction["sample_correct"] == [prediction["correct"]] * 5
    assert {metrics[name] for name in ("vote@5", "pass@1", "pass@4", "pass@5")} == {metrics["accuracy"]}


def test_verdicts_and_measures_follow_from_the_samples(world):
    loaded, data, config = sampled(world, val_samples=20, temperature=2.0, thought_noise=0.3, eval_batch_size=40)
    for example, drawn in zip(data.val_examples, evaluate(loaded, data, 2, config, world)[1], strict=True):
        example["answer"] = drawn["sample_answers"][3]
    metrics, predictions = evaluate(loaded, data, 2, config, world)
    verdicts = [[answer == p["gold"] for answer in p["sample_answers"]] for p in predictions]
    assert verdicts == [p["sample_correct"] for p in predictions]
    assert 0 < sum(map(sum, verdicts)) < 160
    assert metrics["pass@1"] == pytest.approx(np.mean(verdicts))
    assert metrics["pass@20"] == np.mean([any(of_one) for of_one in verdicts])
    voted = [Counter(p["sample_answers"]).most_common(1)[0][0] == p["gold"] for p in predictions]
    assert metrics["vote@20"] == np.mean(voted)
    assert metrics["pass@20_95"] == wilson(metrics["pass@20"], 8)
    assert all("sample_answers" not in p for p in evaluate(loaded, data, 2, Config(max_new_tokens=1), world)[1])


def test_a_sample_does_not_depend_on_batch_or_rank(world):
    loaded, data, config = sampled(world, val_samples=3, temperature=1.0, thought_noise="absolute:0.4")
    loaded.model.double().eval()
    rows = [prompt(*data.val[index][:2], 2, config, loaded.markers) for index in range(8)]
    draw, shares = partial(evaluate_module.draw_samples, loaded, config), []
    for size, eval_batch_size in ((1, 32), (1, 1), (2, 6), (3, 32)):
        config.eval_batch_size, found = eval_batch_size, {}
        for rank in range(size):
            one = World(rank, 0, size, torch.device("cpu"))
            found |= evaluate_module._share_of_rank(draw, rows, max(eval_batch_size // 3, 1), config, one, "")
        shares.append(found)
    assert len(shares[0]) == 8
    assert all(share == shares[0] for share in shares)


def test_another_seed_draws_other_samples(world):
    drawn = []
    for seed in (0, 1):
        loaded, data, config = sampled(world, val_samples=3, temperature=2.0, seed=seed)
        rows = [prompt(*data.val[index][:2], 2, config, loaded.markers) for index in range(8)]
        drawn.append(evaluate_module.draw_samples(loaded, config, [*range(8)], rows))
    assert drawn[0] != drawn[1]


def test_the_vote_counts_numbers_if_answers_are_numbers(world, monkeypatch):
    loaded, data, config = sampled(world, val_samples=3, answer_match="number")
    data.val_examples[:] = data.val_examples[:1]
    monkeypatch.setattr(evaluate_module, "draw_samples", lambda *_: [["### 7", "### 1.0", "### 1"]])
    predictions = [{"index": 0, "gold": "1"}]
    found = evaluate_module._add_samples(predictions, [[5]], loaded, config, world, "")
    assert found["vote@3"] == 1
    assert predictions[0]["sample_correct"] == [False, True, True]


def test_the_table_has_a_line_for_each_measure(tmp_path):
    record = {"accuracy": 0.25, "examples": 8, "loss": 1.0, "generated_tokens": 3.0, "seconds": 1.0, "stage": 2}
    record |= {"vote@4": 0.5, "vote@4_95": [0.2, 0.8], "pass@1": 0.25, "pass@1_95": [0, 1], "pass@4": 1.0}
    lines = summary(tmp_path, record | {"file": "data/test.json"}).split("\n\n")[1].splitlines()
    assert lines == [
        "test, stage 2                         8                      95 %",
        "  accuracy                                  25.0%   7.1% to 59.1%",
        "  vote@4                                    50.0%  21.5% to 78.5%",
        "  pass@1                                    25.0%   7.1% to 59.1%",
        "  pass@4                                   100.0% 67.6% to 100.0%",
    ]
    several = summary(tmp_path, {"sets": {"a": record | {"accuracy_95": (0.1, 0.5)}}})
    assert several.count("pass@4") == 1


# --- Configuration and commands ---


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"thought": "pause", "thought_noise": 0.1}, "need latents and a thought other than pause"),
        ({"method": "cot", "thought_dropout": 0.1}, "need latents and a thought other than pause"),
        ({"latent_passes": "3", "thought_noise": 0.1}, "unset latent_passes"),
        ({"compile": True, "thought_dropout": 0.1}, "exclude each other"),
    ],
)
def test_noise_needs_thoughts_that_are_fed_back(keys, problem):
    assert problem in " ".join(Config(**keys).problems(needs_files=False))
    if "compile" not in keys and keys.get("method") != "cot":
        model = make_model("gpt2", thought=keys.get("thought", "last"))
        model.one_by_one = "latent_passes" not in keys
        refuses("one after the other", generate, model, prompts([2]), [(0,)], 2, Policy(0, 0.1), 2)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("thought_noise=-1", "thought_noise must be a number of at least 0, or absolute:NUMBER"),
        ("thought_noise=absolute", "thought_noise must be a number of at least 0, or absolute:NUMBER"),
        ("thought_noise=nan", "thought_noise must be a number of at least 0"),
        ("temperature=0.00001", r"temperature must be 0 \(greedy decoding\) or at least 0.001"),
        ("thought_dropout=1", "thought_dropout must be at most 0.99"),
        ("val_samples=-1", "val_samples must be at least 0"),
    ],
)
def test_invalid_values_are_rejected(place, key, problem):
    refuses(problem, Config.from_file, place / "run.yaml", [key])
    good = Config.from_file(place / "run.yaml", ["thought_noise=absolute:0.6", "temperature=0.7"])
    assert good.thought_noise == "absolute:0.6"


def test_a_family_without_a_cache_is_rejected():
    model = make_model("gpt2")
    model.backbone.recomputes = True
    refuses("model family gpt2 decodes without one", generate, model, prompts([2]), [(0,)], 2, Policy(), 2)


def test_the_command_prints_answers_with_their_counts(folders, capsys):
    hot = [str(folders["coconut"]), "3+4", "--samples", "8", "--temperature", "9", "--max-new-tokens", "2"]
    assert generate_tool.main(hot) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split()[0]) for line in lines]
    assert len(counts) > 1
    assert sum(counts) == 8
    assert counts == sorted(counts, reverse=True)
    assert generate_tool.main([*hot, "--json"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(found["samples"].values()) == counts
    assert generate_tool.main([*hot, "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines() != lines
    greedy = [str(folders["coconut"]), "3+4", "--samples", "4", "--temperature", "0", "--max-new-tokens", "2"]
    assert generate_tool.main(greedy) == 0
    assert capsys.readouterr().out.startswith("     4  ")
    assert generate_tool.main([*greedy, "--thought-noise", "absolute:3"]) == 0
    assert not capsys.readouterr().out.startswith("     4  ")
    assert "need thoughts" in refusal(
        generate_tool.main, [folders["cot"], "3+4", "--samples", "4", "--thought-noise", "1"], capsys
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--samples", "0"], "--samples must be from 1 to 100000"),
        (["--samples", "2", "--top-k", "3"], "--samples excludes"),
        (["--samples", "2", "--thought-noise", "much"], "--thought-noise must be a number of at least 0"),
        (["--temperature", "0"], "--temperature must be at least"),
        # bug: these were ignored
        (["--temperature", "2"], "--temperature needs --sample or --samples"),
        (["--seed", "2"], "--seed needs --sample or --samples"),
        (["--top-k", "2"], "--top-k needs --sample"),
        (["--top-p", "0.5"], "--top-p needs --sample"),
        (["--thought-noise", "0.5"], "--thought-noise needs --samples"),
        (["--sample", "--thought-noise", "0.5"], "--thought-noise needs --samples"),
    ],
)
def test_invalid_options_are_rejected(folders, options, problem, capsys):
    assert problem in refusal(generate_tool.main, [folders["coconut"], "3+4", *options], capsys)


@pytest.mark.slow
def test_two_ranks_draw_the_same_samples_as_one(place):
    small = keys("max_train_examples=16 max_new_tokens=6 num_epochs=3 batch_size_training=8")
    run = main(place, *small, "name=samples-model")
    only_eval = (*small, "only_eval=true", f"load_model_path={run}", f"val_path={place / 'valid.json'}")
    only_eval += keys("val_samples=4 temperature=0.8 thought_noise=0.2")
    alone = main(place, *only_eval, "name=samples-alone")
    together(place / "run.yaml", *only_eval, "name=samples-two")
    both = [alone, place / "runs" / "samples-two"]
    first, second = ((folder / "eval" / "predictions.jsonl").read_text() for folder in both)
    assert first == second
    metrics = [read_json(folder / "eval" / "metrics.json") for folder in both]
    assert metrics[0]["pass@4"] == metrics[1]["pass@4"] >= metrics[0]["pass@1"] > 0
