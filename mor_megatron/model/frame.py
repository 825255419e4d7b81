"""Rows of a pass laid out for attention, sequence beside sequence, and what each of them sees.

A new shape is dear for cuDNN, which makes a plan for it: the length of a frame follows from few possible values, unless
it is to be exact. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.model.ranges import Ranges, ranges
from mor_megatron.recursion.dispatch import ActiveTokens, GatherRows, ScatterRows

STEP = 256
"""A frame's length is a multiple of this."""


@dataclass
class Frame:
    """The active rows in a tensor [length, B, ...].

    In a compact frame, row i of a sequence stands in slot i, and empty slots follow: among the rows, plain causal
    attention keeps these out of sight. In a spread frame, a row stands at its position, among all tokens, and plain
    causal attention shows it the keys of all earlier tokens. Every row sees a range of keys, because rows are in causal
    order and a document's tokens follow each other.
    """

    active: ActiveTokens
    documents: Tensor | None
    """[B, S]; None: one document."""
    keys_of_all: bool
    """Keys are those of all S tokens, not of the rows."""
    dtype: torch.dtype = torch.float32
    """Of the mask."""
    spread: bool = False
    exact: bool = False
    """No more slots than the longest sequence has rows."""

    @cached_property
    def length(self) -> int:
        """Slots of a sequence."""
        active = self.active
        if self.spread:
            return active.seq_length
        rows = max(1, *active.lengths) if active.ragged else active.shape[0]
        return rows if self.exact else -(-rows // STEP) * STEP

    @property
    def num_keys(self) -> int:
        """Keys of a sequence, those of empty slots included."""
        return self.active.seq_length if self.keys_of_all else self.length

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """First ragged row of each sequence, and T, [B + 1] int32."""
        sequences = self.active.sequences.view(-1)  # non-decreasing
        return torch.searchsorted(
            sequences, torch.arange(self.active.batch_size + 1, device=sequences.device), out_int32=True
        )

    def put(self, rows: Tensor) -> Tensor:
        """Rows [R, C, heads, D] -> [length, B, heads, D], with zeros in empty slots."""
        active = self.active
        if self._slots is None:
            empty = self.length - rows.shape[0]
            return F.pad(rows, (0, 0, 0, 0, 0, 0, 0, empty)) if empty else rows
        frame = ScatterRows.apply(rows.flatten(0, 1), self._slots, self.length * active.batch_size)
        return frame.view(self.length, active.batch_size, *rows.shape[2:])

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of all three -> frames; keys and values of all tokens stay as they are, [S, B, G, D]."""
        if self.keys_of_all:
            return self.put(query), key, value
        return self.put(query), self.put(key), self.put(value)

    def take(self, frame: Tensor) -> Tensor:
        """[length, B, W] -> rows [R, C, W]."""
        rows, columns = self.active.shape
        if self._slots is None:
            return frame[:rows] if rows < self.length else frame
        return GatherRows.apply(frame.flatten(0, 1), self._slots).view(rows, columns, -1)

    @cached_property
    def visible(self) -> tuple[Tensor, Tensor]:
        """First and last key that each slot sees, [B, length] int32; an empty slot sees none, 0 to -1."""
        active = self.active
        if self.spread:
            last = torch.arange(self.length, device=self._device).expand(active.batch_size, -1)
        else:
            last = self._place(active.positions if self.keys_of_all else self._offsets)
        first = torch.zeros_like(last)
        if self.documents is not None:
            documents = self.documents
            if not self.keys_of_all and active.rows is not None:
                documents = self._place(documents[active.sequences, active.positions])
            index = torch.arange(documents.shape[1], device=documents.device)
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            start = torch.where(begins, index, 0).cummax(1).values  # of each key's document
            first = start.gather(1, last.clamp(min=0))  # a row's own key is the last that it sees
        return first.int(), last.int()

    @cached_property
    def mask(self) -> Tensor | None:
        """Additive mask [B, 1, length, keys]; None: plain causal attention is the same."""
        if self.documents is None and (self.spread or not self.keys_of_all):
            return None
        first, last = self.visible
        keys = torch.arange(self.num_keys, device=first.device)
        seen = keys <= last.clamp(min=0).unsqueeze(2)  # an empty slot sees one key: softmax of nothing is not a number
        if self.documents is not None:
            seen &= first.unsqueeze(2) <= keys
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)

    @cached_property
    def ranges(self) -> Ranges:
        """What each slot sees, for range attention."""
        return ranges(*self.visible, self.num_keys)

    @cached_property
    def packed_ranges(self) -> Ranges:
        """Ragged rows as they stand, as if of one sequence: each sees those of its own up to itself."""
        sequences = self.active.sequences.view(1, -1)
        last = torch.arange(sequences.shape[1], dtype=torch.int32, device=sequences.device).unsqueeze(0)
        return ranges(self.cu_seqlens[sequences], last, sequences.shape[1])

    @property
    def _device(self) -> torch.device:
        return self.documents.device if self.active.rows is None else self.active.rows.device

    @cached_property
    def _offsets(self) -> Tensor:
        """Index of each row among those of its sequence, shaped like `active.rows` or [k, B]."""
        rows, columns = self.active.shape
        index = torch.arange(rows, device=self._device).unsqueeze(1)
        if not self.active.ragged:
            return index.expand(-1, columns)
        return index - self.cu_seqlens[self.active.sequences]

    @cached_property
    def _slots(self) -> Tensor | None:
        """Row of the flattened frame in which each row stands, [R * C]; None: the rows are its first ones."""
        active = self.active
        if active.rows is not None and self.spread:
            return active.rows.view(-1)
        if active.ragged and active.batch_size > 1:
            return (self._offsets * active.batch_size + active.sequences).view(-1)
        return None

    def _place(self, values: Tensor) -> Tensor:
        """Integers [R, C] of the rows -> [B, length], -1 in empty slots."""
        batch = self.active.batch_size
        if self._slots is None:
            return F.pad(values, (0, 0, 0, self.length - values.shape[0]), value=-1).t().contiguous()
        frame = values.new_full((self.length * batch,), -1).index_copy(0, self._slots, values.reshape(-1))
        return frame.view(self.length, batch).t().contiguous()
