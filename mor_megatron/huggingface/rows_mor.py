"""Tokens as packed rows: the form in which every layer of the model sees them.

The real tokens of a batch lie one after the other, sequence after sequence, [T, ...]. Padding is nowhere among them:
it costs nothing, is never routed, and is never stored.

Where an accelerator decodes a batch, the host does not wait to know which rows go on. All do, and what is computed for
those that have left is dropped (`Rows.live`): a pass over few rows reads as many weights as one over more. This file
travels with an exported model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.recursion.host import OnHost, on_device
from mor_megatron.recursion.routing import TIE, kept


@dataclass(frozen=True)
class Rows:
    """The tokens that a set of rows holds, in causal order within each sequence."""

    sequence: Tensor
    """[T] int64, non-decreasing."""
    position: Tensor
    """[T] int64: index among the real tokens of its sequence."""
    lengths: tuple[int, ...]
    """Rows of each sequence of the batch; known to the host, so that no layer has to ask the device."""
    index: Tensor | None = None
    """[T] places among all rows of the call, ascending; None: these are all."""
    of_call: tuple[int, ...] | None = None
    """Rows of each sequence in the call, where these are not all."""
    live: Tensor | None = None
    """[T] bool: which of these rows are active; None: all. Others are computed, and never put back."""
    deferred: bool = False
    """The host asks for several sets at once which rows are active. Until then all rows stay, marked by `live`."""

    @classmethod
    def of(cls, sequence: Tensor, past: tuple[int, ...], lengths: tuple[int, ...]) -> Rows:
        """New tokens of sequences that have had `past` tokens before.

        Args:
            sequence: [T], non-decreasing.
            past, lengths: tokens of each sequence, before and now.
        """
        starts = on_device(past, sequence.device) - _starts(lengths, sequence.device)
        return cls(sequence, starts[sequence] + torch.arange(len(sequence), device=sequence.device), lengths)

    @property
    def settled(self) -> bool:
        """Whether all of these rows are active."""
        return self.live is None

    @property
    def count(self) -> int:
        """T."""
        return len(self)

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def select(self, index: Tensor, lengths: tuple[int, ...]) -> Rows:
        """The subset at `index` [T'], ascending, of so many rows of each sequence."""
        if len(index) == len(self):
            return self
        of_call = self.of_call or self.lengths
        places = self.places(index)
        return Rows(self.sequence[index], self.position[index], lengths, places, of_call, deferred=self.deferred)

    def places(self, index: Tensor) -> Tensor:
        """[T'] places of the rows at `index` among all rows of the call."""
        return index if self.index is None else self.index[index]

    def take(self, values: Tensor) -> Tensor:
        """Of all rows of the call, these: [.., ...] -> [T, ...]."""
        return values if self.index is None else values[self.index]

    def put(self, values: Tensor, own: Tensor) -> Tensor:
        """All rows of the call, with these [T, ...] in their places."""
        if self.live is not None:
            own = torch.where(self.live.view(-1, *(1,) * (own.ndim - 1)), own, self.take(values))
        return own if self.index is None else values.index_copy(0, self.index, own)

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
        rank = [sum(length > 0 for length in self.lengths[:b]) for b in range(len(self.lengths))]
        return on_device(rank, self.sequence.device)[self.sequence]

    @cached_property
    def stays_whole(self) -> bool:
        """Whether it is cheaper to compute all of these rows than to wait for which are active. One sequence alone is
        waited for, for no pass needs to run once it has left."""
        return self.sequence.device.type != "cpu" and self.longest == 1 and len(self) > 1

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
        counts = on_device([self.lengths[b] for b in self.present], values.device)
        return totals / counts.to(values.dtype).unsqueeze(1)


class PackedRows:
    """The `Layout` of these rows: how a routing method moves them. Collected values are [T, W], an index is [T']."""

    def gather(self, hidden: Tensor, active: Rows) -> Tensor:
        """The active rows among all rows of the call [T, H]."""
        return active.take(hidden)

    def combine(self, hidden: Tensor, rows: Tensor, gate: Tensor | None, active: Rows) -> Tensor:
        """All rows, with gate * rows, or rows, added to the active ones."""
        own = active.take(hidden)
        own = own + rows if gate is None else torch.addcmul(own, rows, gate.to(own.dtype))
        return active.put(hidden, own)

    def take(self, rows: Tensor, active: Rows, index: Tensor | None) -> Tensor:
        """The rows at `index` among the active rows."""
        return self.at(rows, index)

    def collect(self, values: Tensor, active: Rows) -> Tensor:
        """All rows are here."""
        return values

    def at(self, values: Tensor, index: Tensor | None) -> Tensor:
        """Values at `index`; all for None."""
        return values if index is None else values[index]

    def of(self, values: Tensor, active: Rows) -> Tensor:
        """Values of the active rows, from one for each row of the call."""
        return active.take(values)

    def counts(self, values: Tensor, active: Rows, bins: int) -> Tensor:
        """Small whole numbers, one for each active row -> how many of each sequence have each value, [B, bins]."""
        chosen = F.one_hot(values, bins)  # [T, bins]
        return chosen.new_zeros(len(active.lengths), bins).index_add_(0, active.sequence, chosen)

    def to_host(self, values: Tensor, active: Rows) -> OnHost | None:
        """Values that the host will read, unless the rows' selection is deferred."""
        return None if active.deferred else OnHost(values)

    def keep(
        self, active: Rows, mask: Tensor, lengths: tuple[int, ...] | None = None, regular: bool = False
    ) -> tuple[Rows, Tensor | None]:
        """The rows where `mask` is true, and their places; None for these: all of them. Without `lengths`, the host
        waits for them, or all rows stay."""
        if active.deferred or (lengths is None and active.stays_whole):
            return replace(active, live=mask if active.live is None else active.live & mask), None
        if lengths is None:
            kept_rows = active.sequence.new_zeros(len(active.lengths)).index_add_(0, active.sequence, mask.long())
            lengths = tuple(kept_rows.tolist())
        if sum(lengths) == len(active):
            return active, None
        index = torch.nonzero_static(mask, size=sum(lengths)).squeeze(1)
        return active.select(index, lengths), index

    def best(self, active: Rows, scores: Tensor, capacity: float) -> tuple[Rows, Tensor | None]:
        """The highest scores [T] of each sequence: a fraction `capacity` of its rows in the call."""
        of_call = active.of_call or active.lengths
        lengths = tuple(min(n, kept(capacity, all_rows)) for n, all_rows in zip(active.lengths, of_call, strict=True))
        padded = active.pad(scores.nan_to_num(), fill=-math.inf)
        mask = best(padded, on_device([lengths[b] for b in active.present], scores.device))
        return self.keep(active, active.unpad(mask), lengths)

    def none(self, active: Rows) -> Rows:
        """No rows."""
        return active.select(active.sequence.new_empty(0), (0,) * len(active.lengths))

    def mask(self, active: Rows) -> Tensor:
        """True at the active rows, for all rows of the call, [T]."""
        everywhere = active.sequence.new_zeros(sum(active.of_call or active.lengths), dtype=torch.bool)
        return active.put(everywhere, torch.ones_like(active.sequence, dtype=torch.bool))

    def means(self, values: Tensor, active: Rows, per_sequence: bool) -> Tensor:
        """Mean of [T, W] over the rows of each present sequence, or over all."""
        return active.per_sequence(values) if per_sequence else values.mean(0)


def best(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mask of the highest scores of each sequence, [B, L]; among equal ones (`TIE`) at the cut, the earlier tokens.

    Args:
        scores: [B, L], -inf at padding.
        wanted: how many of each sequence, [B], at least 1 and at most as many as there are.
    """
    real = scores != -math.inf
    size = scores.masked_fill(~real, 0.0).abs().sum(1, keepdim=True) / real.sum(1, keepdim=True)
    wanted = wanted.unsqueeze(1)
    cut, band = scores.sort(dim=1, descending=True).values.gather(1, wanted - 1), TIE * (1.0 + size)
    above = scores > cut + band
    tied = (scores >= cut - band) & ~above
    return above | (tied & (tied.cumsum(1) <= wanted - above.sum(1, keepdim=True)))


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[B]: first row of each sequence."""
    counts = on_device(lengths, device)
    return counts.cumsum(0) - counts


__all__ = ["PackedRows", "Rows"]
