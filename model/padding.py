"""Where padding is, and what attention has to know of it.

Legend: B rows, T columns of a batch, t columns of a pass.
"""

from __future__ import annotations

import torch


class Shift:
    """Moves the rows of (B, t, ...) to the left, so that their padding stands on the right, and back.

    There no token sees it, and attention needs no mask: its kernels then skip what is not causal, which is half of the
    work, and on GPUs are the flash kernels. The keys in the cache stay where they were moved to; it is their positions,
    not their columns, that attention knows.
    """

    def __init__(self, attention_mask: torch.Tensor):
        length = attention_mask.shape[1]
        column = torch.arange(length, device=attention_mask.device)
        padding = (attention_mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)  # (B, 1)
        self.source, self.target = (column + padding) % length, (column - padding) % length  # (B, t)
        self.last = self.target[:, -1]  # (B,): where what was the last column is

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return _take(values, self.source)

    def back(self, values: torch.Tensor) -> torch.Tensor:
        return _take(values, self.target)


def _take(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, t, ...) -> the given columns of each row; columns is (B, t) int64."""
    return values.gather(1, columns if values.ndim == 2 else columns[..., None].expand(-1, -1, values.shape[-1]))


def is_left_padded(attention_mask: torch.Tensor) -> bool | None:
    """Whether rows are padded on the left; None where padding is elsewhere too. It waits for the device."""
    if attention_mask.all():
        return False
    return True if (attention_mask[:, 1:] >= attention_mask[:, :-1]).all() else None


def causal_mask(attention_mask: torch.Tensor, length: int, masked: bool) -> torch.Tensor | None:
    """What the last `length` of the columns of attention_mask, (B, T), attend to: (B, 1, length, T) bool.

    transformers would make the same mask, but it asks the device whether a row is padded. None leaves causality to the
    attention kernel, which can do it for spans of the whole sequence and of one column. Padding attends to itself: a
    softmax over nothing is no number.
    """
    end = attention_mask.shape[1]
    if not masked and length in (1, end):
        return None
    key = torch.arange(end, device=attention_mask.device)
    query = key[end - length :, None]
    return (key <= query) & (attention_mask[:, None, None, :].bool() | (key == query))


def masks_and_positions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills in the defaults of `forward` and `generate`."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0) * attention_mask.long()
    return attention_mask, position_ids
