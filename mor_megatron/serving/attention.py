"""Attention over pages, and a layer of the model on the rows of many sequences at any recursion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.huggingface.attention_mor import Pair, rotate
from mor_megatron.huggingface.layers_mor import MoRDecoderLayer
from mor_megatron.serving.kernel import Kernel
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
    """What queries see. Made once a pass, and used by all its layers.

    Args:
        pages: of the layers.
        table: table that each query reads, [Q]; those of one table are consecutive.
        seen: rows of the table that each query sees, [Q], ascending within a table; 0: the query is nobody's.
        kernel: for tables with a single query; None: PyTorch alone.
        device: of keys and queries.
    """

    def __init__(self, pages: Pages, table: np.ndarray, seen: np.ndarray, kernel: Kernel | None, device: torch.device):
        self.pages, self.table, self.seen, self.kernel, self.device = pages, table, np.maximum(seen, 1), kernel, device
        begins = np.ones(len(table), bool)
        begins[1:] = (table[1:] != table[:-1]) | (seen[1:] == 0)
        self.begin = np.flatnonzero(begins)
        self.end = np.append(self.begin[1:], len(table))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[Q, N, D] of buffers [rows, G, D]."""
        out = torch.empty_like(query)
        grouped = query.shape[1] != keys.shape[1]
        if self.kernel is not None:
            self.kernel(query, keys, values, self.pages.table, self.pages.size, *self.single, out)
        elif self._side_by_side:
            rows, places, mask = self.padded
            k, v = (x[places].transpose(1, 2) for x in (keys, values))  # [n, G, K, D]
            q = query[rows].unsqueeze(2)
            out[rows] = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped).squeeze(2)
        for s in self.segments:
            parts = query[s.begin : s.end], keys[s.places], values[s.places]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)  # [1, heads, .., D]
            o = F.scaled_dot_product_attention(q, k, v, s.mask, is_causal=s.is_causal, enable_gqa=grouped)
            out[s.begin : s.end] = o.squeeze(0).transpose(0, 1)
        return out

    @property
    def _side_by_side(self) -> bool:
        """Whether single queries are attended to in one call, over padded copies of their keys: on an accelerator,
        where one call a table would be as many launches."""
        return self.device.type != "cpu" and len(self.single[0]) > 0

    @cached_property
    def single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tables with one query: the query, the table, the rows that it sees, each [n] int32."""
        rows = self.begin[self.end - self.begin == 1]
        return tuple(np.ascontiguousarray(x, np.int32) for x in (rows, self.table[rows], self.seen[rows]))

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tables with one query: the query [n], where its keys lie [n, K], and which of these it has [n, 1, 1, K]."""
        rows, tables, seen = self.single
        size = self.pages.size
        pages = self.pages.table[tables, : -(-seen.max() // size)].astype(np.int64)
        places = (pages[:, :, None] * size + np.arange(size)).reshape(len(rows), -1)
        mask = np.arange(places.shape[1]) < seen[:, None]
        return tuple(torch.from_numpy(x).to(self.device) for x in (rows.astype(np.int64), places, mask[:, None, None]))

    @cached_property
    def segments(self) -> list[Segment]:
        """Tables that are attended to one after the other."""
        apart = self.kernel is not None or self._side_by_side
        spans = zip(self.begin.tolist(), self.end.tolist(), strict=True)
        return [self._segment(begin, end) for begin, end in spans if end - begin > 1 or not apart]

    def _segment(self, begin: int, end: int) -> Segment:
        seen = self.seen[begin:end]
        places = torch.from_numpy(self.pages.places(self.table[begin], seen[-1])).to(self.device)
        steps = np.arange(1, end - begin + 1)
        if end - begin == 1 or (seen == steps).all():
            return Segment(begin, end, places, None, end - begin > 1)
        mask = torch.from_numpy(np.arange(seen[-1]) < seen[:, None]).to(self.device)
        return Segment(begin, end, places, mask, False)


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
    reads: Reads


def run_layer(
    layer: MoRDecoderLayer, x: Tensor, number: int, view: View, wanted: Tensor | None, reads: Reads
) -> Tensor:
    """A layer on the rows of a pass: [T, H] -> [T, H], or of the wanted rows only, [W, H].

    It calls the parts of the exported layer, so adapters and quantised weights take effect.

    Args:
        number: of the physical layer.
        wanted: rows whose output is needed; None: all. The others are stored only.
        reads: of the wanted rows.
    """
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    keys, values = view.pages.keys[number], view.pages.values[number]
    new, rotation = (h, view.rotation) if view.writers is None else (h[view.writers], _at(view.rotation, view.writers))
    if len(new) > 0:
        keys.index_copy_(0, view.places, rotate(_heads(attention.k_proj(new), attention.head_dim), rotation))
        values.index_copy_(0, view.places, _heads(attention.v_proj(new), attention.head_dim))
    rotation = view.rotation
    if wanted is not None:
        if len(wanted) == 0:
            return x[:0]
        x, h, rotation = x[wanted], h[wanted], _at(rotation, wanted)
    query = rotate(_heads(attention.q_proj(h), attention.head_dim), rotation)
    x = x + attention.o_proj(reads.attend(query, keys, values).flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _heads(x: Tensor, width: int) -> Tensor:
    return x.view(len(x), -1, width)


def _at(rotation: Pair, rows: Tensor) -> Pair:
    return rotation[0][rows], rotation[1][rows]
