"""Where the latents and the padding of a batch are, and what attention has to know of it.

A collated row is `question | padding | latents ... | padding`: the first latents of all rows stand in one column, and
causality hides the padding from the question, so that the first span, which is most of a sequence, needs no mask:
attention kernels then skip what is not causal. Prompts for generation are padded on the left.

Legend: B rows, T columns of a batch, t columns of a pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dataset import latent_columns as find_latent_columns


class Rows(NamedTuple):
    """A batch as the passes take it. All tensors are (B, T) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    columns: list[int]  # those with a latent in at least one row
    before: torch.Tensor | None  # (B,) column of the token before the first latent; None: columns[0] - 1 in every row
    masks: tuple[bool, bool]  # whether a token of the first span, and of the later ones, has padding before it
    restore: torch.Tensor | None = None  # (B, columns[0]): where the columns before the first latent were

    def part(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """What Backbone.span needs for the columns begin to end: attention mask, positions, masked."""
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
    """The arguments of Coconut's forward with their defaults filled in.

    padding_first: whether the family needs padding before the question, see Backbone.makes_masks; in rows with latents
        it is moved there. The columns from the first latent on stay where they are.
    Raises ValueError where a latent stands in the first column.
    """
    is_collated = latent_columns is not None
    columns = latent_columns if is_collated else find_latent_columns(input_ids, latent_token_id)
    if columns and columns[0] == 0:
        raise ValueError("a latent token has no position before it: a sequence must begin with another token")
    first = columns[0] if columns else input_ids.shape[1]
    if attention_mask is None:
        attention_mask, is_collated = torch.ones_like(input_ids), True
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0) * attention_mask.long()
    if not is_collated:
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
    """`lay_out` of prompts that are padded on the left. Waits for the device."""
    rows = lay_out(input_ids, attention_mask, position_ids, latent_token_id, padding_first)
    if rows.attention_mask.all():
        return rows._replace(before=None, masks=(False, False))
    first = rows.columns[0] if rows.columns else input_ids.shape[1]
    mask = rows.attention_mask[:, :first]
    if not padding_first and (mask[:, 1:] >= mask[:, :-1]).all():
        # padding behind the question: causality hides it, and attention needs no mask
        lengths = mask.sum(dim=1)
        rows = _moved(rows, mask.argsort(dim=1, descending=True, stable=True))
        rows = rows._replace(before=(lengths - 1).clamp(min=0), masks=(False, True))
    return rows


def column_of(values: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """(B, t, ...) -> (B, 1, ...): one column of each row, (B,); None: the last."""
    return values[:, -1:] if columns is None else take(values, columns[:, None])


def joined(spans: list[torch.Tensor]) -> torch.Tensor:
    return spans[0] if len(spans) == 1 else torch.cat(spans, dim=1)


def _moved(rows: Rows, order: torch.Tensor) -> Rows:
    """Rows whose first columns are those of `order`, (B, t)."""
    first = order.shape[1]

    def move(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([take(values[:, :first], order), values[:, first:]], dim=1)

    tensors = map(move, (rows.input_ids, rows.attention_mask, rows.position_ids))
    return Rows(*tensors, rows.columns, rows.before, rows.masks, restore=order.argsort(dim=1))


def restored(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(B, T, ...) in the columns that the caller knows."""
    if rows.restore is None:
        return values
    first = rows.restore.shape[1]
    return torch.cat([take(values[:, :first], rows.restore), values[:, first:]], dim=1)


def causal_mask(attention_mask: torch.Tensor, length: int, masked: bool) -> torch.Tensor | None:
    """What the last `length` of the columns of attention_mask, (B, T), attend to: (B, 1, length, T) bool.

    transformers would make the same mask, but it asks the device whether a row is padded. None leaves causality to the
    attention kernel, which can do it for spans of the whole sequence and of one column. Padding attends to itself: a
    softmax over nothing is no number.
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
    """(B, T, ...) -> the columns (B, t) of each row, (B, t, ...)."""
    return values.gather(1, columns if values.ndim == 2 else columns[..., None].expand(-1, -1, values.shape[-1]))


def last_attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,): the last column of each row that is no padding; the last of all where it is nothing else."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)
