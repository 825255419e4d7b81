"""Tokens as packed rows: the form in which every layer of the model sees them.

The real tokens of a batch lie one after the other, sequence after sequence, [T, ...]. Padding is nowhere among them:
it costs nothing, is never routed, and is never stored. This file travels with an exported model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which tokens some rows are of, in causal order within each sequence."""

    sequence: Tensor
    """[T] int64, non-decreasing."""
    position: Tensor
    """[T] int64: index among the real tokens of its sequence."""
    lengths: tuple[int, ...]
    """Rows of each sequence of the batch; known to the host, so that no layer has to ask the device."""
    index: Tensor | None = None
    """[T] places among all rows of the call, ascending; None: these are all."""

    @classmethod
    def of(cls, sequence: Tensor, past: tuple[int, ...], lengths: tuple[int, ...]) -> Rows:
        """New tokens of sequences that have had `past` tokens before.

        Args:
            sequence: [T], non-decreasing.
            past, lengths: tokens of each sequence, before and now.
        """
        starts = torch.tensor(past, device=sequence.device) - _starts(lengths, sequence.device)
        return cls(sequence, starts[sequence] + torch.arange(len(sequence), device=sequence.device), lengths)

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def select(self, index: Tensor) -> Rows:
        """The subset at `index` [T'], ascending."""
        if len(index) == len(self):
            return self
        sequence = self.sequence[index]
        lengths = torch.bincount(sequence, minlength=len(self.lengths)).tolist()
        return Rows(sequence, self.position[index], tuple(lengths), self.places(index))

    def places(self, index: Tensor) -> Tensor:
        """[T'] places of the rows at `index` among all rows of the call."""
        return index if self.index is None else self.index[index]

    def take(self, everything: Tensor) -> Tensor:
        """Of all rows of the call, these: [.., ...] -> [T, ...]."""
        return everything if self.index is None else everything[self.index]

    def put(self, everything: Tensor, own: Tensor) -> Tensor:
        """All rows of the call, with these [T, ...] in their places."""
        return own if self.index is None else everything.index_copy(0, self.index, own)

    @cached_property
    def offset(self) -> Tensor:
        """[T]: index of each row among the rows of its sequence."""
        return (
            torch.arange(len(self), device=self.sequence.device)
            - _starts(self.lengths, self.sequence.device)[self.sequence]
        )

    @cached_property
    def present(self) -> tuple[int, ...]:
        """Sequences that have rows."""
        return tuple(b for b, length in enumerate(self.lengths) if length > 0)

    @cached_property
    def column(self) -> Tensor:
        """[T]: index of each row's sequence in `present`."""
        if len(self.present) == len(self.lengths):
            return self.sequence
        rank = torch.zeros(len(self.lengths), dtype=torch.int64, device=self.sequence.device)
        rank[list(self.present)] = torch.arange(len(self.present), device=rank.device)
        return rank[self.sequence]

    @cached_property
    def longest(self) -> int:
        """Most rows of a sequence."""
        return max(self.lengths)

    @cached_property
    def slots(self) -> Tensor | None:
        """[T]: place of each row in a right-padded [present, longest] layout; None where that is the same order."""
        if len(self) == len(self.present) * self.longest:
            return None
        return self.column * self.longest + self.offset

    def pad(self, packed: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] -> [present, longest, ...]: right padding, which causal attention never looks at."""
        shape = (len(self.present), self.longest, *packed.shape[1:])
        if self.slots is None:
            return packed.reshape(shape)
        padded = packed.new_full((shape[0] * shape[1], *shape[2:]), fill)
        return padded.index_copy(0, self.slots, packed).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """[present, longest, ...] -> [T, ...]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.slots is None else flat[self.slots]

    def per_sequence(self, values: Tensor) -> Tensor:
        """Mean over the rows of each present sequence: [T, W] -> [present, W]."""
        totals = values.new_zeros(len(self.present), values.shape[1]).index_add(0, self.column, values)
        counts = torch.tensor([self.lengths[b] for b in self.present], device=values.device, dtype=values.dtype)
        return totals / counts.unsqueeze(1)


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[B]: first row of each sequence."""
    counts = torch.tensor(lengths, device=device)
    return counts.cumsum(0) - counts


__all__ = ["Rows"]
