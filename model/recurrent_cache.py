"""Cached states of recurrences and convolutions that let gradients through.

Legend: B rows, C channels, t columns of a pass, K columns that a convolution keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)


class State(torch.Tensor):
    """The state of a recurrence or a convolution. A model's in-place copy into it replaces the cache's state instead;
    the tensor itself stays unchanged for the backward of earlier passes."""

    replace: Callable[[torch.Tensor], None]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_ and isinstance(args[0], cls):
            args[0].replace(args[1].to(args[0].dtype))
            return args[0]
        plain = partial(tree_map_only, cls, lambda state: state.as_subclass(torch.Tensor))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*plain(args), **plain(kwargs or {}))


class _Replacing:
    """Replaces the states of recurrences and convolutions in each pass. transformers' own layers copy new states into
    the tensors of the previous pass, whose backward still needs the old values."""

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_
    ) -> torch.Tensor:
        """Adds (B, C, t) inputs of a convolution over C channels; returns them after the K kept columns."""
        if self.has_previous_state[state_idx]:
            whole = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        else:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx, conv_kernel_size=size)
            self.has_previous_state[state_idx] = True
            whole = F.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self._keep("conv_states", state_idx, whole[..., -self.conv_kernel_size[state_idx] :])
        return whole

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_) -> torch.Tensor:
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        self._keep("recurrent_states", state_idx, recurrent_states)
        return recurrent_states

    def _keep(self, name: str, index: int, states: torch.Tensor) -> None:
        state = states.as_subclass(State)
        owner = weakref.ref(self)  # a reference cycle would keep the memory until the next garbage collection
        state.replace = lambda states: owner()._keep(name, index, states)
        getattr(self, name)[index] = state


# layers that write into earlier states -> layers that replace them
STATEFUL = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
REPLACING_LAYERS = {layer: type(f"Replacing{layer.__name__}", (_Replacing, layer), {}) for layer in STATEFUL}
