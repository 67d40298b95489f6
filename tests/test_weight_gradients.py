"""Deferred weight gradients equal the ones that autograd adds up pass by pass."""

import weakref

import pytest
import torch
from conftest import tiny_base
from test_coconut import EOS, LATENT, gradients, largest_difference, make_model, make_rows
from test_families import tiny_model
from test_parallel import batch_of

from coconut import Coconut
from config import Config
from model import lora, weight_gradients
from trainer.parallel import wrap_blocks


def deferred(model: Coconut, compiled: bool = False) -> Coconut:
    wrap_blocks(model, Config(compile=compiled))
    return model


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Collects the number of passes in each product that makes a weight's gradient."""
    counts, take = [], weight_gradients._Kept.take

    def counting(self):
        pairs = take(self)
        counts.extend(map(len, pairs.values()))
        return pairs

    monkeypatch.setattr(weight_gradients._Kept, "take", counting)
    return counts


@pytest.mark.parametrize("n_latents", [[0, 0, 0], [1, 1, 1], [3, 3, 3], [2, 0, 6, 3]])
def test_loss_and_gradients_are_the_plain_definition(family, n_latents, products):
    model, rows = deferred(make_model(family)), make_rows(n_latents)
    loss = model(**batch_of(n_latents)).loss
    assert max(largest_difference(model, rows, loss)) < 1e-9
    n_layers = {"gpt2": 4}.get(family, 7) * 2
    passes = max(n_latents) - 1  # the last latent's pass runs to the end of the sequence
    assert products == [passes] * n_layers * (passes > 0)


@pytest.mark.slow
def test_one_column_passes_of_compiled_blocks_run_in_eager_mode(products, monkeypatch):
    """Compiled one-column passes added up weight gradients pass by pass, and were slower than eager ones."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **keys: compile_block(self, backend="eager", **keys))
    torch._dynamo.reset()
    model, n_latents = deferred(make_model("gpt2"), compiled=True), [2, 0, 5, 3]
    assert max(largest_difference(model, make_rows(n_latents), model(**batch_of(n_latents)).loss)) < 1e-9
    assert products == [4] * 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_gradient_is_computed_once(family):
    """DDP and FSDP send a gradient when its hook fires."""
    model, fired = deferred(make_model(family)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    model(**batch_of([3, 1, 4])).loss.backward()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def test_thoughts_without_gradients(family):
    """Only the link then makes autograd run the passes' backward before the weights'."""
    plain, model = make_model(family), deferred(make_model(family))
    found, wanted = (
        gradients(each, each(**batch_of([4, 2]), edit=lambda _, thought, __: thought.detach()).loss)
        for each in (model, plain)
    )
    assert all((found[name] - gradient).abs().max() < 1e-12 for name, gradient in wanted.items())


def test_several_backward_passes_over_one_graph(family):
    """The first stops before the weights and leaves inputs and gradients behind; two forwards share one backward."""
    plain, model = make_model(family), deferred(make_model(family))
    found, wanted = [], []
    for each, losses in ((model, found), (plain, wanted)):
        output = each(**batch_of([4, 4]), return_thoughts=True)
        torch.autograd.grad(output.thoughts[:, 3].sum(), output.thoughts, retain_graph=True, allow_unused=True)
        partly = torch.autograd.grad(
            output.thoughts[:, 2].sum(), list(each.parameters()), retain_graph=True, allow_unused=True
        )
        losses += [gradient for gradient in partly if gradient is not None]
        losses += gradients(each, output.loss + each(**batch_of([3, 1], seed=1)).loss).values()
    assert all((one - other).abs().max() < 1e-12 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["mixtral", "gptj", "falcon", "qwen3_5"])
def test_other_families(name):
    plain, model = make_model_of(name), deferred(make_model_of(name))
    found, wanted = (gradients(each, each(**batch_of([3, 1])).loss) for each in (model, plain))
    assert all((found[name] - gradient).abs().max() < 1e-9 for name, gradient in wanted.items())


def make_model_of(name: str) -> Coconut:
    return Coconut(tiny_model(name), LATENT, 1, 3, EOS).eval()


def test_lora(family, products):
    """The weights are frozen, their low-rank updates are not."""
    found = []
    for wrapped in (True, False):
        model = make_model(family)
        torch.manual_seed(0)
        lora.add(model.base_causallm, 2, 4)
        model = deferred(model) if wrapped else model
        model(**batch_of([4, 2])).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert set(products) == {3}
    assert all((one - other).abs().max() < 1e-12 for one, other in zip(*found, strict=True))


def test_autocast(family, products):
    """No farther from float32 than autograd's sums of bfloat16 gradients."""

    def of(bf16: bool, wrapped: bool) -> torch.Tensor:
        model = make_model(family, dtype=torch.float32)
        model = deferred(model) if wrapped else model
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch_of([5, 5, 2])).loss
        return torch.cat([gradient.flatten() for gradient in gradients(model, loss).values()])

    exact, plain, found = of(False, False), of(True, False), of(True, True)
    assert set(products) == {4}
    assert (found - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.usefixtures("no_collection")
def test_inputs_and_gradients_are_freed_with_the_graph(monkeypatch):
    made, original = [], weight_gradients._Kept.__init__
    monkeypatch.setattr(
        weight_gradients._Kept, "__init__", lambda self: made.append(weakref.ref(self)) or original(self)
    )
    model = deferred(Coconut(tiny_base("gpt2"), LATENT, 1, 3, EOS))
    for backward in (True, False):
        loss = model(**batch_of([3, 1])).loss
        if backward:
            loss.backward()
        del loss
        assert [kept() for kept in made] == [None] * len(made)
