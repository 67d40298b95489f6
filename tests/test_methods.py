"""Every key of every method: another value gives other losses, or stands below as one that the method does not use."""

import dataclasses

import pytest
from conftest import ROOT, lines_of, main, settled
from plain import ids, make_examples
from test_coconut import END, EOS, LATENT, START
from transformers import AutoTokenizer

import methods
import run
from config import Config
from curriculum import Markers, prompt
from dataset import StageDataset
from preprocessing.tokens import tokenize
from trainer.data import load_data
from trainer.pretrained import parts_of
from utils import UserError

MARKERS = Markers(START, LATENT, END, EOS)


def make_dataset(config: Config, n_steps: list[int], epoch: int | None = 0) -> tuple[StageDataset, list[dict]]:
    """The method's dataset of examples with so many steps, and these."""

    def words(texts, **_):
        found = [ids(text) for text in texts]
        return {"input_ids": found, "special_tokens_mask": [[0] * len(each) for each in found]}

    examples = make_examples(n_steps)
    tokens = tokenize(examples, words)
    if (texts := config.rules.texts(config)) is not None:
        others = [{**example, "steps": texts.steps(example["steps"])} for example in examples]
        tokens.auxiliary = tokenize(others, words, step_separator="")
        tokens.answer_prefix = ids("### ")
    return parts_of(config).dataset(tokens, config, MARKERS, epoch), examples


# another value of each key that decides what the weights become, and what has to be set beside it
OTHERS = {
    **{"seed": "2", "thought": "normalised", "c_thought": "3", "max_latent_stage": "1", "epochs_per_stage": "2"},
    "curriculum": "none",
    "pad_latent_to_max": ("false", "curriculum=none", "max_latent_stage=6"),  # more than examples have steps
    **{"uniform_prob": "1.0", "advance_at": ("0", "epochs_per_stage=2"), "latent_markers": "none"},
    "advance_after": ("2", "advance_at=0", "epochs_per_stage=3"),
    **{"step_separator": "", "from_scratch": "true", "lora_rank": "2", "lora_alpha": ("8", "lora_rank=2")},
    **{"lora_dropout": ("0.5", "lora_rank=2"), "resume": "1", "max_train_examples": "12", "max_train_tokens": "30"},
    **{"group_by_length": "true", "num_epochs": "5", "batch_size_training": "8", "gradient_accumulation_steps": "2"},
    **{"global_batch_size": "8", "lr": "0.01", "weight_decay": "0.5", "lr_scheduler": "cosine", "warmup_steps": "4"},
    **{"max_grad_norm": "0.01", "reset_optimizer": "epoch", "bf16": "true", "bf16_weights": "true"},
    **{"icot_tokens_per_epoch": "1", "icot_remove_all_after": "6", "icot_smoothing": "0.5"},
    **{"distillation": "20", "distilled_layers": "all", "latent_labels": "1", "latent_passes": "1"},
    **{"positions": "offset", "position_range": "32"},
    **{"step_decoder": "copy", "step_decoder_weight": "9", "step_decoder_reduction": "mean"},
    **{"temperature": "0.2", "thought_noise": "1.0", "group_size": "3", "advantage": "std"},
    "reward": str(ROOT / "tests" / "own_reward.py"),
    "step_decoder_surplus": ("none", "curriculum=none", "max_latent_stage=6"),
}
BASE = (
    *("debug=true", "wandb=disabled", "max_train_examples=16", "max_eval_examples=1", "max_new_tokens=1"),
    *("log_every_steps=1", "batch_size_training=4", "uniform_prob=0", "max_latent_stage=2", "num_epochs=4"),
    *("epochs_per_stage=1", "c_thought=2", "seed=1", "reset_optimizer=never", "position_range=64"),
)
DECIDING = [field.name for field in dataclasses.fields(Config) if not field.metadata["free"]]


# under which methods a method's own keys count, beside the method itself
SHARED = {"distillation": {"pccot"}, "latent_passes": {"lotus", "sim_cot", "pccot", "multi_mode"}}
OWN = [
    (method, key)
    for name, rules in methods.all_rules().items()
    for key, _, _ in methods.own_keys(rules)
    for method in sorted({name} | SHARED.get(key, set()))
    if key not in ("mode", "stop_threshold")  # of evaluations
]
# core keys that a method does not use, or refuses
LATENTS = {"thought", "c_thought", "pad_latent_to_max", "latent_markers"}
STAGES = {"epochs_per_stage", "curriculum", "advance_at", "advance_after", "uniform_prob"}
UNUSED = {
    "cot": LATENTS | STAGES - {"advance_at", "advance_after"} | {"max_latent_stage"},
    "no_cot": LATENTS | STAGES - {"advance_at", "advance_after"} | {"max_latent_stage", "step_separator"},
    "no_thoughts": LATENTS,
    "icot": LATENTS | STAGES | {"max_latent_stage"},
    "codi": STAGES | {"pad_latent_to_max", "step_separator"},
    "pccot": STAGES | {"pad_latent_to_max", "step_separator"},
    "lotus": {"pad_latent_to_max"},
    "latents_by_steps": {"pad_latent_to_max"},
    "multi_mode": {"latent_markers"},
    "sim_cot": {"from_scratch"},
    "stopping": STAGES | {"pad_latent_to_max", "step_separator", "lora_rank", "lora_alpha", "lora_dropout"},
    "grpo": {"epochs_per_stage", "curriculum", "step_separator", "lora_dropout"},
}
OF_SAMPLES = {"temperature", "thought_noise"}  # used by grpo alone


@pytest.fixture(scope="module")
def losses(place):
    """The losses that a short run writes, of its steps and its epochs."""
    known = {}

    def of(*keys: str) -> list[tuple]:
        if keys not in known:
            folder = main(place, *BASE, *keys, f"name=keys-{len(known)}")
            records = lines_of(folder / "metrics.jsonl")
            known[keys] = [(record.get("loss"), record.get("auxiliary_loss")) for record in records]
        return known[keys]

    return of


def matters(losses, method: str, key: str) -> bool:
    value, *beside = (OTHERS[key],) if isinstance(OTHERS[key], str) else OTHERS[key]
    try:
        return losses(f"method={method}", *beside) != losses(f"method={method}", *beside, f"{key}={value}")
    except UserError:
        return False


def test_every_key_that_decides_the_weights_has_another_value_here():
    assert {*DECIDING} == {*OTHERS, "method", "tf32"}  # tf32 is of GPUs


@pytest.mark.parametrize(("method", "key"), OWN)
def test_every_key_of_a_method_has_an_effect(losses, method, key):
    """The weights of CODI's and SIM-CoT's losses could be ignored."""
    assert matters(losses, method, key)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.names())
def test_every_key_of_the_core_has_an_effect_where_it_is_used(losses, method):
    of_methods = {key for rules in methods.all_rules().values() for key, _, _ in methods.own_keys(rules)}
    core = OTHERS.keys() - of_methods
    unused = UNUSED.get(method, set()) | (OF_SAMPLES if method != "grpo" else set())
    assert {key for key in core if not matters(losses, method, key)} == unused


@pytest.mark.parametrize("method", [name for name in methods.names() if Config(method=name).rules.texts(Config())])
def test_other_texts_are_those_of_the_examples_that_are_not_left_out(place, world, method):
    keys = settled(*BASE, f"method={method}", "max_train_examples=99", "max_train_tokens=30")
    config = Config.from_file(place / "run.yaml", keys)
    train = load_data(config, world, AutoTokenizer.from_pretrained(place / "model")).train
    assert 0 < len(train) < 99
    for (question, _, answer), (other_question, _, other_answer) in zip(train, train.auxiliary, strict=True):
        assert (question, answer) == (other_question, other_answer)


@pytest.mark.parametrize("method", methods.names())
def test_everything_with_a_gradient_is_trained(place, method, monkeypatch):
    """SIM-CoT's decoder could be missing in the optimizer."""
    seen = []

    def noting(function):
        def called(one, *arguments):
            parameters = one.model.named_parameters()
            seen.append({name: value.detach().clone() for name, value in parameters if value.requires_grad})
            return function(one, *arguments)

        return called

    monkeypatch.setattr(run, "resume", noting(run.resume))
    monkeypatch.setattr(run, "finish", noting(run.finish))
    thought = ["thought=projected"] if methods.rules_of(method).has_latents and method != "stopping" else []
    main(place, *BASE, "num_epochs=2", f"method={method}", *thought, f"name=trained-{method}")
    before, after = seen
    assert before.keys() == after.keys()
    assert ("thought.weight" in before, "step_decoder" in str(list(before))) == (bool(thought), method == "sim_cot")
    assert [name for name, value in before.items() if value.equal(after[name])] == []


def test_every_method_has_losses_of_its_own(losses):
    found = [losses(f"method={method}", "c_thought=2") for method in methods.names()]
    assert all(one not in found[:number] for number, one in enumerate(found))


def test_the_mode_decides_what_is_asked():
    configs = [Config(method="multi_mode", mode=mode) for mode in ("latent", "written", "direct")]
    found = [prompt([7, 8], [[9], [10]], 1, config, MARKERS) for config in configs]
    assert found == [[7, 8, START, LATENT], [7, 8, START], [7, 8, END]]
