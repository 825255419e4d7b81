"""Attention over pages, and a layer of the model on the rows of many sequences at any recursion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.huggingface.attention_mor import Pair, rotate
from mor_megatron.huggingface.layers_mor import MoRDecoderLayer
from mor_megatron.huggingface.relaxed_mor import Recursions
from mor_megatron.serving.kernel import TILE, DeviceKernels, Kernel, store_rows
from mor_megatron.serving.pages import Pages


@dataclass(frozen=True)
class Segment:
    """Queries of one table: consecutive rows of a pass."""

    begin: int
    end: int
    places: Tensor
    """Where the keys lie that the last of them sees, [K]."""
    mask: Tensor | None
    """[Q, K], true where a key is seen; None: each query sees all keys up to its own, or all there are."""
    is_causal: bool


class Reads:
    """What queries see, on a CPU: single queries by the kernel, others by PyTorch, one table after the other.

    Made once a pass, and used by all its layers.

    Args:
        pages: of the layers.
        table: table that each query reads, [Q]; those of one table are consecutive.
        seen: rows of the table that each query sees, [Q], ascending within a table; 0: the query is nobody's.
        kernel: for tables with a single query; None: PyTorch alone.
    """

    arrays: tuple[np.ndarray, ...] = ()
    """What is needed on the device."""

    def __init__(self, pages: Pages, table: np.ndarray, seen: np.ndarray, kernel: Kernel | None):
        self.pages, self.table, self.seen, self.kernel = pages, table, np.maximum(seen, 1), kernel
        self.begin, self.end = spans(table, seen)

    def receive(self, sent: list[Tensor]) -> None:
        """`arrays` on the device."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[Q, N, D] of buffers [rows, G, D]."""
        out = torch.empty_like(query)
        if self.kernel is not None:
            self.kernel(query, keys, values, self.pages.table, self.pages.size, *self.single, out)
        for s in self.segments:
            parts = query[s.begin : s.end], keys[s.places], values[s.places]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)  # [1, heads, .., D]
            grouped = q.shape[1] != k.shape[1]
            o = F.scaled_dot_product_attention(q, k, v, s.mask, is_causal=s.is_causal, enable_gqa=grouped)
            out[s.begin : s.end] = o.squeeze(0).transpose(0, 1)
        return out

    @cached_property
    def single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tables with one query: the query, the table, the rows that it sees, each [n] int32."""
        rows = self.begin[self.end - self.begin == 1]
        return tuple(np.ascontiguousarray(x, np.int32) for x in (rows, self.table[rows], self.seen[rows]))

    @cached_property
    def segments(self) -> list[Segment]:
        """Tables that are attended to one after the other."""
        least = 1 if self.kernel is None else 2
        pairs = zip(self.begin.tolist(), self.end.tolist(), strict=True)
        return [self._segment(begin, end) for begin, end in pairs if end - begin >= least]

    def _segment(self, begin: int, end: int) -> Segment:
        seen = self.seen[begin:end]
        places = torch.from_numpy(self.pages.places(self.table[begin], seen[-1]))
        steps = np.arange(1, end - begin + 1)
        if end - begin == 1 or (seen == steps).all():
            return Segment(begin, end, places, None, end - begin > 1)
        return Segment(begin, end, places, torch.from_numpy(np.arange(seen[-1]) < seen[:, None]), False)


class DeviceReads:
    """What queries see, on an accelerator: all of them in one call.

    Args:
        pages, table, seen: as for `Reads`.
        kernels: of the device.
        group: query heads of a key head.
    """

    def __init__(self, pages: Pages, table: np.ndarray, seen: np.ndarray, kernels: DeviceKernels, group: int):
        self.size, self.kernels, self.most = pages.size, kernels, max(1, TILE // group)
        begin, end = spans(table, seen)
        lengths, used = end - begin, -(-int(seen.max(initial=1)) // pages.size)
        parts = -(-lengths // self.most)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        first = np.repeat(begin, parts) + self.most * number
        which = np.repeat(np.arange(len(begin)), lengths)
        self.arrays = (pages.table[table[begin], :used], which, seen, np.append(first, len(table)))

    def receive(self, sent: list[Tensor]) -> None:
        """`arrays` on the device."""
        self.sent = sent

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[Q, N, D] of buffers [rows, G, D]."""
        return self.kernels.attend(query, keys, values, *self.sent, self.size, self.most)


class StaticReads:
    """What queries of a table each see, in tensors of static shapes.

    Args:
        tables: numbers of pages, [Q, pages].
        seen: rows of its table that each query sees, [Q]; 0: the query is nobody's.
        size: rows of a page.
        kernels: of the device.
    """

    def __init__(self, tables: Tensor, seen: Tensor, size: int, kernels: DeviceKernels):
        self.kernels, self.size = kernels, size
        each = torch.arange(len(seen) + 1, device=seen.device)
        self.numbers = (tables, each[:-1], seen, each)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[Q, N, D] of buffers [rows, G, D]."""
        return self.kernels.attend(query, keys, values, *self.numbers, self.size, 1)


def spans(table: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of the queries of each table; those of nobody are apart."""
    begins = np.ones(len(table), bool)
    begins[1:] = (table[1:] != table[:-1]) | (seen[1:] == 0)
    begin = np.flatnonzero(begins)
    return begin, np.append(begin[1:], len(table))


AnyReads = Reads | DeviceReads | StaticReads


@dataclass(frozen=True)
class View:
    """What the rows of a pass write and read."""

    pages: Pages
    rotation: Pair
    """cos and sin at the rows' positions, [T, 1, D]."""
    writers: Tensor | None
    """Rows whose keys and values are stored, [W]; None: all. With shared keys, those of recursion 0."""
    places: Tensor
    """Where they are stored, [W]."""
    reads: AnyReads
    recursion: Recursions = None
    """Of the rows."""
    store: Callable[..., Tensor] = store_rows
    """See `DeviceKernels`."""


def run_layer(
    layer: MoRDecoderLayer,
    x: Tensor,
    number: int,
    view: View,
    wanted: Tensor | None,
    reads: AnyReads,
) -> Tensor:
    """A layer on the rows of a pass: [T, H] -> [T, H], or of the wanted rows only, [W, H].

    It calls the parts of the exported layer, so adapters and quantised weights take effect.

    Args:
        number: position of this use of the layer, in recursion 0 if it is of the block.
        wanted: rows whose output is needed; None: all. The others are stored only.
        reads: of the wanted rows.
    """
    attention, r = layer.self_attn, view.recursion
    h = layer.input_layernorm(x, r)
    keys, values = view.pages.keys[number], view.pages.values[number]
    if view.writers is None and wanted is None:
        query = view.store(*attention.heads(h, r, "q", "k", "v"), view.rotation, view.places, keys, values)
    else:
        new, rotation, of_new = h, view.rotation, r
        if view.writers is not None:  # of keys that all recursions read: rows of recursion 0
            new, rotation, of_new = h[view.writers], _at(view.rotation, view.writers), 0
        if len(new) > 0:
            key, value = attention.heads(new, of_new, "k", "v")
            keys.index_copy_(0, view.places, rotate(key, rotation))
            values.index_copy_(0, view.places, value)
        rotation = view.rotation
        if wanted is not None:
            if len(wanted) == 0:
                return x[:0]
            x, h, rotation = x[wanted], h[wanted], _at(rotation, wanted)
        query = rotate(attention.heads(h, r, "q")[0], rotation)
    x = x + attention.project(reads.attend(query, keys, values).flatten(1), r, "o")[0]
    return x + layer.mlp(layer.post_attention_layernorm(x, r), r)


def _at(rotation: Pair, rows: Tensor) -> Pair:
    return rotation[0][rows], rotation[1][rows]
