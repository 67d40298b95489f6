"""Gradient checkpointing of decoder blocks that read and write a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from model.kv_cache import GrowingLayer


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Makes the blocks keep only their inputs and run again in the backward pass. transformers' own gradient
    checkpointing disables the cache, without which a latent pass would not see the columns before it."""
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable, *args, **kwargs):
    """One block's forward. A block may run several times in a pass, each time with other layers of the cache."""
    if not is_grad_enabled():
        return forward(*args, **kwargs)
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    layers = list(cache.layers) if cache is not None else []
    begin = [_state_of(layer) for layer in layers]
    replays = False

    def run(*args):
        nonlocal replays
        with ExitStack() as stack:
            if replays:
                for layer, state in zip(layers, begin, strict=True):
                    stack.enter_context(_replayed_from(layer, state))
            replays = True
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False)


def _state_of(layer) -> int | dict:
    """Returns the current contents of a layer of the cache."""
    if isinstance(layer, GrowingLayer):
        return layer.get_seq_length()
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}


@contextmanager
def _replayed_from(layer, state: int | dict) -> Iterator[None]:
    """Resets a layer of the cache to `state`, so that a pass can run again; afterwards restores the present
    contents."""
    if isinstance(layer, GrowingLayer):
        with layer.replayed_from(state) if layer.is_initialized else nullcontext():
            yield
        return
    now = _state_of(layer)
    layer.__dict__ = state  # layers replace their tensors and never write into them
    try:
        yield
    finally:
        layer.__dict__ = now
