"""The columns of a batch, [B, S], and the tokens in them as packed rows. This file travels with an exported model.

Padding may stand anywhere. A row of the batch may hold several sequences, one after the other, if `position_ids` begin
at 0 with each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache_mor import MoRCache
from .rows_mor import Rows


@dataclass(frozen=True)
class Columns:
    """Which columns hold which rows."""

    shape: tuple[int, int]
    """(B, S)."""
    rows: Rows
    real: Tensor | None
    """[B, S] bool, false at padding; None: there is none."""
    index: Tensor | None
    """[T] places of the rows among the B*S columns; None: all of them."""

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: MoRCache | None,
        device: torch.device,
    ) -> Columns:
        """Of one call of the model.

        Args:
            shape: (B, S) of the new columns.
            attention_mask: [B, at least S], 0 at padding, or none.
            position_ids: [B or 1, S], or none; what stands at padding does not matter.
            cache: of earlier tokens.
        Raises:
            ValueError: these do not fit each other.
        """
        batch, columns = shape
        real, lengths = _real_columns(attention_mask, batch, columns)
        past = cache.lengths if cache is not None and not cache.is_empty else (0,) * batch
        if len(past) != batch:
            raise ValueError(f"cache holds {len(past)} sequences and input_ids {batch}: give both the same")
        if real is None:
            index = None
            sequence = torch.arange(batch, device=device).repeat_interleave(columns)
        else:
            index = torch.nonzero_static(real.flatten(), size=sum(lengths)).squeeze(1)
            sequence = index // columns
        rows = Rows.of(sequence, past, lengths)
        if position_ids is not None:
            if position_ids.shape not in ((batch, columns), (1, columns)):
                raise ValueError(f"position_ids is {list(position_ids.shape)}: give [{batch}, {columns}]")
            positions = position_ids.expand(batch, columns).flatten()
            rows = _bounded(rows, positions if index is None else positions[index], sum(past))
        return cls(shape, rows, real, index)

    @property
    def is_packed(self) -> bool:
        """Whether a row of the batch holds several sequences."""
        return len(self.rows.lengths) > self.shape[0]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, H] -> [T, H]."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def mark(self, values: Tensor, padding: int) -> Tensor:
        """[T] -> [B, S], with `padding` at padding."""
        if self.index is not None:
            values = values.new_full((self.shape[0] * self.shape[1],), padding).index_copy(0, self.index, values)
        return values.view(self.shape)

    def spread(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [B, S, H]: a padding column shows the last real token before it, so that the last column of a
        right-padded sequence is where its continuation is read; 0 where there is none."""
        if self.real is not None:
            within = self.real.cumsum(1)
            counts = within[:, -1]
            index = within - 1 + (counts.cumsum(0) - counts).unsqueeze(1)
            shown = hidden[index.clamp(min=0, max=len(hidden) - 1)]
            hidden = shown.masked_fill((within == 0).unsqueeze(2), 0.0)
        return hidden.view(*self.shape, -1)


def predictable(labels: Tensor, real: Tensor, position_ids: Tensor | None) -> Tensor:
    """Labels that a token of the same sequence predicts in this call; -100 at others: at padding, where a sequence
    begins.

    Args:
        labels, real: [B, S].
        position_ids: as the model was given them.
    """
    begins = real.cumsum(1) == 1
    if position_ids is not None:
        begins = begins | (position_ids == 0)
    return labels.masked_fill(begins | ~real, -100)


def _real_columns(attention_mask: Tensor | None, batch: int, columns: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """Which of the new columns are no padding, None if all are; and how many of each sequence."""
    if attention_mask is None:
        return None, (columns,) * batch
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}: give [{batch}, {columns} or more], 0 at padding"
        )
    real = attention_mask[:, -columns:].bool()
    lengths = tuple(real.sum(1).tolist())
    if not any(lengths):
        raise ValueError("attention_mask has no real token among the new columns: give at least one")
    return (None if min(lengths) == columns else real), lengths


def _bounded(rows: Rows, positions: Tensor, past: int) -> Rows:
    """The rows themselves, if `positions` [T] are theirs; or rows of more sequences, one from each position 0 on."""
    if torch.equal(positions, rows.position):
        return rows
    sequence = (positions == 0).cumsum(0) - 1
    if past == 0 and bool((positions[rows.offset == 0] == 0).all()):
        bounded = Rows.of(sequence, *_new_sequences(sequence))
        if torch.equal(positions, bounded.position):
            return bounded
    raise ValueError(
        "position_ids count neither the real tokens of each sequence nor those of several in a row, each from 0: "
        "leave them out, for they follow from attention_mask"
    )


def _new_sequences(sequence: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    lengths = torch.bincount(sequence).tolist()
    return (0,) * len(lengths), tuple(lengths)


__all__ = ["Columns", "predictable"]
