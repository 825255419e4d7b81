"""Keys and values of a MoR model between the calls of `generate`: storage, and nothing else.

At (recursion r, layer j) a sequence holds rows of exactly its tokens that were active there. They lie packed, sequence
after sequence, each sequence in a segment of its own that grows by `CHUNK` rows. Layers of one recursion hold rows of
the same tokens and share the layout of their segments. This file travels with an exported model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_mor import MoRConfig
from .rows_mor import Rows

CHUNK = 32
"""Spare rows that a segment gets when it must grow. More are moved more rarely, and wait longer to be used."""


@dataclass(frozen=True)
class Segments:
    """Where the rows of each sequence lie in a flat buffer."""

    lengths: tuple[int, ...]
    rooms: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.rooms[:-1], initial=0))

    @property
    def total(self) -> int:
        """Rows of the buffer."""
        return sum(self.rooms)

    def rows(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        """Places of the first `lengths` rows of each sequence, one after the other, [sum of lengths]."""
        counts = torch.tensor(lengths, device=device)
        shift = torch.tensor(self.starts, device=device) - (counts.cumsum(0) - counts)
        return torch.arange(sum(lengths), device=device) + shift.repeat_interleave(counts, output_size=sum(lengths))


@dataclass(frozen=True)
class Places:
    """Where new rows go."""

    index: Tensor | None
    """[T] places in the buffer; None: every sequence gets equally many, at the same place of equal segments."""
    sequences: int
    begin: int

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Put [T, G, D] into a buffer [rows, G, D]."""
        if self.index is not None:
            buffer.index_copy_(0, self.index.to(buffer.device), new)
            return
        new = new.view(self.sequences, -1, *new.shape[1:])
        buffer.view(self.sequences, -1, *buffer.shape[1:])[:, self.begin : self.begin + new.shape[1]] = new


@dataclass(frozen=True)
class Window:
    """A view of the rows of some sequences, right-padded."""

    lengths: tuple[int, ...]
    """Rows of each of these sequences."""
    index: Tensor | None
    """[sequences, longest] places in the buffer; None: all sequences have equal segments and nothing is copied."""

    def read(self, buffer: Tensor) -> Tensor:
        """[rows, G, D] -> [sequences, longest, G, D]; past the end of a sequence stands any of its rows."""
        if self.index is None:
            return buffer.view(len(self.lengths), -1, *buffer.shape[1:])[:, : self.lengths[0]]
        return buffer[self.index]


class MoRCache(Cache):
    """Ragged keys and values. It holds values, not graphs: no gradient flows through it.

    Args:
        config: of the model that fills it.
    """

    def __init__(self, config: MoRConfig):
        super().__init__(layers=[])
        self.plan = config.plan
        self.kv_mode = config.kv_mode
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.depths: Tensor | None = None
        """[B, columns] int8: recursions that each token passed, -1 for padding."""
        self.lengths: tuple[int, ...] = ()
        """Real tokens of each sequence."""
        self._segments: dict[int | None, Segments] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

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
        old = self._segments.get(group, Segments((0,) * len(rows.lengths), (0,) * len(rows.lengths)))
        lengths = tuple(a + b for a, b in zip(old.lengths, rows.lengths, strict=True))
        if any(length > room for length, room in zip(lengths, old.rooms, strict=True)):
            self._move(group, old, range(len(lengths)), tuple(length + CHUNK for length in lengths))
            old = self._segments[group]
        self._segments[group] = Segments(lengths, old.rooms)
        if len(set(old.rooms)) == len(set(old.lengths)) == len(set(rows.lengths)) == 1:
            return Places(None, len(lengths), old.lengths[0])
        device = rows.sequence.device
        ends = torch.tensor(old.starts, device=device) + torch.tensor(old.lengths, device=device)
        return Places(ends[rows.sequence] + rows.offset, len(lengths), 0)

    def write(self, slot: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, G, D] of one position of the network."""
        if slot not in self._buffers:
            total = self._segments[self.plan.layers[slot].recursion].total
            self._buffers[slot] = tuple(x.new_zeros(total, *x.shape[1:]) for x in (keys, values))
        for buffer, new in zip(self._buffers[slot], (keys, values), strict=True):
            places.write(buffer, new.detach())

    def buffers(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one position of the network, each [rows, G, D]."""
        return self._buffers[slot]

    def window(self, group: int | None, sequences: tuple[int, ...], device: torch.device) -> Window:
        """The rows of some sequences in the layers of a recursion."""
        segments = self._segments[group]
        lengths = tuple(segments.lengths[b] for b in sequences)
        if len(sequences) == len(segments.lengths) and len(set(lengths)) == len(set(segments.rooms)) == 1:
            return Window(lengths, None)
        starts = torch.tensor([segments.starts[b] for b in sequences], device=device).unsqueeze(1)
        last = torch.tensor(lengths, device=device).sub(1).clamp(min=0).unsqueeze(1)
        return Window(lengths, starts + torch.minimum(torch.arange(max(lengths), device=device), last))

    def replaced(
        self, group: int, sequences: tuple[int, ...], width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """sharing_update: where rows of a recursion, stored before this call, stand among all tokens.

        Args:
            width: tokens a sequence is padded to.
        Returns:
            Places in the recursion's buffers, and places in [sequences, width]; both [n].
        """
        chosen = list(sequences)
        depths = self.depths[chosen]
        column, at = (depths > group).nonzero(as_tuple=True)
        positions = (depths >= 0).cumsum(1) - 1
        before = [int(n) for n in (depths > group).sum(1)]
        lengths = [0] * len(self.lengths)
        for b, n in zip(chosen, before, strict=True):
            lengths[b] = n
        places = self._segments[group].rows(lengths, device)
        return places, column * width + positions[column, at]

    def commit(self, depths: Tensor, lengths: tuple[int, ...]) -> None:
        """End of a call: how deep its columns went [B, S] int8, and how many real tokens each sequence got."""
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
        self.depths = self.depths[order]
        self.lengths = tuple(self.lengths[b] for b in order)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; transformers counts them as a negative number.

        Raises:
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be negative: the number of columns to forget")
        if tokens_to_remove == 0 or self.depths is None:
            return
        gone = self.depths[:, tokens_to_remove:]
        for group, segments in self._segments.items():
            removed = (gone > (-1 if group is None else group)).sum(1).tolist()
            lengths = tuple(a - b for a, b in zip(segments.lengths, removed, strict=True))
            self._segments[group] = Segments(lengths, segments.rooms)
        self.lengths = tuple(a - b for a, b in zip(self.lengths, (gone >= 0).sum(1).tolist(), strict=True))
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
        new = Segments(tuple(old.lengths[b] for b in order), rooms)
        self._segments[group] = new
        slots = [slot for slot in self._buffers if self.plan.layers[slot].recursion == group]
        if not slots:
            return
        device = self._buffers[slots[0]][0].device
        counts = torch.tensor(new.lengths, device=device)
        shift = torch.tensor([old.starts[b] for b in order], device=device) - (counts.cumsum(0) - counts)
        total = sum(new.lengths)
        source = torch.arange(total, device=device) + shift.repeat_interleave(counts, output_size=total)
        target = new.rows(new.lengths, device)
        for slot in slots:
            self._buffers[slot] = tuple(
                buffer.new_zeros(new.total, *buffer.shape[1:]).index_copy_(
                    0, target.to(buffer.device), buffer[source.to(buffer.device)]
                )
                for buffer in self._buffers[slot]
            )


__all__ = ["MoRCache"]
