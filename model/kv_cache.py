"""A key-value cache that grows without copying what it holds, and lets gradients through.

transformers' DynamicCache concatenates: each latent pass copies all keys and values so far, keeps the copy for the
backward pass, and adds up as many gradients of that size. Here the states are written once into buffers that are as
long as the sequence, and every pass attends to a view of them. The gradient that a pass of few columns owes to all
columns before it is a product of few rows: its factors are kept (`attend`), and the columns' own backward multiplies
those of all passes at once.

Legend: B rows, H key-value heads, T columns in all, t columns of a pass, L columns so far with these, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.recurrent_cache import REPLACING_LAYERS


def make_cache(config: PretrainedConfig, capacity: int, keeps: bool = True) -> Cache | None:
    """A cache for up to `capacity` columns, of the layers that transformers itself would take, each in the form that
    lets gradients through. Where nothing needs to be kept, because there is one pass only, nothing is."""
    layers = DynamicCache(config=config).layers
    if not keeps:
        is_plain = all(type(layer) in PLAIN_LAYERS for layer in layers)
        return Cache(layer_class_to_replicate=PassingLayer) if is_plain else None
    return Cache(layers=[_differentiable(layer, capacity) for layer in layers])


def has_attention(config: PretrainedConfig) -> bool:
    """Whether there is a layer that looks back at the columns, not at a state of fixed size only."""
    return any(type(layer) is not LinearAttentionLayer for layer in DynamicCache(config=config).layers)


def _differentiable(layer, capacity: int):
    if type(layer) in PLAIN_LAYERS:
        return GrowingLayer(capacity)
    if type(layer) in REPLACING_LAYERS:
        options = {"sliding_window": layer.sliding_window} if hasattr(layer, "sliding_window") else {}
        return REPLACING_LAYERS[type(layer)](number_of_states=layer.number_of_states, **options)
    return layer


PLAIN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}  # that GrowingLayer takes the place of


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

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row, for passes without gradients."""
        for buffer in (self.key_buffer, self.value_buffer):
            buffer.memory.states = buffer.memory.states.repeat_interleave(repeats, dim=0)
        super().batch_repeat_interleave(repeats)

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


class Memory:
    """Room for (B, H, T, d) states, and for what later passes contribute to their gradients in a backward pass."""

    def __init__(self, like: torch.Tensor, capacity: int):
        self.states = like.detach().new_empty((*like.shape[:-2], capacity, like.shape[-1]))
        self.length = 0
        self.products = 0  # made so far: some models attend to a layer's states in other layers too
        # (column where a pass begins, number of the product) -> the factors of the gradient of its L columns, for
        # G query heads a key-value head (B, H, G t, L) and (B, H, G t, d)
        self.factors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.gradient: torch.Tensor | None = None  # (B, H, T, d): the sum of those that come whole

    def add(self, gradient: torch.Tensor) -> None:
        """Adds the (B, H, L, d) gradient of the first L columns."""
        length, capacity = gradient.shape[-2], self.states.shape[-2]
        if self.gradient is None:
            self.gradient = F.pad(gradient, (0, 0, 0, capacity - length))
        else:
            self.gradient[..., :length, :] += gradient

    def collect(self, begin: int, end: int) -> torch.Tensor | None:
        """What there is for columns begin to end from the passes that begin with these or later."""
        collected = None if self.gradient is None else self.gradient[..., begin:end, :]
        factors = [factors for (column, _), factors in self.factors.items() if column >= begin]
        if factors:
            left = torch.cat([left[..., begin:end] for left, _ in factors], dim=-2)
            right = torch.cat([right for _, right in factors], dim=-2)
            product = left.mT @ right
            collected = product if collected is None else product.add_(collected)
        return collected

    def forget(self) -> None:
        self.factors.clear()
        self.gradient = None


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
        whole.memory = self.memory  # for `attend`
        return whole


class _Append(torch.autograd.Function):
    """Writes states behind those of the earlier passes and returns the whole as a view.

    Writing into memory that autograd has saved is sound here, because a pass only writes columns that no earlier pass
    has seen; `.data` keeps it from the version counters that would object.

    Each pass's backward hands on the gradient of the columns that it wrote. That is complete only once the passes
    after it have left theirs: the scalar `link`, from each pass to the next, is the edge of the graph that makes them
    come first.
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
    @once_differentiable
    def backward(ctx, grad_whole: torch.Tensor | None, grad_link: torch.Tensor | None):
        memory = ctx.memory
        if ctx.end == memory.length:
            memory.gradient = None  # the first of a backward: an unfinished one may have left some; factors it replaces
        if grad_whole is not None and ctx.begin > 0:  # from an attention other than `attend`
            memory.add(grad_whole)
        gradient = memory.collect(ctx.begin, ctx.end)
        if ctx.begin == 0:
            memory.forget()
            if grad_whole is not None:
                gradient = grad_whole if gradient is None else gradient.add_(grad_whole)
        return gradient, None, None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" attention, except for the passes after the first over a GrowingLayer in training.

    torch's kernels write a gradient of full length for keys and values of each pass, which then has to be added to
    those of the others; with a query of one column that is most of their work. Here it is left as two factors.

    Args, as transformers gives them: query (B, G H, t, d), where G query heads share a key-value head; key and value
    (B, H, L, d); attention_mask (B or 1, 1, t, L), bool or to be added, or None; `dropout`, of the weights.

    Returns (B, t, G H, d), and None for the weights.
    """
    if kwargs.get("position_bias") is None and _leaves_factors(query, key, value, attention_mask):
        return _attend_in_factors(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register("sdpa", attend)


def _leaves_factors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether this is a later pass in training, of the form that `_attend_in_factors` can do, and of so few rows that
    the factors take less room than the gradient."""
    if not (query.requires_grad and hasattr(key, "memory") and hasattr(value, "memory")):
        return False
    rows = query.shape[1] // key.shape[1] * query.shape[-2]
    is_plain = query.shape[-2] == 1 if attention_mask is None else attention_mask.shape[1] == 1
    return is_plain and query.shape[-2] < key.shape[-2] and rows <= key.shape[-1]


@torch.compiler.disable  # as GrowingLayer.update
def _attend_in_factors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    columns, size = query.shape[-2:]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, H, G t, d)
    scores = _Product.apply(grouped, key, columns, True)  # (B, H, G t, L)
    scores = scores.unflatten(2, (-1, columns)).to(torch.promote_types(scores.dtype, torch.float32))  # (B, H, G, t, L)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        mask = attention_mask[:, :, None]
        least = torch.finfo(scores.dtype).min  # not -inf: in a window of padding there may be no column left
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(F.softmax(scores, dim=-1).to(value.dtype), dropout)
    found = _Product.apply(weights.flatten(2, 3), value, columns, False)  # (B, H, G t, d)
    return found.unflatten(2, (-1, columns)).flatten(1, 2).transpose(1, 2).contiguous()


class _Product(torch.autograd.Function):
    """rows @ states, or rows @ states.mT, for what a Buffer has returned; the states' gradient is left in its memory as
    factors. `columns` are those of the pass.

    The states are an input for the sake of the graph only: it makes this come before the backward of _Append.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, states: torch.Tensor, columns: int, transposed: bool):
        ctx.save_for_backward(rows, states)
        ctx.memory, ctx.transposed = states.memory, transposed
        ctx.memory.products += 1
        ctx.key = (states.shape[-2] - columns, ctx.memory.products)
        return rows @ (states.mT if transposed else states)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        rows, states = ctx.saved_tensors
        # under autocast the types may differ
        rows, states = rows.detach().to(gradient.dtype), states.to(gradient.dtype)
        ctx.memory.factors[ctx.key] = (gradient, rows) if ctx.transposed else (rows, gradient)
        return gradient @ (states if ctx.transposed else states.mT), None, None, None
