"""Every key of every method changes the losses of a run, or is listed here as one that the method does not use."""

import dataclasses
from types import SimpleNamespace

import pytest
from conftest import ROOT, keys, last_of_each, lines_of, main
from plain import ids, make_examples
from test_coconut import END, EOS, LATENT, START
from transformers import AutoTokenizer

import config as config_module
import curriculum
import methods
import run
from config import Config
from curriculum import Markers, prompt, stage_of_example
from dataset import StageDataset
from preprocessing.tokens import tokenize
from trainer import step_log
from trainer.data import load_data
from trainer.pretrained import parts_of
from utils import UserError

MARKERS = Markers(START, LATENT, END, EOS)


def make_dataset(config: Config, n_steps: list[int], epoch: int | None = 0) -> tuple[StageDataset, list[dict]]:
    """The method's dataset of examples with these numbers of steps, and the examples."""

    def tokenizer(texts, **_):
        rows = [ids(text) for text in texts]
        return {"input_ids": rows, "special_tokens_mask": [[0] * len(row) for row in rows]}

    examples = make_examples(n_steps)
    tokens = tokenize(examples, tokenizer)
    if (texts := config.rules.texts(config)) is not None:
        others = [{**example, "steps": texts.steps(example["steps"])} for example in examples]
        tokens.auxiliary = tokenize(others, tokenizer, step_separator="")
        tokens.answer_prefix = ids("### ")
    return parts_of(config).dataset(tokens, config, MARKERS, epoch), examples


def stages_of(config: Config, examples: list[dict], stage: int) -> list[int]:
    """The stages at which the examples are trained in epoch 0, at this scheduled stage."""
    return [stage_of_example(config, stage, 0, index, len(each["steps"])) for index, each in enumerate(examples)]


BASE = keys("""
    debug=true wandb=disabled log_every_steps=1 max_train_examples=16 max_eval_examples=1 max_new_tokens=1
    batch_size_training=4 num_epochs=4 epochs_per_stage=1 max_latent_stage=2 c_thought=2 uniform_prob=0
    reset_optimizer=never position_range=64 seed=1
""")
# another value of each key that affects the trained weights
OTHER_VALUES = dict(
    argument.split("=")
    for argument in keys("""
    seed=2 from_scratch=true resume=1 max_train_examples=12 max_train_tokens=30 group_by_length=true step_separator=
    thought=normalised c_thought=3 max_latent_stage=1 pad_latent_to_max=false latent_markers=none
    curriculum=none epochs_per_stage=2 uniform_prob=1.0 advance_at=0 advance_after=2
    num_epochs=5 batch_size_training=8 gradient_accumulation_steps=2 global_batch_size=8 bf16=true bf16_weights=true
    lr=0.01 weight_decay=0.5 lr_scheduler=cosine warmup_steps=4 max_grad_norm=0.01 reset_optimizer=epoch
    lora_rank=2 lora_alpha=8 lora_dropout=0.5
    icot_tokens_per_epoch=1 icot_remove_all_after=6 icot_smoothing=0.5
    distillation=20 distilled_layers=all latent_labels=1 latent_passes=1 positions=offset position_range=32
    step_decoder=copy step_decoder_weight=9 step_decoder_reduction=mean step_decoder_surplus=none
    temperature=0.2 thought_noise=1.0 group_size=3 advantage=std
    """)
) | {"reward": str(ROOT / "tests" / "own_reward.py")}
# keys without which the other value has no effect
NEEDED = {
    "pad_latent_to_max": ("curriculum=none", "max_latent_stage=6"),  # more than examples have steps
    "step_decoder_surplus": ("curriculum=none", "max_latent_stage=6"),
    "advance_at": ("epochs_per_stage=2",),
    "advance_after": ("advance_at=0", "epochs_per_stage=3"),
    "lora_alpha": ("lora_rank=2",),
    "lora_dropout": ("lora_rank=2",),
}
NOT_FREE = {field.name for field in dataclasses.fields(Config) if not field.metadata["free"]}

# other methods that use a method's own key
ALSO_USED_BY = {"distillation": {"pccot"}, "latent_passes": {"lotus", "sim_cot", "pccot", "multi_mode"}}
OWN_KEYS = {
    key: sorted({name} | ALSO_USED_BY.get(key, set()))
    for name, rules in methods.all_rules().items()
    for key, _, _ in methods.own_keys(rules)
}
ONLY_IN_EVALUATION = {"mode", "stop_threshold"}
# core keys that a method does not use, or rejects
LATENTS = {"thought", "c_thought", "pad_latent_to_max", "latent_markers"}
STAGES = {"epochs_per_stage", "curriculum", "advance_at", "advance_after", "uniform_prob"}
SAMPLES = {"temperature", "thought_noise"}  # used by grpo alone
UNUSED = {
    "cot": LATENTS | {"epochs_per_stage", "curriculum", "uniform_prob", "max_latent_stage"},
    "no_cot": LATENTS | {"epochs_per_stage", "curriculum", "uniform_prob", "max_latent_stage", "step_separator"},
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


@pytest.mark.parametrize("name", methods.names())
def test_each_public_function_of_a_method_replaces_something(name):
    """A misspelt name would be ignored."""
    replaceable = {name for name, value in vars(curriculum).items() if hasattr(value, "paper")}
    own = {name for name, value in vars(methods.rules_of(name)).items() if isinstance(value, staticmethod)}
    assert {name for name in own if not name.startswith("_")} <= {*vars(methods.Method), *replaceable}


def test_a_methods_own_model_is_evaluated(monkeypatch):
    """An eval-only run took a plain Coconut for every method, without the weights that a method adds."""
    config = Config(method="lotus", only_eval=True)
    assert not issubclass(parts_of(config).model, methods.implementation("lotus").MODEL)
    monkeypatch.setattr(methods.rules_of("lotus"), "evaluates_as_coconut", False)
    assert issubclass(parts_of(config).model, methods.implementation("lotus").MODEL)


def test_a_method_cannot_change_the_default_of_another_key(monkeypatch):
    rules = type("Method", (methods.Method,), {"__annotations__": {"lr": "float"}, "lr": methods.key(0.1, "a rate")})
    monkeypatch.setattr(methods, "all_rules", lambda: {"own": rules})
    with pytest.raises(TypeError, match="defines the key lr, which exists already"):
        config_module._with_keys_of_methods(type("Config", (), {"__annotations__": {"lr": "float"}}))


# a method's own key -> whether its value under other methods is refused under this one, where it would mean coconut
SWITCHES = {
    ("sim_cot", "step_decoder"): True,
    ("random_positions", "positions"): True,
    ("parallel_latents", "latent_passes"): True,
    ("lotus", "latent_labels"): False,  # 0: without labels
    ("pccot", "distilled_layers"): False,  # all: those of CODI
    ("stopping", "stop_threshold"): False,  # 1: never
}


def test_a_method_that_its_own_key_switches_off_is_refused():
    """Bugs: SIM-CoT without a decoder trained one, plain random positions were spaced, and sequential parallel latents
    ended in a traceback after stage 0."""
    found = {
        (name, key): (default, rules.defaults[key])
        for name, rules in methods.all_rules().items()
        for key, default in ((key, field.default) for key, _, field in methods.own_keys(rules))
        if rules.defaults.get(key, default) != default
    }
    assert found.keys() == SWITCHES.keys()
    for (name, key), (off, on) in found.items():
        refused = [
            any("method coconut" in text for text in Config(method=name, **{key: value}).problems(needs_files=False))
            for value in (off, on)
        ]
        assert refused == [SWITCHES[name, key], False]


def test_means_are_over_all_ranks_which_measure_what_they_have(monkeypatch):
    """Bug: a rank without a measure skipped the collective, and the others waited for it."""
    of_ranks = [{}, {"reward": (3.0, 4), "norm": (1.0, 1)}, {"norm": (2.0, 1), "reward": (1.0, 4), "empty": (0.0, 0)}]
    monkeypatch.setattr(step_log.ranks, "on_every_rank", lambda world, action: of_ranks)
    assert step_log._means(SimpleNamespace(world=None, measured={})) == {"reward": 0.5, "norm": 1.5}


@pytest.fixture(scope="module")
def losses(place):
    """A function that returns the losses which a short run logs, of its steps and its epochs."""
    known = {}

    def of(*arguments: str) -> list[tuple]:
        if arguments not in known:
            folder = main(place, *BASE, *arguments, f"name=keys-{len(known)}")
            records = lines_of(folder / "metrics.jsonl")
            known[arguments] = [(record.get("loss"), record.get("auxiliary_loss")) for record in records]
        return known[arguments]

    return of


def has_effect(losses, method: str, key: str) -> bool:
    """Whether the key's other value changes the losses of a run; False if the configuration is rejected."""
    arguments = (f"method={method}", *NEEDED.get(key, ()))
    try:
        return losses(*arguments) != losses(*arguments, f"{key}={OTHER_VALUES[key]}")
    except UserError:
        return False


def test_every_key_that_affects_the_weights_has_another_value_here():
    assert OTHER_VALUES.keys() | {"method", "tf32"} == NOT_FREE  # tf32 needs a GPU


@pytest.mark.parametrize(
    ("method", "key"), [(m, key) for key, used_by in OWN_KEYS.items() if key not in ONLY_IN_EVALUATION for m in used_by]
)
def test_every_key_of_a_method_has_an_effect(losses, method, key):
    """The weights of CODI's and SIM-CoT's losses could be ignored."""
    assert has_effect(losses, method, key)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.names())
def test_every_key_of_the_core_has_an_effect_where_it_is_used(losses, method):
    core_keys = OTHER_VALUES.keys() - OWN_KEYS.keys()
    unused = UNUSED.get(method, set()) | (SAMPLES if method != "grpo" else set())
    assert {key for key in core_keys if not has_effect(losses, method, key)} == unused


@pytest.mark.parametrize("method", [name for name in methods.names() if Config(method=name).rules.texts(Config())])
def test_auxiliary_texts_belong_to_the_examples_that_are_kept(place, world, method):
    arguments = last_of_each(*BASE, f"method={method}", "max_train_examples=99", "max_train_tokens=30")
    config = Config.from_file(place / "run.yaml", arguments)
    train = load_data(config, world, AutoTokenizer.from_pretrained(place / "model")).train
    assert 0 < len(train) < 99
    for (question, _, answer), (same_question, _, same_answer) in zip(train, train.auxiliary, strict=True):
        assert (question, answer) == (same_question, same_answer)


@pytest.mark.parametrize("method", methods.names())
def test_everything_with_a_gradient_is_trained(place, method, monkeypatch):
    """SIM-CoT's decoder could be missing in the optimizer."""
    weights = []

    def recording(function):
        def called(this_run, *arguments):
            parameters = this_run.model.named_parameters()
            weights.append({name: value.detach().clone() for name, value in parameters if value.requires_grad})
            return function(this_run, *arguments)

        return called

    monkeypatch.setattr(run, "resume", recording(run.resume))
    monkeypatch.setattr(run, "finish", recording(run.finish))
    thought = ["thought=projected"] if methods.rules_of(method).has_latents and method != "stopping" else []
    main(place, *BASE, "num_epochs=2", f"method={method}", *thought, f"name=trained-{method}")
    before, after = weights
    assert before.keys() == after.keys()
    assert ("thought.weight" in before) == bool(thought)
    assert any("step_decoder" in name for name in before) == (method == "sim_cot")
    assert [name for name, value in before.items() if value.equal(after[name])] == []


def test_every_method_has_losses_of_its_own(losses):
    by_method = [losses(f"method={method}", "c_thought=2") for method in methods.names()]
    assert all(found not in by_method[:index] for index, found in enumerate(by_method))


def test_the_mode_decides_the_prompt():
    configs = [Config(method="multi_mode", mode=mode) for mode in ("latent", "written", "direct")]
    prompts = [prompt([7, 8], [[9], [10]], 1, config, MARKERS) for config in configs]
    assert prompts == [[7, 8, START, LATENT], [7, 8, START], [7, 8, END]]
