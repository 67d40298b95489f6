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
    """The keys and values of one layer, (B, H, columns so far, d) each. Sliding windows are left to the mask.

    The graph of a backward pass holds the memory, and this holds a piece of the graph, `link` (see _Append). They are
    two objects because a circle through the graph would never be freed.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.memory = Memory(key_states, value_states, self.capacity)
        self.link = key_states.new_empty(())
        self.is_initialized = True

    @torch.compiler.disable  # what it does depends on how long the cache is: a graph of its own for each length
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, t, d) states; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.memory.length + key_states.shape[-2] > self.capacity:
            raise ValueError(f"a cache for {self.capacity} columns cannot hold more")
        self.keys, self.values, self.link = _Append.apply(key_states, value_states, self.link, self.memory)
        self.keys.memory = self.values.memory = self.memory  # for `attend`
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row, for passes without gradients."""
        self.memory.states = [states.repeat_interleave(repeats, dim=0) for states in self.memory.states]
        super().batch_repeat_interleave(repeats)

    @contextmanager
    def replayed_from(self, length: int) -> Iterator[None]:
        """Lets a pass that began at `length` columns run again: it writes the same states to the same columns."""
        length_now, link = self.memory.length, self.link
        self.memory.length = length
        try:
            yield
        finally:
            self.memory.length, self.link = length_now, link


class Memory:
    """(B, H, T, d) keys and values of a layer, and what passes contribute to the gradients of earlier columns."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int):
        self.states = [like.new_empty((*like.shape[:-2], capacity, like.shape[-1])) for like in (keys, values)]
        self.length = 0
        self.products = 0  # made so far: some models attend to a layer's states in other layers too
        self.backward_pass = -1  # that these are of
        # (column where a pass begins, number of the product) -> for G query heads a key-value head the gradient of the
        # scores (B, H, G t, L), the queries (B, H, G t, d), the weights (B, H, G t, L), the gradient of the result
        self.factors: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self.gradients: list[torch.Tensor | None] = [None, None]  # (B, H, T, d): the sums of those that come whole

    def begin(self) -> None:
        """Forgets what an earlier backward pass has left, if it did not come to the first columns."""
        if self.backward_pass != torch._C._current_graph_task_id():
            self.backward_pass, self.gradients = torch._C._current_graph_task_id(), [None, None]
            self.factors.clear()

    def add(self, number: int, gradient: torch.Tensor) -> None:
        """Adds the (B, H, L, d) gradient of the first L columns of the keys, 0, or the values, 1."""
        length = gradient.shape[-2]
        if self.gradients[number] is None:
            self.gradients[number] = F.pad(gradient, (0, 0, 0, self.states[number].shape[-2] - length))
        else:
            self.gradients[number][..., :length, :] += gradient

    def collect(self, begin: int, end: int) -> list[torch.Tensor | None]:
        """What there is for keys and values of columns begin to end from the passes that begin with these or later."""
        found = [None if whole is None else whole[..., begin:end, :] for whole in self.gradients]
        factors = [factors for (column, _), factors in self.factors.items() if column >= begin]
        if factors:
            scores, queries, weights, results = zip(*factors, strict=True)
            left = torch.cat([rows[..., begin:end] for rows in (*scores, *weights)], dim=-2).unflatten(-2, (2, -1))
            right = torch.cat([*queries, *results], dim=-2).unflatten(-2, (2, -1))
            products = (left.mT @ right).unbind(-3)  # of (B, H, 2, end - begin, d)
            sums = zip(products, found, strict=True)
            found = [product if whole is None else product.add_(whole) for product, whole in sums]
        return found


class _Append(torch.autograd.Function):
    """Writes states behind those of the earlier passes and returns the whole as views.

    Writing into memory that autograd has saved is sound here, because a pass only writes columns that no earlier pass
    has seen; `.data` keeps it from the version counters that would object.

    Each pass's backward hands on the gradient of the columns that it wrote. That is complete only once the passes
    after it have left theirs: the scalar `link`, from each pass to the next, is the edge of the graph that makes them
    come first.
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
        memory, wholes = ctx.memory, gradients[:2]  # from an attention other than `attend`
        memory.begin()
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
    """transformers' "sdpa" attention, except for the passes after the first over a GrowingLayer in training.

    torch's kernels write a gradient of full length for keys and values of each pass, which then has to be added to
    those of the others; with a query of one column that is most of their work. Here it is left as two factors.

    Args, as transformers gives them: query (B, G H, t, d), where G query heads share a key-value head; key and value
    (B, H, L, d); attention_mask (B or 1, 1, t, L), bool or to be added, or None; `dropout`, of the weights.

    Returns (B, t, G H, d), and None for the weights.
    """
    if kwargs.get("position_bias") is None and _leaves_factors(query, key, value, attention_mask):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend_in_factors(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register("sdpa", attend)


def _leaves_factors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether this is a later pass in training, of the form that `_Attend` can do, and of so few rows that the factors
    take less room than the gradient."""
    are_kept = hasattr(key, "memory") and hasattr(value, "memory")
    if not (query.requires_grad and are_kept and key.shape == value.shape):
        return False
    rows = query.shape[1] // key.shape[1] * query.shape[-2]
    if attention_mask is None:
        is_plain = query.shape[-2] == 1
    else:  # no learned bias
        is_plain = attention_mask.shape[1] == 1 and not attention_mask.requires_grad
    return is_plain and query.shape[-2] < key.shape[-2] and rows <= key.shape[-1]


@torch.compiler.disable  # as GrowingLayer.update
def _attend_in_factors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        if not hasattr(attention_mask, "hidden"):  # all layers of a pass have the same mask
            attention_mask.hidden = ~attention_mask
        attention_mask = attention_mask.hidden
    return _Attend.apply(query, key, value, attention_mask, dropout, scaling)


class _Attend(torch.autograd.Function):
    """softmax(scaling Q K^T + mask) V, over what a GrowingLayer has returned. The gradients of keys and values are left
    in its memory as factors.

    Keys and values are inputs for the sake of the graph only: it makes this come before the backward of _Append. A bool
    mask says what is hidden.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, dropout: float, scaling: float):
        ctx.memory, ctx.scaling, ctx.dropout, ctx.columns = key.memory, scaling, dropout, query.shape[-2]
        ctx.memory.products += 1
        ctx.key = (key.shape[-2] - ctx.columns, ctx.memory.products)
        with torch.autocast(query.device.type, enabled=False):  # it would cast all keys in each pass
            rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).to(key.dtype)  # (B, H, G t, d)
            scores = _product(rows, key.mT, scaling)  # (B, H, G t, L)
            if mask is not None:
                by_head = scores.unflatten(2, (-1, ctx.columns))  # (B, H, G, t, L)
                if mask.dtype == torch.bool:  # not -inf: in a window of padding there may be no column left
                    by_head.masked_fill_(mask[:, :, None], torch.finfo(scores.dtype).min)
                else:
                    by_head.add_(mask[:, :, None])
            weights = torch._softmax(scores, -1, False)
            seen, kept = torch.native_dropout(weights, dropout, True) if dropout else (weights, None)
            seen = seen.to(value.dtype)
            found = seen @ value  # (B, H, G t, d)
        ctx.save_for_backward(rows, key, value, weights, seen, kept)
        return found.unflatten(2, (-1, ctx.columns)).flatten(1, 2).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        rows, key, value, weights, seen, kept = ctx.saved_tensors
        result = gradient.transpose(1, 2).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, H, G t, d)
        gradient = _product(result, value.mT, ctx.scaling).to(weights.dtype)  # of all that follows, scaled
        if kept is not None:
            gradient = torch.ops.aten.native_dropout_backward(gradient, kept, 1 / (1 - ctx.dropout))
        scores = torch._softmax_backward_data(gradient, weights, -1, weights.dtype)  # (B, H, G t, L)
        ctx.memory.begin()
        ctx.memory.factors[ctx.key] = (scores, rows, seen, result)
        query = scores @ key  # (B, H, G t, d)
        return query.unflatten(2, (-1, ctx.columns)).flatten(1, 2), None, None, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right, of (B, H, ., .), in one kernel."""
    product = torch.baddbmm(left.new_empty(()), left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=scale)
    return product.unflatten(0, left.shape[:2])
