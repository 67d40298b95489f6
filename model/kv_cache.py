"""A key-value cache with gradients that grows without copying.

transformers' DynamicCache concatenates: each latent pass copies all earlier keys and values, keeps the copy for the
backward pass, and adds one more gradient of that size. Here each pass writes its keys and values once into buffers of
the sequence's length, and attends to a view of the buffers. A short pass's gradient of all earlier keys and values is a
low-rank product: `attend` keeps its factors, and _Append's backward multiplies the factors of all passes at once.

Legend: B rows, H key-value heads, T columns in all, t columns of a pass, L columns up to the end of the pass, d head
size. G query heads share a key-value head.
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
    """Returns a cache for up to `capacity` columns, with a differentiable layer for each layer of transformers' own
    cache.

    keeps: whether a later pass reads the cache. If not, the cache stores nothing, or is None for models with recurrent
        layers.
    """
    layers = DynamicCache(config=config).layers
    if not keeps:
        is_plain = all(type(layer) in PLAIN_LAYERS for layer in layers)
        return Cache(layer_class_to_replicate=PassingLayer) if is_plain else None
    return Cache(layers=[_differentiable(layer, capacity) for layer in layers])


def can_fork(cache: Cache) -> bool:
    """Returns whether `batch_repeat_interleave` repeats all that the cache holds: it leaves out recurrent states."""
    layers = cache.layers
    return all(isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) for layer in layers)


def has_attention(config: PretrainedConfig) -> bool:
    """Returns whether any layer has attention; the other layers only have a recurrent state."""
    return any(type(layer) is not LinearAttentionLayer for layer in DynamicCache(config=config).layers)


def _differentiable(layer, capacity: int):
    if type(layer) in PLAIN_LAYERS:
        return GrowingLayer(capacity)
    if type(layer) in REPLACING_LAYERS:
        options = {"sliding_window": layer.sliding_window} if hasattr(layer, "sliding_window") else {}
        return REPLACING_LAYERS[type(layer)](number_of_states=layer.number_of_states, **options)
    return layer


PLAIN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}  # GrowingLayer replaces these


class PassingLayer(DynamicLayer):
    """Stores nothing. Without a cache, transformers would search the positions for packed sequences, which
    synchronises with the device."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


class GrowingLayer(DynamicLayer):
    """Stores the keys and values of one layer, (B, H, L, d) each. The attention mask handles sliding windows.

    The autograd graph references `memory`, and this layer references a tensor of the graph, `link` (see _Append). The
    memory is a separate object because a reference cycle through the graph would never be freed.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.memory = Memory(key_states, value_states, self.capacity)
        self.link = key_states.new_empty(())
        self.is_initialized = True

    @torch.compiler.disable  # would be recompiled for each length of the cache
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, t, d) keys and values; returns all of them, (B, H, L, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.memory.length + key_states.shape[-2] > self.capacity:
            raise ValueError(f"a cache for {self.capacity} columns cannot hold more")
        self.keys, self.values, self.link = _Append.apply(key_states, value_states, self.link, self.memory)
        self.keys.memory = self.values.memory = self.memory  # for `attend`
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row. For passes without gradients."""
        self.memory.states = [states.repeat_interleave(repeats, dim=0) for states in self.memory.states]
        super().batch_repeat_interleave(repeats)

    @contextmanager
    def replayed_from(self, length: int) -> Iterator[None]:
        """Rewinds the cache to `length` columns inside the context, so that gradient checkpointing can run a pass
        again: it writes the same states to the same columns."""
        length_now, link = self.memory.length, self.link
        self.memory.length = length
        try:
            yield
        finally:
            self.memory.length, self.link = length_now, link


class Memory:
    """The (B, H, T, d) keys and values of a layer, and the passes' contributions to their gradients."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int):
        self.states = [like.new_empty((*like.shape[:-2], capacity, like.shape[-1])) for like in (keys, values)]
        self.length = 0
        self.backward_pass = -1  # autograd's id of the backward pass that made the factors and gradients
        # (first column of the pass, factors) of each call of _Attend; in some models several layers share a memory.
        # The factors: gradient of the scores (B, H, G t, L), queries (B, H, G t, d), attention weights (B, H, G t, L),
        # gradient of the output (B, H, G t, d)
        self.factors: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        # sums of the gradients of keys and of values that arrive as a whole, (B, H, T, d), from other attention kernels
        self.gradients: list[torch.Tensor | None] = [None, None]

    def begin_backward(self) -> None:
        """Clears what an earlier backward pass left behind, if it stopped before the first columns."""
        if self.backward_pass != torch._C._current_graph_task_id():
            self.backward_pass, self.gradients = torch._C._current_graph_task_id(), [None, None]
            self.factors.clear()

    def add(self, number: int, gradient: torch.Tensor) -> None:
        """Adds the (B, H, L, d) gradient of the first L columns of the keys (number 0) or the values (1)."""
        length = gradient.shape[-2]
        if self.gradients[number] is None:
            self.gradients[number] = F.pad(gradient, (0, 0, 0, self.states[number].shape[-2] - length))
        else:
            self.gradients[number][..., :length, :] += gradient

    def collect(self, begin: int, end: int) -> list[torch.Tensor | None]:
        """Returns the gradients of the keys and values of columns begin to end, (B, H, end - begin, d), from the pass
        that starts at `begin` and all later ones."""
        sums = [None if whole is None else whole[..., begin:end, :] for whole in self.gradients]
        factors = [factors for column, factors in self.factors if column >= begin]
        if factors:
            scores, queries, weights, outputs = zip(*factors, strict=True)
            left = torch.cat([rows[..., begin:end] for rows in (*scores, *weights)], dim=-2).unflatten(-2, (2, -1))
            right = torch.cat([*queries, *outputs], dim=-2).unflatten(-2, (2, -1))
            products = (left.mT @ right).unbind(-3)  # of (B, H, 2, end - begin, d)
            pairs = zip(products, sums, strict=True)
            sums = [product if whole is None else product.add_(whole) for product, whole in pairs]
        return sums


class _Append(torch.autograd.Function):
    """Writes keys and values after those of the earlier passes, and returns views of all of them.

    Writing into buffers that autograd has saved is safe: a pass only writes columns that no earlier pass has read.
    `.data` avoids the version counters, which would raise.

    The backward of a pass returns the gradient of the columns that the pass wrote. All later passes must have added
    their contributions by then: the scalar `link`, an output of each pass and an input of the next, makes autograd run
    the later backwards first.
    """

    @staticmethod
    def forward(ctx, keys: torch.Tensor, values: torch.Tensor, link: torch.Tensor, memory: Memory):
        ctx.set_materialize_grads(False)
        ctx.memory, ctx.begin, ctx.end = memory, memory.length, memory.length + keys.shape[-2]
        wholes = [states.data[..., : ctx.end, :] for states in memory.states]
        for whole, new in zip(wholes, (keys, values), strict=True):
            whole[..., ctx.begin :, :] = new
        memory.length = ctx.end
        return *wholes, link.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor | None):
        memory, wholes = ctx.memory, gradients[:2]  # from attention kernels other than _Attend
        memory.begin_backward()
        if ctx.begin > 0:
            for number, whole in enumerate(wholes):
                if whole is not None:
                    memory.add(number, whole)
            return *memory.collect(ctx.begin, ctx.end), None, None
        pairs = zip(memory.collect(0, ctx.end), wholes, strict=True)
        found = [one if other is None else other if one is None else one + other for one, other in pairs]
        memory.factors.clear()
        memory.gradients = [None, None]
        return *found, None, None


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
    """Replaces transformers' "sdpa" attention in training, for passes after the first over a GrowingLayer.

    In each pass, the backward of torch's kernels writes gradients of all keys and values, which autograd then adds up;
    for a query of one column that is most of their work. _Attend keeps the factors of these gradients instead.

    Args, as transformers passes them: query (B, G H, t, d); key and value (B, H, L, d); attention_mask
    (B or 1, 1, t, L), bool or additive, or None; dropout: probability, of the attention weights.

    Returns (B, t, G H, d), and None in place of the attention weights.
    """
    if kwargs.get("position_bias") is None and _can_keep_factors(query, key, value, attention_mask):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend_in_factors(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register("sdpa", attend)


def _can_keep_factors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Returns whether `_Attend` supports this call: a later pass over a GrowingLayer in training, with few enough
    queries that the factors are smaller than the gradient."""
    from_growing_layer = hasattr(key, "memory") and hasattr(value, "memory")
    if not (query.requires_grad and from_growing_layer and key.shape == value.shape):
        return False
    rows = query.shape[1] // key.shape[1] * query.shape[-2]
    if attention_mask is None:
        is_plain = query.shape[-2] == 1
    else:  # not a learned bias
        is_plain = attention_mask.shape[1] == 1 and not attention_mask.requires_grad
    return is_plain and query.shape[-2] < key.shape[-2] and rows <= key.shape[-1]


@torch.compiler.disable  # for the same reason as GrowingLayer.update
def _attend_in_factors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        if not hasattr(attention_mask, "hidden"):  # all layers of a pass share the mask
            attention_mask.hidden = ~attention_mask
        attention_mask = attention_mask.hidden
    return _Attend.apply(query, key, value, attention_mask, dropout, scaling)


class _Attend(torch.autograd.Function):
    """softmax(scaling Q K^T + mask) V over the keys and values of a GrowingLayer. The backward stores the factors of
    their gradients in the layer's memory.

    Keys and values are inputs so that this backward runs before _Append's; they get no gradient here. A bool mask is
    True at hidden columns.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, dropout: float, scaling: float):
        ctx.memory, ctx.scaling, ctx.dropout, ctx.columns = key.memory, scaling, dropout, query.shape[-2]
        with torch.autocast(query.device.type, enabled=False):  # autocast would cast all keys in each pass
            rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).to(key.dtype)  # (B, H, G t, d)
            scores = _product(rows, key.mT, scaling)  # (B, H, G t, L)
            if mask is not None:
                by_head = scores.unflatten(2, (-1, ctx.columns))  # (B, H, G, t, L)
                if mask.dtype == torch.bool:  # not -inf: a window of padding hides all columns
                    by_head.masked_fill_(mask[:, :, None], torch.finfo(scores.dtype).min)
                else:
                    by_head.add_(mask[:, :, None])
            weights = torch._softmax(scores, -1, False)
            dropped, kept = torch.native_dropout(weights, dropout, True) if dropout else (weights, None)
            dropped = dropped.to(value.dtype)
            output = dropped @ value  # (B, H, G t, d)
        ctx.save_for_backward(rows, key, value, weights, dropped, kept)
        return output.unflatten(2, (-1, ctx.columns)).flatten(1, 2).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        rows, key, value, weights, dropped, kept = ctx.saved_tensors
        d_output = gradient.transpose(1, 2).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, H, G t, d)
        d_weights = _product(d_output, value.mT, ctx.scaling).to(weights.dtype)  # times the scaling
        if kept is not None:
            d_weights = torch.ops.aten.native_dropout_backward(d_weights, kept, 1 / (1 - ctx.dropout))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)  # (B, H, G t, L)
        ctx.memory.begin_backward()
        ctx.memory.factors.append((key.shape[-2] - ctx.columns, (d_scores, rows, dropped, d_output)))
        d_query = d_scores @ key  # (B, H, G t, d)
        return d_query.unflatten(2, (-1, ctx.columns)).flatten(1, 2), None, None, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns scale * left @ right for (B, H, ., .) factors, in one kernel."""
    product = torch.baddbmm(left.new_empty(()), left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=scale)
    return product.unflatten(0, left.shape[:2])
