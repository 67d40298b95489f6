"""Model families: each equals the plain definition, or check_family raises an error with the reason."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import family_table as table
import pytest
import torch
from conftest import distance, equal, raising, refuses
from family_table import QUICK, REFUSED, WITH_LATENTS, tiny_model
from test_coconut import END, EOS, LATENT, START, batch_of
from test_coconut import make_rows as rows_of
from test_pretrained import write_tiny
from transformers import AutoModelForCausalLM, PreTrainedConfig

import definition
from coconut import Coconut
from config import Config
from dataset import collate_prompts
from model import backbone, kv_cache
from trainer import check_family as families
from trainer.check_family import check_family
from trainer.parallel import wrap, wrap_blocks
from trainer.pretrained import load_model
from trainer.throughput import FlopCounter
from utils import UserError


def make_model(base, latent: int | None = LATENT, thought: str = "last") -> Coconut:
    return Coconut(base, latent, START, END, EOS, thought=thought).eval()


make_rows = partial(rows_of, end=30)


def plain_logits(model: Coconut, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """Returns logits (T, V) by definition. A generated latent token is fed as a token, not as a thought."""
    base = model.base_causallm
    embeds = definition.filled_embeddings(base, prompt, model.latent_token_id)
    new = base.get_input_embeddings()(torch.tensor([generated], dtype=torch.int64))
    return base(inputs_embeds=torch.cat([embeds, new], dim=1), use_cache=False).logits[0]


def gradients(model: Coconut, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients of all parameters that the loss depends on."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def check_training(model: Coconut, n_latents: list[int], tolerance: float) -> None:
    """Compares the loss and every gradient with the plain definition."""
    rows = make_rows(n_latents)
    loss = model(**batch_of(rows)).loss
    wanted_loss = definition.loss(model.base_causallm, rows, model.latent_token_id)
    assert abs(loss - wanted_loss) < tolerance * wanted_loss
    found, wanted = gradients(model, loss), gradients(model, wanted_loss)
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < tolerance * largest, name


@torch.no_grad()
def check_generation(model: Coconut, n_latents: list[int], new: int = 4) -> None:
    """Compares a generated batch with rows that are generated alone and recomputed for each token."""
    prompts = [row[: row.index(END) + 1] for row, _ in make_rows(n_latents)]
    together = model.generate(**collate_prompts(prompts, EOS), max_new_tokens=new)
    for prompt, found in zip(prompts, together.tolist(), strict=True):
        tokens: list[int] = []
        while len(tokens) < new and tokens[-1:] != [EOS]:
            tokens.append(int(plain_logits(model, prompt, tokens)[-1].argmax()))
        assert found == tokens + [EOS] * (len(found) - len(tokens))


@pytest.mark.parametrize(
    "family",
    [family if family in QUICK else pytest.param(family, marks=pytest.mark.families) for family in table.FAMILIES],
)
def test_a_family_equals_the_definition_or_raises_an_error(family):
    base = tiny_model(family)
    if family in REFUSED:
        for latent in (None, LATENT):
            with pytest.raises(UserError, match=f"{base.config.model_type} .*{table.BY_ANY_METHOD}.*{REFUSED[family]}"):
                check_family(make_model(base, latent))
        return
    without, model, n_latents = make_model(base, None), make_model(base), [2, 0, 3]
    check_family(without)
    FlopCounter.of(model)
    if family in table.REFUSED_WITH_LATENTS:
        reason = f"{WITH_LATENTS}.*{table.REFUSED_WITH_LATENTS[family]}.* cot, no_cot, no_thoughts and icot"
        refuses(reason, check_family, model)
        check_family(make_model(base, thought="pause"))
        model, n_latents = without, [0, 0, 0]
    else:
        check_family(model)
    tolerance = 1e-5 if table.dtype_of(family) == torch.float64 else 1e-4
    check_training(model, n_latents, tolerance)
    check_generation(model, n_latents)
    wrap_blocks(model, Config())  # deferred weight gradients
    check_training(model, n_latents, tolerance)


# --- check_family ---


@pytest.fixture(params=[False, True], ids=["small", "full size"])
def full_size(request, monkeypatch) -> None:
    """check_family compares with larger weights, as of a small model, or with the model's own."""
    if request.param:
        monkeypatch.setattr(families, "SMALL", 0)


def test_a_head_that_changes_the_logits_is_refused_for_any_method():
    """Otherwise training would minimise another loss unnoticed: generation only needs the order of the logits."""
    for change in (lambda logits: 1.01 * logits, lambda logits: 30 * torch.tanh(logits / 30)):
        base = tiny_model("llama", torch.float32)
        forward = base.forward

        def changed(*args, forward=forward, change=change, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

        base.forward = changed
        refuses(f"{table.BY_ANY_METHOD}{table.HEAD}", check_family, make_model(base, latent=None))


def test_the_whole_head_module_runs():
    """Dory's LM head is a matrix and a scale for each token: the loss must not use the matrix alone."""
    model = make_model(tiny_model("dory"))
    with torch.no_grad():
        model.base_causallm.lm_head.logit_scale.mul_(torch.linspace(0.5, 2, 40))
    check_training(model, [2, 0, 3], 1e-5)


@pytest.mark.usefixtures("full_size")
@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        ("gradients", f"{WITH_LATENTS}over a cache its gradients"),
        ("states", f"{WITH_LATENTS}its logits over a cache"),
        ("padding", f"{WITH_LATENTS}{table.PADDING}"),
        ("raises", f"{table.BY_ANY_METHOD}{table.NO_EMBEDDINGS} .RuntimeError: strange.$"),
    ],
)
def test_each_error_is_detected(breaks, sentence, monkeypatch):
    base = tiny_model("llama", torch.float32)
    update, mask = kv_cache.GrowingLayer.update, backbone.causal_mask
    cut = lambda self, keys, values, *_, **__: update(self, keys.detach(), values.detach())  # noqa: E731
    shrunk = lambda self, keys, values, *_, **__: update(self, 0.9 * keys, 0.9 * values)  # noqa: E731
    module, name, broken = {
        "gradients": (kv_cache.GrowingLayer, "update", cut),
        "states": (kv_cache.GrowingLayer, "update", shrunk),
        "padding": (backbone, "causal_mask", lambda seen, *rest: mask(torch.ones_like(seen), *rest)),
        "raises": (type(base), "forward", raising(RuntimeError("strange\nnews"))),
    }[breaks]
    monkeypatch.setattr(module, name, broken)
    refuses(sentence, check_family, make_model(base))


@pytest.mark.usefixtures("full_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral", "gemma3_text", "qwen3_5"])
def test_a_right_model_passes_in_every_size_and_dtype(family, dtype):
    check_family(make_model(tiny_model(family, dtype)))


@pytest.mark.usefixtures("full_size")
def test_check_family_does_not_change_the_model():
    model = Coconut(tiny_model("gpt2"), LATENT, START, END, EOS, thought="projected").train()
    model.base_causallm.transformer.wpe.weight.requires_grad_(False)
    model.base_causallm.transformer.h[1].eval()
    torch.manual_seed(5)

    def state() -> tuple:
        parameters = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        return parameters, [module.training for module in model.modules()], torch.get_rng_state().tolist()

    before, weights = state(), copy.deepcopy(model.state_dict())
    check_family(model)
    assert state() == before
    assert equal(model.state_dict(), weights)


def test_weights_that_are_not_finite_do_not_fail_the_family():
    """The training names the step where they appear."""
    base = tiny_model("gpt2")
    with torch.no_grad():
        base.transformer.wte.weight[7] = float("nan")
    check_family(make_model(base))
    assert base.transformer.wte.weight[7].isnan().all()


def test_small_errors_are_detected():
    """A bidirectional model has a loss too, of tokens that it has seen. At initialisation Mamba's states hardly matter:
    without them the loss differs by 1e-5."""
    model = make_model(tiny_model("bert-generation", is_decoder=False), None)
    refuses(f"{table.BY_ANY_METHOD}its logits at a token depend on later tokens", check_family, model)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(table.configure("mamba"))
    refuses(WITH_LATENTS, check_family, make_model(base))


def test_generation_without_a_cache_equals_generation_with_one(monkeypatch):
    model = make_model(tiny_model("llama"))
    batch = collate_prompts([[5, 6, 7, START, END], [8, END]], EOS)
    wanted = model.generate(**batch, max_new_tokens=6)
    model.backbone.recomputes = True
    monkeypatch.setattr(backbone, "make_cache", None)
    assert torch.equal(model.generate(**batch, max_new_tokens=6), wanted)
    model.eos_token_id = int(wanted[1, 0])
    found = model.generate(**batch, max_new_tokens=6)
    assert found[1].unique().tolist() == [model.eos_token_id]
    assert model.generate(**batch, max_new_tokens=0).shape == (2, 0)


def test_thoughts_from_layers_need_blocks_that_run_once():
    base = tiny_model("hrm_text")
    check_family(make_model(base))
    sentence = f"{WITH_LATENTS}thoughts from the layers need blocks that each run once"
    refuses(sentence, check_family, make_model(base, thought="suppressed"))
    check_family(make_model(tiny_model("llama"), thought="suppressed"))
    check_family(make_model(tiny_model("zamba2"), thought="suppressed"))  # whose blocks hold blocks


def save_with_tokenizer(family: str, folder) -> str:
    write_tiny(folder)
    AutoModelForCausalLM.from_config(table.configure(family, vocab_size=60)).save_pretrained(folder)
    return str(folder)


def test_loading_checks_the_family(tmp_path):
    folder = save_with_tokenizer("jamba", tmp_path / "jamba")
    refuses(f"the model family jamba .*{WITH_LATENTS}", load_model, Config(model_id=folder, method="coconut"), None)
    for method in ("cot", "no_cot", "icot", "no_thoughts"):
        load_model(Config(model_id=folder, method=method), None)
    load_model(Config(model_id=folder, method="coconut", thought="pause"), None)
    folder = save_with_tokenizer("gemma3n_text", tmp_path / "gemma")
    refuses(table.BY_ANY_METHOD, load_model, Config(model_id=folder, method="cot"), None)


# --- peculiarities of families ---


@pytest.mark.parametrize("family", ["gemma3", "mllama"])
def test_parameters_without_gradients_do_not_stop_ddp(family, world):
    """In its second step DDP would wait for the gradients of a vision tower or of layers that only images use."""
    model = make_model(tiny_model(family))
    check_family(model)
    assert model.backbone.leaves_parameters_out == (family == "mllama")
    wrapped = wrap(model, replace(world, size=2))
    for _ in range(3):
        wrapped(**batch_of(make_rows([2, 0, 3]))).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("language_model" in name or "model.layers" in name for name in trained)
    assert not any("vision" in name or "cross_attn" in name for name in trained)


NAMES = ("n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length", "max_target_positions")


@pytest.mark.parametrize("values", [*({name: 64} for name in NAMES), {"attn_config": {"max_seq_len": 64}}])
def test_max_positions_reads_every_familys_key(values):
    """Regression: a sequence too long for MPT ended in a RuntimeError about sizes, in training or generation."""
    assert backbone._max_positions(PreTrainedConfig(**values)) == 64
    assert backbone._max_positions(PreTrainedConfig(**values, max_position_embeddings=32)) == 32
    assert backbone._max_positions(PreTrainedConfig(max_position_embeddings=-1)) is None  # XLNet's value for "no limit"


@pytest.mark.parametrize(
    ("family", "longest"), [("mpt", 64), ("codegen", 64), ("bloom", None), ("mamba2", None), ("gemma3", 64)]
)
def test_a_sequence_may_have_max_positions_tokens(family, longest):
    model = make_model(tiny_model(family), latent=None)
    assert model.max_positions == longest
    model.states(torch.full((1, longest or 200), 7), torch.ones(1, longest or 200, dtype=torch.long))


@pytest.mark.parametrize("family", sorted({*REFUSED, *table.REFUSED_WITH_LATENTS, "mamba2", "qwen3_5"} & {*QUICK}))
def test_flops_are_counted_for_every_family_and_recurrent_layers_have_no_pairs(family):
    counter = FlopCounter.of(make_model(tiny_model(family)))
    assert counter.training([10, 5], 4) > 0
    # one layer of two has attention, in which 4 heads of 8 numbers each are multiplied twice
    pairs = {"mamba2": 0, "qwen3_5": 4 * 4 * 8}
    assert counter.per_pair == pairs.get(family, counter.per_pair)


@pytest.mark.parametrize("key", ["gradient_checkpointing", "compile"])
def test_blocks_are_found_or_an_error_names_the_key(monkeypatch, key):
    model, config = make_model(tiny_model("biogpt")), Config(**{key: True})  # does not name its blocks
    if key == "gradient_checkpointing":
        wrap_blocks(model, config)
        check_training(model, [0, 0, 0], 1e-5)
    monkeypatch.setattr("trainer.parallel.decoder_blocks", lambda _: [])
    refuses(f"{key} works on decoder blocks, and the model family biogpt does not say", wrap_blocks, model, config)


@pytest.mark.parametrize(
    "family", ["qwen3_5", "falcon_h1", "kimi_linear", "zamba2", "longcat_flash", "dory", "hrm_text"]
)
def test_checkpointed_blocks_replay_every_kind_of_cache_layer(family):
    """Dory's and hrm_text's blocks run several times in a pass, each time over another layer of the cache."""
    plain, model = (make_model(tiny_model(family)) for _ in range(2))
    wrap_blocks(model, Config(gradient_checkpointing=True))
    batch = batch_of(make_rows([2, 0, 3]))
    assert distance(gradients(model, model(**batch).loss), gradients(plain, plain(**batch).loss)) < 1e-9


def test_a_family_that_cannot_be_checkpointed_is_refused(tmp_path, monkeypatch):
    """Regression: the cache raised a ValueError in the first step."""
    model = make_model(tiny_model("llama"))
    check_family(model, gradient_checkpointing=True)
    assert not any("forward" in vars(block) for block in model.backbone.blocks)
    with monkeypatch.context() as patched:
        patched.setattr(kv_cache.GrowingLayer, "replayed_from", lambda *_: nullcontext())
        check_family(model)
        with pytest.raises(UserError, match=r"llama .* cannot be trained with gradient_checkpointing here: .*ValueErr"):
            check_family(model, gradient_checkpointing=True)
    # loading checks it unless the run only evaluates
    config = Config(model_id=write_tiny(tmp_path / "tiny"), method="cot", gradient_checkpointing=True)
    load_model(config, None)
    monkeypatch.setattr(families, "checkpoint_blocks", lambda blocks: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_model(config, None)
    load_model(replace(config, only_eval=True), None)
