"""Where a batch has latents and padding, and the attention mask that follows from it.

A collated row is `question | padding | latents ... | padding`: the first latents of all rows are in one column.
Causality hides the padding from the question, so the first span, which is most of a sequence, needs no mask, and
attention kernels can skip its upper triangle. Prompts for generation are padded on the left.

Legend: B rows, T columns of a batch, t columns of a pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dataset import latent_columns as find_latent_columns


class Rows(NamedTuple):
    """A batch in the layout of the passes. All tensors are (B, T) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    columns: list[int]  # columns with a latent in at least one row
    before: torch.Tensor | None  # (B,) column of the token before the first latent; None: columns[0] - 1 in every row
    masks: tuple[bool, bool]  # whether tokens of the first span, and of later spans, have padding before them
    restore: torch.Tensor | None = None  # (B, columns[0]) original columns of what precedes the first latent

    def part(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Returns attention mask, positions and `masked` of the columns begin to end, as Backbone.span takes them."""
        is_question = not self.columns or end <= self.columns[0]
        masked = self.masks[0 if is_question else 1]
        return self.attention_mask[:, :end], self.position_ids[:, begin:end], masked


def lay_out(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    latent_token_id: int | None,
    padding_first: bool,
    latent_columns: list[int] | None = None,
    prefix_lengths: torch.Tensor | None = None,
) -> Rows:
    """Returns the arguments of Coconut's forward with their defaults filled in.

    padding_first: whether the family needs padding before the question (see Backbone.makes_masks); rows with latents
    are rearranged accordingly. The columns from the first latent on stay in place. Raises ValueError for a latent in
    the first column, and for padding directly before a latent unless all rows' first latents are in one column.
    """
    is_collated = latent_columns is not None
    columns = latent_columns if is_collated else find_latent_columns(input_ids, latent_token_id)
    if columns and columns[0] == 0:
        raise ValueError("a sequence must not begin with a latent token: a thought needs a position before it")
    first = columns[0] if columns else input_ids.shape[1]
    if attention_mask is None:
        attention_mask, is_collated = torch.ones_like(input_ids), True
    attention_mask = attention_mask.long()  # a caller's may be bool or float
    if position_ids is None:
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0) * attention_mask
    if not is_collated:
        if columns:
            is_latent = input_ids[:, first:] == latent_token_id
            is_padding = ~is_latent & (attention_mask[:, first:] == 0)
            if (is_padding[:, :-1] & is_latent[:, 1:]).any():
                raise ValueError("padding before a latent: put the first latents of all rows in one column")
        before, masks = last_attended(attention_mask[:, :first]), (True, True)
    else:
        before = None if prefix_lengths is None else prefix_lengths - 1
        masks = (False, prefix_lengths is not None)
    rows = Rows(input_ids, attention_mask, position_ids, columns, before, masks)
    if columns and padding_first:
        has_latents = (input_ids == latent_token_id).any(dim=1, keepdim=True)
        order = rows.attention_mask[:, :first].argsort(dim=1, stable=True)  # padding, then tokens
        order = torch.where(has_latents, order, torch.arange(first, device=order.device))
        rows = _moved(rows, order)._replace(before=None)
    return rows


def lay_out_prompts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    latent_token_id: int | None,
    padding_first: bool,
) -> Rows:
    """Same as `lay_out`, for prompts that are padded on the left. Waits for the device."""
    rows = lay_out(input_ids, attention_mask, position_ids, latent_token_id, padding_first)
    if rows.attention_mask.all():
        return rows._replace(before=None, masks=(False, False))
    first = rows.columns[0] if rows.columns else input_ids.shape[1]
    mask = rows.attention_mask[:, :first]
    if not padding_first and (mask[:, 1:] >= mask[:, :-1]).all():
        # move padding behind the question: causality hides it, so attention needs no mask
        lengths = mask.sum(dim=1)
        rows = _moved(rows, mask.argsort(dim=1, descending=True, stable=True))
        rows = rows._replace(before=(lengths - 1).clamp(min=0), masks=(False, True))
    return rows


def column_of(values: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """(B, t, ...) -> (B, 1, ...): one column of each row, given as (B,); None: the last."""
    return values[:, -1:] if columns is None else take(values, columns[:, None])


def joined(spans: list[torch.Tensor]) -> torch.Tensor:
    return spans[0] if len(spans) == 1 else torch.cat(spans, dim=1)


def _moved(rows: Rows, order: torch.Tensor) -> Rows:
    """Returns the rows with their first columns in the order (B, t)."""
    tensors = [_reordered(values, order) for values in (rows.input_ids, rows.attention_mask, rows.position_ids)]
    return Rows(*tensors, rows.columns, rows.before, rows.masks, restore=order.argsort(dim=1))


def _reordered(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns (B, T, ...) values with their first columns in the order (B, t)."""
    first = order.shape[1]
    return torch.cat([take(values[:, :first], order), values[:, first:]], dim=1)


def restored(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns (B, T, ...) values in the caller's order of columns."""
    return values if rows.restore is None else _reordered(values, rows.restore)


def causal_mask(attention_mask: torch.Tensor, length: int, masked: bool) -> torch.Tensor | None:
    """Returns the attention mask, (B, 1, length, T) bool, of the last `length` columns of attention_mask, (B, T).

    transformers would make the same mask, but asks the device whether a row is padded. None leaves causality to the
    attention kernel, which handles spans of the whole sequence and of one column. Padding attends to itself, because a
    softmax over nothing is NaN.
    """
    end = attention_mask.shape[1]
    if not masked and length in (1, end):
        return None
    if length == 1:
        return F.pad(attention_mask[:, None, None, :-1].bool(), (0, 1), value=True)
    key = torch.arange(end, device=attention_mask.device)
    query = key[end - length :, None]
    return (key <= query) & (attention_mask[:, None, None, :].bool() | (key == query))


def take(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns the columns (B, t) of values (B, T, ...), as (B, t, ...)."""
    return values.gather(1, columns if values.ndim == 2 else columns[..., None].expand(-1, -1, values.shape[-1]))


def last_attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the last unpadded column of each row, (B,); the last column if a row is all padding."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)
