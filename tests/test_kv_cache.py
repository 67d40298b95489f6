"""The growing cache equals concatenation: values and gradients."""

import weakref

import pytest
import torch
from conftest import tiny_base
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from coconut import Coconut
from model import kv_cache
from model.kv_cache import GrowingLayer, attend, has_attention, make_cache
from model.recurrent_cache import REPLACING_LAYERS

ReplacingLayer = REPLACING_LAYERS[LinearAttentionLayer]


def passes(*lengths: int) -> list[torch.Tensor]:
    """Returns the states of one pass per length, for 2 rows and 3 heads of size 8."""
    generator, options = torch.Generator().manual_seed(0), {"dtype": torch.float64, "requires_grad": True}
    return [torch.randn(2, 3, length, 8, generator=generator, **options) for length in lengths]


def assert_same_gradients(found: torch.Tensor, wanted: torch.Tensor, leaves: list, rtol: float = 1e-10) -> None:
    """Asserts that two scalars are equal, and so are their gradients."""
    assert torch.allclose(found, wanted, rtol=1e-12)
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert torch.allclose(one, other, rtol=rtol, atol=1e-13)


def test_views_and_gradients_are_those_of_concatenation():
    """Each pass sees all earlier states; later passes depend on earlier ones, as thoughts do."""

    def total(append, states):
        result = torch.zeros((), dtype=torch.float64)
        for weight, new in enumerate(states, start=1):
            whole = append(new + result)
            result = result + (whole * whole).mean() * weight
        return result

    states = passes(5, 1, 1, 3)
    layer, seen = GrowingLayer(capacity=12), []

    def append(new: torch.Tensor) -> torch.Tensor:
        keys, values = layer.update(new, 0.5 * new)
        return keys + 2 * values

    def concatenate(new: torch.Tensor) -> torch.Tensor:
        seen.append(new)
        return 2 * torch.cat(seen, dim=-2)

    assert_same_gradients(total(append, states), total(concatenate, states), states, rtol=1e-12)
    assert layer.memory.length == 10


@pytest.mark.parametrize("masked", ["bool", "float", "one column"])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_in_factors_is_that_of_torch(masked, groups):
    """Over three passes; what the earlier ones return is an input of the later ones."""
    columns = (5, 1, 1) if masked == "one column" else (5, 1, 3)
    queries = [states.repeat_interleave(groups, dim=1).detach().requires_grad_() for states in passes(*columns)]
    keys, values = passes(*columns), [(states * 0.5).detach().requires_grad_() for states in passes(*columns)]
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    allowed = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    allowed[1, :, 3:, 0] = False

    def total(attention, update):
        feedback, end = torch.zeros((), dtype=torch.float64), 0
        for query, key, value in zip(queries, keys, values, strict=True):
            end += query.shape[-2]
            key, value = update(key + feedback, value)
            mask = allowed[..., end - query.shape[-2] : end, :end]
            if masked == "float":
                mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)
            mask = None if masked == "one column" and end > 5 else mask
            found, _ = attention(module, query + feedback, key, value, mask, scaling=0.7)
            feedback = feedback + (found * found).mean()
        return feedback

    grown, plain = total(attend, GrowingLayer(9).update), total(sdpa_attention_forward, DynamicLayer().update)
    assert_same_gradients(grown, plain, [*queries, *keys, *values])


def test_two_calls_of_attention_over_one_layer_add_up():
    """In some models several layers share keys and values."""
    module = torch.nn.Module()
    states, queries = passes(4, 1), passes(1, 1)

    def total(attention, update):
        update(states[0], states[0])
        key, value = update(states[1], states[1])
        return sum(attention(module, query, key, value, None)[0].square().sum() for query in queries)

    grown, plain = total(attend, GrowingLayer(5).update), total(sdpa_attention_forward, DynamicLayer().update)
    assert_same_gradients(grown, plain, states)


def test_nothing_is_copied_and_a_full_cache_raises():
    first, second = passes(4, 2)
    layer = GrowingLayer(capacity=8)
    keys, values = layer.update(first, first)
    more_keys, _ = layer.update(second, second)
    assert keys.data_ptr() == more_keys.data_ptr()
    assert keys.data_ptr() != values.data_ptr()
    assert layer.get_seq_length() == 6
    assert torch.equal(more_keys[..., 4:, :], second)
    with pytest.raises(ValueError, match="cannot hold more"):
        layer.update(*passes(3, 3))


def test_dropout_of_attention_weights_is_that_of_torch():
    module, states, (query,) = torch.nn.Module(), passes(6, 1), passes(1)

    def dropped() -> torch.Tensor:
        layer = GrowingLayer(7)
        layer.update(states[0], states[0])
        torch.manual_seed(0)
        return attend(module, query, *layer.update(states[1], states[1]), None, dropout=0.5)[0]

    def plain() -> torch.Tensor:
        whole = torch.cat(states, dim=-2)
        torch.manual_seed(0)
        weights = torch.native_dropout((query @ whole.mT * query.shape[-1] ** -0.5).softmax(-1), 0.5, True)[0]
        return (weights @ whole).transpose(1, 2)

    found, wanted = (torch.autograd.grad(total().square().sum(), [query, *states]) for total in (dropped, plain))
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-13) for one, other in zip(found, wanted, strict=True))


def test_a_long_pass_is_left_to_torch(monkeypatch):
    """The factors would be larger than the gradient."""
    monkeypatch.setattr(kv_cache, "_attend_in_factors", lambda *_: pytest.fail("factors of many rows"))
    module, layer = torch.nn.Module(), GrowingLayer(12)
    first, query = passes(3, 9)
    layer.update(first, first)
    mask = torch.ones(1, 1, 9, 12, dtype=torch.bool).tril(3)
    attend(module, query, *layer.update(query, query), mask)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_attention_in_factors_under_autocast(family, monkeypatch):
    """No farther from float32 than torch's attention. Queries, keys and values may have different dtypes."""
    input_ids = torch.tensor([[5, 6, 1, 2, 2, 3, 7, 0], [9, 8, 1, 2, 2, 3, 4, 0]])

    def gradients(bf16: bool) -> torch.Tensor:
        model = Coconut(tiny_base(family, dtype=torch.float32), 2, 1, 3, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids, labels=input_ids).loss
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])

    exact, ours = gradients(bf16=False), gradients(bf16=True)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    theirs = gradients(bf16=True)
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()


@pytest.mark.usefixtures("no_collection")
def test_the_memory_is_freed_with_the_graph(monkeypatch):
    """A reference cycle through autograd's graph kept the states of every step."""
    made = []
    original = kv_cache.Memory.__init__
    monkeypatch.setattr(
        kv_cache.Memory, "__init__", lambda self, *a: made.append(weakref.ref(self)) or original(self, *a)
    )
    model = Coconut(tiny_base("gpt2"), 2, 1, 3, 0)
    input_ids = torch.tensor([[5, 6, 1, 2, 2, 3, 7, 0]])
    for backward in (True, False):
        loss = model(input_ids, labels=input_ids).loss
        if backward:
            loss.backward()
        del loss
        assert len(made) == 2
        assert [memory() for memory in made] == [None] * 2
        made.clear()


def test_each_kind_of_layer_gets_its_cache():
    config = tiny_base("llama").config
    assert [type(layer) for layer in make_cache(config, 8).layers] == [GrowingLayer, GrowingLayer]
    config.layer_types = ["linear_attention", "full_attention"]
    assert [type(layer) for layer in make_cache(config, 8).layers] == [ReplacingLayer, GrowingLayer]
    assert make_cache(config, 8, keeps=False) is None  # a recurrent layer would write to it
    assert has_attention(config)
    config.layer_types = ["linear_attention", "linear_attention"]
    assert not has_attention(config)


def test_recurrent_states_are_replaced_and_not_overwritten():
    """A state that was read stays as it was, whether the model passes a new state or copies one into it."""
    layer, given = ReplacingLayer(), torch.ones(1, 2, requires_grad=True)
    layer.update_recurrent_state(3 * given)
    read = layer.recurrent_states[0]
    following = read * given  # saves `read` for its backward pass
    read.copy_(5 * read)
    assert layer.recurrent_states[0].tolist() == [[15.0, 15.0]]
    assert torch.autograd.grad((following + layer.recurrent_states[0]).sum(), given)[0].tolist() == [[21.0, 21.0]]
    layer.update_recurrent_state(given)
    assert layer.recurrent_states[0].tolist() == [[1.0, 1.0]]


def test_a_convolution_keeps_its_last_inputs():
    layer, inputs = ReplacingLayer(), torch.arange(14.0, requires_grad=True).reshape(1, 2, 7)
    first = layer.update_conv_state(inputs[..., :2], conv_kernel_size=3)
    assert first.tolist() == [[[0, 0, 1], [0, 7, 8]]]  # padded
    second = layer.update_conv_state(inputs[..., 2:3])
    assert second.tolist() == [[[0, 0, 1, 2], [0, 7, 8, 9]]]
    third = layer.update_conv_state(inputs[..., 3:])
    assert third.tolist() == [[[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]]]
    assert layer.conv_states[0].tolist() == [[[4, 5, 6], [11, 12, 13]]]
    assert third.requires_grad
