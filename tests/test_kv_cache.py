"""The growing cache against concatenation."""

import gc
import weakref

import pytest
import torch
from conftest import tiny_base
from transformers import DynamicCache

import kv_cache
from coconut import Coconut
from kv_cache import Buffer, GrowingLayer, make_cache


def passes(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4)  # rows, heads, head size
    return [
        torch.randn(shape[0], shape[1], length, shape[2], generator=generator, dtype=torch.float64, requires_grad=True)
        for length in lengths
    ]


def test_views_and_gradients_are_those_of_concatenation():
    """Each pass sees what was written so far; later passes depend on earlier ones, as thoughts do."""

    def total(append, states):
        result = torch.zeros((), dtype=torch.float64)
        for weight, new in enumerate(states, start=1):
            whole = append(new + result)
            result = result + (whole * whole).mean() * weight
        return result

    states = passes(5, 1, 1, 3)
    buffer = Buffer(states[0], capacity=12)
    grown = total(buffer.append, states)
    seen: list[torch.Tensor] = []

    def concatenate(new: torch.Tensor) -> torch.Tensor:
        seen.append(new)
        return torch.cat(seen, dim=-2)

    plain = total(concatenate, states)
    assert torch.allclose(grown, plain, rtol=1e-12)
    for found, wanted in zip(torch.autograd.grad(grown, states), torch.autograd.grad(plain, states), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    assert buffer.memory.length == 10


def test_the_memory_goes_with_the_graph(monkeypatch):
    """A circle from the cache through autograd's graph and back once kept the states of every step for ever."""
    made = []
    original = kv_cache.Memory.__init__
    monkeypatch.setattr(
        kv_cache.Memory, "__init__", lambda self, *a: made.append(weakref.ref(self)) or original(self, *a)
    )
    model = Coconut(tiny_base("gpt2"), 2, 1, 3, 0)
    input_ids = torch.tensor([[5, 6, 1, 2, 2, 3, 7, 0]])
    gc.disable()  # what only the collector would find is not freed in time: it does not see a tensor's size
    try:
        for backward in (True, False):
            loss = model(input_ids, labels=input_ids).loss
            if backward:
                loss.backward()
            del loss
            assert len(made) == 4
            assert [memory() for memory in made] == [None] * 4
            made.clear()
    finally:
        gc.enable()


def test_nothing_is_copied():
    first, second = passes(4, 2)
    layer = GrowingLayer(capacity=8)
    keys, values = layer.update(first, first)
    more_keys, _ = layer.update(second, second)
    assert keys.data_ptr() == more_keys.data_ptr()
    assert keys.data_ptr() != values.data_ptr()
    assert layer.get_seq_length() == 6
    assert torch.equal(more_keys[..., 4:, :], second)


def test_a_full_cache_says_so():
    first, second = passes(4, 2)
    layer = GrowingLayer(capacity=5)
    layer.update(first, first)
    with pytest.raises(ValueError, match="cannot hold more"):
        layer.update(second, second)


def test_models_that_keep_other_states_get_their_own_cache():
    config = tiny_base("llama").config
    assert not isinstance(make_cache(config, 8), DynamicCache)
    config.layer_types = ["linear_attention", "full_attention"]
    assert isinstance(make_cache(config, 8), DynamicCache)
