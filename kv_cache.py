"""A key-value cache that grows without copying what it holds, and lets gradients through.

transformers' DynamicCache concatenates: each latent pass copies all keys and values so far, keeps the copy for the
backward pass, and adds up as many gradients of that size. Here the states are written once into buffers that are as
long as the sequence, every pass attends to a view of them, and the gradients of all passes meet in one buffer.

Legend: B rows, H key-value heads, T columns in all, t columns of a pass, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def make_cache(config: PretrainedConfig, capacity: int, keeps: bool = True) -> Cache | None:
    """A cache for up to `capacity` columns; for models whose layers keep other states than keys and values,
    transformers' own. Where nothing needs to be kept, because there is one pass only, nothing is."""
    config = config.get_text_config(decoder=True)
    if not set(getattr(config, "layer_types", None) or PLAIN_LAYERS) <= PLAIN_LAYERS:
        return DynamicCache(config=config) if keeps else None
    return Cache(layer_class_to_replicate=partial(GrowingLayer, capacity) if keeps else PassingLayer)


class PassingLayer(DynamicLayer):
    """Keeps nothing. With a cache at hand, transformers does not search the positions for packed sequences, a search
    that waits for the device."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, (B, H, columns so far, d) each. Sliding windows are left to the mask."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.key_buffer = Buffer(key_states, self.capacity)
        self.value_buffer = Buffer(value_states, self.capacity)
        self.is_initialized = True

    @torch.compiler.disable  # what it does depends on how long the cache is: a graph of its own for each length
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, t, d) states; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.key_buffer.append(key_states)
        self.values = self.value_buffer.append(value_states)
        return self.keys, self.values

    @contextmanager
    def replayed_from(self, length: int) -> Iterator[None]:
        """Lets a pass that began at `length` columns run again: it writes the same states to the same columns."""
        buffers = (self.key_buffer, self.value_buffer)
        now = [(buffer.memory.length, buffer.link) for buffer in buffers]
        for buffer in buffers:
            buffer.memory.length = length
        try:
            yield
        finally:
            for buffer, (length_now, link) in zip(buffers, now, strict=True):
                buffer.memory.length, buffer.link = length_now, link


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing: the blocks keep their inputs only and run again in the backward pass.

    transformers' own switches the cache off, and a latent pass without it would not see the columns before it.
    """
    for index, block in enumerate(blocks):
        block.forward = partial(_checkpointed, block.forward, index)


def _checkpointed(forward: Callable, index: int, *args, **kwargs):
    """One block's forward; `index` is its layer in the cache."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    begin = cache.get_seq_length(index) if cache is not None else 0
    replays = False

    def run(*args):
        nonlocal replays
        layer = cache.layers[index] if replays and cache is not None else None
        replays = True
        if isinstance(layer, GrowingLayer):
            with layer.replayed_from(begin):
                return forward(*args, **kwargs)
        if layer is not None and not isinstance(layer, PassingLayer):
            raise ValueError("gradient checkpointing needs a model whose layers keep keys and values only")
        return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False)


class Memory:
    """Room for (B, H, T, d) states, and for their gradients once there are any."""

    def __init__(self, like: torch.Tensor, capacity: int):
        self.states = like.detach().new_empty((*like.shape[:-2], capacity, like.shape[-1]))
        self.gradient: torch.Tensor | None = None
        self.length = 0


class Buffer:
    """States that grow by `append`.

    The graph of a backward pass holds the memory, and this holds a piece of the graph, `link` (see _Append). They are
    two objects because a circle through the graph would never be freed.
    """

    def __init__(self, like: torch.Tensor, capacity: int):
        self.memory = Memory(like, capacity)
        self.link = torch.zeros((), device=like.device)

    def append(self, states: torch.Tensor) -> torch.Tensor:
        """Adds (B, H, t, d) states; returns all so far, (B, H, length, d)."""
        capacity = self.memory.states.shape[-2]
        if self.memory.length + states.shape[-2] > capacity:
            raise ValueError(f"a cache for {capacity} columns cannot hold more")
        whole, self.link = _Append.apply(states, self.link, self.memory)
        return whole


class _Append(torch.autograd.Function):
    """Writes states behind those of the earlier passes and returns the whole as a view.

    Writing into memory that autograd has saved is sound here, because a pass only writes columns that no earlier pass
    has seen; `.data` keeps it from the version counters that would object.

    Each pass's backward adds its gradient of the whole to the buffer and hands on the columns that it wrote. That is
    right only once the passes after it have added theirs: the scalar `link`, from each pass to the next, is the edge
    of the graph that makes them come first.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, link: torch.Tensor, memory: Memory):
        ctx.set_materialize_grads(False)
        ctx.memory, ctx.begin, ctx.end = memory, memory.length, memory.length + states.shape[-2]
        data = memory.states.data
        data[..., ctx.begin : ctx.end, :] = states
        memory.length = ctx.end
        return data[..., : ctx.end, :], torch.zeros_like(link)

    @staticmethod
    def backward(ctx, grad_whole: torch.Tensor | None, grad_link: torch.Tensor | None):
        memory = ctx.memory
        if ctx.end == memory.length:
            memory.gradient = None  # the first of a backward: what an earlier backward of the same graph left
        if grad_whole is not None:
            if memory.gradient is None:
                memory.gradient = torch.empty_like(memory.states)
                memory.gradient[..., : ctx.end, :] = grad_whole
                memory.gradient[..., ctx.end :, :] = 0
            else:
                memory.gradient[..., : ctx.end, :] += grad_whole
        gradient = memory.gradient
        if ctx.begin == 0:
            memory.gradient = None  # the last of a backward: nobody needs it any more
        return None if gradient is None else gradient[..., ctx.begin : ctx.end, :], None, None
