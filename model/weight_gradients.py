"""Computes the weight gradients of all one-column passes at once.

A latent pass has few rows, and its gradient of a weight is as large as the weight: in each pass autograd writes one and
adds it to the others. Here the linear layers keep the inputs and output gradients of all one-column passes, and one
matrix product makes the weight's gradient.

Legend: B rows, D inputs and F outputs of a linear layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


def defer_weight_gradients(decoder: nn.Module, blocks: Iterable[nn.Module], compiled: bool = False) -> None:
    """Defers the weight gradients of the linear layers in the blocks. Not for checkpointed blocks, whose forward runs
    again in the backward pass.

    compiled: whether the blocks are compiled. Their one-column passes then run in eager mode: compiled ones would add
        up weight gradients pass by pass, and their Python takes longer (docs/performance.md).
    """
    layers = {layer for block in blocks for layer in block.modules()}
    layers = [layer for layer in layers if getattr(type(layer), "forward", None) in (nn.Linear.forward, Conv1D.forward)]
    passes = _Passes(layers, compiled)
    for layer in layers:
        layer.forward = partial(passes.linear, layer, layer.forward)
    if layers:
        decoder.forward = partial(passes.run, decoder.forward)


class _Passes:
    """Runs the decoder's passes. The passes of one Coconut forward share a cache object, and so its `_Weights`."""

    def __init__(self, layers: list[nn.Module], compiled: bool):
        self.layers, self.compiled = layers, compiled
        self.weights: _Weights | None = None  # of the current pass
        self.has_one_column = False

    def run(self, forward: Callable, *args, **keys):
        """Replaces the decoder's forward."""
        cache, embeds = keys.get("cache", keys.get("past_key_values")), keys.get("inputs_embeds")
        if cache is None or embeds is None or not torch.is_grad_enabled():
            return forward(*args, **keys)
        self.has_one_column = embeds.shape[1] == 1 and hasattr(cache, "weights")  # the first pass is left to autograd
        self.weights = vars(cache).setdefault("weights", _Weights())
        if self.has_one_column:
            keys["inputs_embeds"] = _Begin.apply(embeds, self.weights.link(self.layers))
        in_eager_mode = self.compiled and self.has_one_column
        try:
            with torch.compiler.set_stance("force_eager") if in_eager_mode else nullcontext():
                return forward(*args, **keys)
        finally:
            self.weights = None

    def linear(self, layer: nn.Module, forward: Callable, inputs: torch.Tensor) -> torch.Tensor:
        """Replaces a linear layer's forward."""
        if torch.compiler.is_compiling():  # a pass of several columns
            return forward(inputs)
        has_gradient = torch.is_grad_enabled() and inputs.requires_grad and layer.weight.requires_grad
        if self.weights is None or not has_gradient:
            return forward(inputs)
        weight, bias = self.weights.of(layer, inputs.device.type)
        if not self.has_one_column:
            return F.linear(inputs, weight, bias)
        outputs = F.linear(inputs, weight.detach(), None if bias is None else bias.detach())
        outputs.register_hook(partial(self.weights.kept.add, layer, inputs.detach()))
        return outputs


class _Weights:
    """The weights as the passes of one Coconut forward use them."""

    def __init__(self):
        self.kept = _Kept()
        self._link: torch.Tensor | None = None
        self._cast: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def of(self, layer: nn.Module, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns weight (F, D) and bias (F,) in autocast's dtype, cast once: autocast would cast a detached weight
        again in each pass."""
        if layer not in self._cast:
            weight, bias = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight, layer.bias
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            self._cast[layer] = weight, bias
        return self._cast[layer]

    def link(self, layers: list[nn.Module]) -> torch.Tensor:
        """Returns a scalar that depends on the weights. The one-column passes depend on it, so that autograd runs
        _Products' backward after theirs."""
        if self._link is None:
            self._link = _Products.apply(self.kept, layers, *(weight for layer in layers for weight in _parts(layer)))
        return self._link


class _Kept:
    """The inputs (B, 1, D) and output gradients (B, 1, F) of the linear layers in one backward pass."""

    def __init__(self):
        self.backward_pass = -1  # autograd's id
        self.pairs: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def add(self, layer: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        if self.backward_pass != torch._C._current_graph_task_id():  # an unfinished one may have left some
            self.backward_pass, self.pairs = torch._C._current_graph_task_id(), defaultdict(list)
        assert self.pairs is not None, "a layer's gradient came after those of its pass's input embeddings"
        self.pairs[layer].append((inputs, gradient))

    def take(self) -> dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
        pairs, self.pairs = self.pairs, None
        return pairs if pairs and self.backward_pass == torch._C._current_graph_task_id() else {}


class _Begin(torch.autograd.Function):
    """Passes the input embeddings through. Its backward ends the backward of a pass; _Products' comes after those of
    all passes."""

    @staticmethod
    def forward(ctx, embeds: torch.Tensor, link: torch.Tensor):
        ctx.set_materialize_grads(False)
        return embeds.view_as(embeds)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor | None):
        return gradient, None


class _Products(torch.autograd.Function):
    """Returns a scalar; its backward multiplies what the one-column passes have kept into gradients of weights and
    biases."""

    @staticmethod
    def forward(ctx, kept: _Kept, layers: list[nn.Module], *parameters: torch.Tensor):
        ctx.set_materialize_grads(False)
        ctx.kept, ctx.layers = kept, layers
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        gradients, kept = [], ctx.kept.take()
        for layer in ctx.layers:
            if pairs := kept.get(layer):
                inputs, outputs = (
                    torch.cat([rows.flatten(0, -2) for rows in side]) for side in zip(*pairs, strict=True)
                )
                inputs = inputs.to(outputs.dtype)
                gradients.append(inputs.T @ outputs if isinstance(layer, Conv1D) else outputs.T @ inputs)
                gradients += [outputs.sum(0)] if layer.bias is not None else []
            else:
                gradients += [None] * len(_parts(layer))
        return None, None, *gradients


def _parts(layer: nn.Module) -> list[nn.Parameter]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
