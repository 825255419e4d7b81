"""Keys and values of a MoR model between the calls of `generate`: storage, and nothing else.

At (recursion r, layer j) a sequence holds rows of exactly its tokens that were active there. They lie packed, sequence
after sequence, each sequence in a segment of its own that grows by `CHUNK` rows; in a segment, head after head, because
attention reads one head's rows after the other. Layers of one recursion hold rows of the same tokens and share the
layout of their segments. This file travels with an exported model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mor_megatron.recursion.host import OnHost, on_device

from .configuration_mor import MoRConfig
from .rows_mor import Rows

CHUNK = 32
"""Spare rows that a segment gets when it must grow. More are moved more rarely, and wait longer to be used."""
STEP = 256
"""On an accelerator, a segment has a multiple of this many rows, and attention is shown all of them under a mask: its
kernels plan anew for every new shape."""


@dataclass(frozen=True)
class Segments:
    """Where the rows of each sequence lie in a buffer [rows * G, D]."""

    lengths: tuple[int, ...]
    """Rows in use."""
    rooms: tuple[int, ...]
    """Rows there are."""
    heads: int
    """G."""

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Rows before each segment."""
        return tuple(accumulate(self.rooms[:-1], initial=0))

    @property
    def total(self) -> int:
        """Rows of all segments."""
        return sum(self.rooms)

    def places(self, sequence: Tensor, at: Tensor) -> Tensor:
        """Where the heads of the at-th row of a sequence lie: both [...] -> [..., G]."""
        starts, rooms = on_device([self.starts, self.rooms], at.device)[:, sequence].unsqueeze(-1)
        return starts * self.heads + rooms * torch.arange(self.heads, device=at.device) + at.unsqueeze(-1)

    def filled(self, device: torch.device) -> Tensor:
        """Where all rows in use lie, sequence after sequence, [sum of lengths, G]."""
        counts = on_device(self.lengths, device)
        total = sum(self.lengths)
        sequence = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
        return self.places(sequence, torch.arange(total, device=device) - (counts.cumsum(0) - counts)[sequence])


@dataclass(frozen=True)
class Places:
    """Where new rows go."""

    index: Tensor | None
    """[T, G] places in the buffer; None: every sequence gets equally many, at the same place of equal segments."""
    sequences: int
    begin: int

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Put [T, G, D] into a buffer [rows * G, D]."""
        heads, width = new.shape[1:]
        if self.index is not None:
            buffer.index_copy_(0, self.index.flatten().to(buffer.device), new.reshape(-1, width))
            return
        new = new.view(self.sequences, -1, heads, width).transpose(1, 2)
        segments = buffer.view(self.sequences, heads, -1, width)
        segments[:, :, self.begin : self.begin + new.shape[2]] = new


@dataclass(frozen=True)
class Window:
    """A view of the rows of some sequences."""

    segments: Segments
    sequences: tuple[int, ...]
    device: torch.device
    whole: bool = False
    """Show spare rows as well."""

    @cached_property
    def shown(self) -> int:
        """Rows that are shown of each sequence."""
        return max(self.segments.rooms[b] for b in self.sequences) if self.whole else max(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each of these sequences."""
        return tuple(self.segments.lengths[b] for b in self.sequences)

    @cached_property
    def is_even(self) -> bool:
        """Whether all sequences of the batch are here, with equally many rows in equal segments."""
        has_all = len(self.sequences) == len(self.segments.lengths)
        return has_all and len(set(self.lengths)) == len(set(self.segments.rooms)) == 1

    @cached_property
    def index(self) -> Tensor:
        """[sequences, G, shown] places in the buffer; past the end of a sequence stands its last row again."""
        last = on_device(self.lengths, self.device).sub(1).clamp(min=0).unsqueeze(1)
        at = torch.minimum(torch.arange(self.shown, device=self.device), last)
        sequence = on_device(self.sequences, self.device).unsqueeze(1).expand_as(at)
        return self.segments.places(sequence, at).transpose(1, 2)

    def read(self, buffer: Tensor) -> Tensor:
        """[rows * G, D] -> [sequences, G, shown, D], right-padded; copied unless they are even."""
        if self.is_even:
            return self._shaped(buffer, len(self.sequences))[:, :, : self.shown]
        return buffer[self.index]

    def each(self, buffer: Tensor) -> list[Tensor]:
        """[rows * G, D] -> for each sequence its rows [1, G, length, D], nothing copied."""
        heads, lengths = self.segments.heads, self.segments.lengths
        spans = {b: (self.segments.starts[b] * heads, self.segments.rooms[b] * heads) for b in self.sequences}
        return [self._shaped(buffer.narrow(0, *span), 1)[:, :, : lengths[b]] for b, span in spans.items()]

    def _shaped(self, buffer: Tensor, sequences: int) -> Tensor:
        return buffer.view(sequences, self.segments.heads, -1, buffer.shape[-1])


class MoRCache(Cache):
    """Ragged keys and values. It holds values, not graphs: no gradient flows through it.

    Args:
        config: of the model that fills it.
    """

    def __init__(self, config: MoRConfig):
        super().__init__(layers=[])
        self.plan = config.plan
        self.heads = config.num_key_value_heads
        self.reset()

    def reset(self) -> None:
        """Drop all rows."""
        self.depths: Tensor | None = None
        """[B, columns] int8: recursions that each token passed, -1 for padding."""
        self.lengths: tuple[int, ...] = ()
        """Real tokens of each sequence."""
        self.new_are_real = False
        """No padding is among the tokens to come: `generate` appends them."""
        self._layouts: dict[int | None, Segments] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._assumed: dict[int, tuple[int, ...]] = {}
        self._passed: OnHost | None = None

    @property
    def _segments(self) -> dict[int | None, Segments]:
        """Segments of each recursion. A row that was stored before it was known to be active is counted now, if it
        was."""
        if self._passed is not None:
            for group, before in self._assumed.items():
                lengths = tuple(n + (depth > group) for n, depth in zip(before, self._passed.values, strict=True))
                self._layouts[group] = replace(self._layouts[group], lengths=lengths)
            self._assumed, self._passed = {}, None
        return self._layouts

    @property
    def is_empty(self) -> bool:
        return self.depths is None

    def nbytes(self) -> int:
        """Bytes of all key and value buffers, spare rows included."""
        return sum(buffer.numel() * buffer.element_size() for pair in self._buffers.values() for buffer in pair)

    def counts(self) -> dict[int | None, tuple[int, ...]]:
        """Rows that each sequence holds in every layer of a recursion; None stands for the layers that run once."""
        return {group: segments.lengths for group, segments in self._segments.items()}

    def num_rows(self) -> int:
        """(token, position in the network) pairs with keys and values."""
        return sum(sum(self._segments[self.plan.layers[slot].recursion].lengths) for slot in self._buffers)

    # What the model does with it.

    def append(self, group: int | None, rows: Rows) -> Places:
        """Make room for new rows in the layers of a recursion."""
        nothing = (0,) * len(rows.lengths)
        old = self._segments.get(group, Segments(nothing, nothing, self.heads))
        lengths = tuple(a + b for a, b in zip(old.lengths, rows.lengths, strict=True))
        device = rows.sequence.device
        if rows.live is not None:
            self._assumed[group] = old.lengths
        if any(length > room for length, room in zip(lengths, old.rooms, strict=True)):
            self._move(group, old, range(len(lengths)), tuple(_room(length, device) for length in lengths))
            old = self._segments[group]
        self._segments[group] = replace(old, lengths=lengths)
        if len(set(old.rooms)) == len(set(old.lengths)) == len(set(rows.lengths)) == 1:
            return Places(None, len(lengths), old.lengths[0])
        at = on_device(old.lengths, device)[rows.sequence] + rows.offset
        return Places(old.places(rows.sequence, at), len(lengths), 0)

    def write(self, slot: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, G, D] of one position of the network."""
        if slot not in self._buffers:
            total = self._segments[self.plan.layers[slot].recursion].total
            # Zeros: what is shown of spare rows has weight 0, which no number undoes, and NaN would.
            self._buffers[slot] = tuple(x.new_zeros(total * self.heads, x.shape[-1]) for x in (keys, values))
        for buffer, new in zip(self._buffers[slot], (keys, values), strict=True):
            places.write(buffer, new.detach())

    def buffers(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one position of the network, each [rows * G, D]."""
        return self._buffers[slot]

    def window(
        self, group: int | None, sequences: tuple[int, ...], device: torch.device, whole: bool = False
    ) -> Window:
        """The rows of some sequences in the layers of a recursion."""
        return Window(self._segments[group], sequences, device, whole)

    def replaced(
        self, group: int, sequences: tuple[int, ...], before: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sharing_update: where rows of a recursion, stored before this call, stand among all tokens.

        Args:
            before: how many there were of each sequence of the batch.
        Returns:
            Places in the recursion's buffers [n, G]; of each row, which of `sequences` and which position, both [n].
        """
        depths = self.depths
        if len(sequences) < len(depths):
            depths = depths.index_select(0, on_device(sequences, device))
        lengths = tuple(n if b in sequences else 0 for b, n in enumerate(before))
        column, at = torch.nonzero_static(depths > group, size=sum(lengths)).unbind(1)
        positions = (depths >= 0).cumsum(1) - 1
        places = replace(self._segments[group], lengths=lengths).filled(device)
        return places, column, positions[column, at]

    def commit(self, depths: Tensor, lengths: tuple[int, ...]) -> None:
        """End of a call: how deep its columns went [B, S] int8, and how many real tokens each sequence got."""
        if self._assumed:  # in a call of one column
            self._passed = OnHost(depths[:, 0])
        if self.depths is None:
            self.depths, self.lengths = depths, lengths
        else:
            self.depths = torch.cat([self.depths, depths], dim=1)
            self.lengths = tuple(a + b for a, b in zip(self.lengths, lengths, strict=True))

    # What `generate` does with it.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included: the part of `input_ids` that need not be given again."""
        return 0 if self.depths is None else self.depths.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` ([B'] int64, or bool), in that order."""
        if self.depths is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        order = indices.tolist()
        for group, segments in list(self._segments.items()):
            self._move(group, segments, order, tuple(segments.rooms[b] for b in order))
        self.depths = self.depths.index_select(0, indices.to(self.depths.device))
        self.lengths = tuple(self.lengths[b] for b in order)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: a negative number says how many; a positive one, as transformers before 5.23 counts,
        how many stay."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if tokens_to_remove == 0 or self.depths is None:
            return
        gone = self.depths[:, tokens_to_remove:].tolist()

        def left(lengths: tuple[int, ...], least: int) -> tuple[int, ...]:
            return tuple(n - sum(depth >= least for depth in row) for n, row in zip(lengths, gone, strict=True))

        for group, segments in self._segments.items():
            lengths = left(segments.lengths, 0 if group is None else group + 1)
            self._segments[group] = replace(segments, lengths=lengths)
        self.lengths = left(self.lengths, 0)
        self.depths = self.depths[:, :tokens_to_remove]
        if self.depths.shape[1] == 0:
            self.reset()

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def _move(self, group: int | None, old: Segments, order: Sequence[int], rooms: tuple[int, ...]) -> None:
        """New segments of the given rooms with the rows of sequences `order`."""
        new = Segments(tuple(old.lengths[b] for b in order), rooms, self.heads)
        self._segments[group] = new
        slots = [slot for slot in self._buffers if self.plan.layers[slot].recursion == group]
        if not slots:
            return
        device = self._buffers[slots[0]][0].device
        counts = on_device(new.lengths, device)
        total = sum(new.lengths)
        sequence = on_device(list(order), device).repeat_interleave(counts, output_size=total)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
        at = torch.arange(total, device=device) - starts
        source, target = old.places(sequence, at).flatten(), new.filled(device).flatten()
        for slot in slots:
            self._buffers[slot] = tuple(
                buffer.new_zeros(new.total * self.heads, buffer.shape[-1]).index_copy_(
                    0, target.to(buffer.device), buffer[source.to(buffer.device)]
                )
                for buffer in self._buffers[slot]
            )


def _room(length: int, device: torch.device) -> int:
    """Rows of a segment that is to take `length` of them and more."""
    return length + CHUNK if device.type == "cpu" else (length // STEP + 1) * STEP


__all__ = ["MoRCache"]
