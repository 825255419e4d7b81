"""Attention in which every query sees one range of keys, as Triton kernels. `ranges.attend` defines it.

FlashAttention-2's algorithm: scores exist in tiles only, and the backward pass computes them again. A tile outside of
all its ranges is not visited; one inside of all of them needs no mask. Products take the inputs' type, sums are in fp32
and in a fixed order. Stands alone and needs Triton, so that it is imported where it is used only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tile(NamedTuple):
    """Scores that a program has at once, and how it is launched."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """Options of a kernel."""
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Tiles(NamedTuple):
    """One for each kernel."""

    forward: Tile
    grad_query: Tile
    grad_key: Tile
    """The caller's blocks replace its number of keys."""


TILES = {
    32: Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
}
"""By the largest width of a head. A search at the start of a run would cost minutes."""
LN_2 = tl.constexpr(math.log(2))
"""exp(x) = exp2(x / LN_2), and exp2 is the instruction that a GPU has."""
COUNTS = ["num_queries", "num_keys", "bounds"]
"""They change with every micro-batch, and no kernel should be compiled for one of their values."""


@triton.jit
def _places(rows, start, row_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of the rows from `start` on, [SIZE, WIDTH]."""
    row = tl.arange(0, SIZE)[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    return rows + tl.cast(start, tl.int64) * row_stride + row


@triton.jit
def _load(rows, start, row_stride, count, MASKED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `start` on, [SIZE, WIDTH]; if MASKED, zeros from row `count` on."""
    places = _places(rows, start, row_stride, SIZE, WIDTH)
    if MASKED:
        return tl.load(places, mask=(start + tl.arange(0, SIZE) < count)[:, None], other=0.0)
    else:
        return tl.load(places)


@triton.jit
def _store(rows, start, row_stride, count, tile, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `start` on, but for those from `count` on."""
    places = _places(rows, start, row_stride, SIZE, WIDTH)
    tl.store(places, tile.to(rows.dtype.element_ty), mask=(start + tl.arange(0, SIZE) < count)[:, None])


@triton.jit
def _load_ranges(first, last, start, num_queries, num_keys, SIZE: tl.constexpr):
    """First and last key of the queries from `start` on, [SIZE] each."""
    query = start + tl.arange(0, SIZE)
    low = tl.load(first + query, mask=query < num_queries, other=num_keys)
    high = tl.load(last + query, mask=query < num_queries, other=-1)
    return low, high


@triton.jit
def _whole(begin, first, end, SIZE: tl.constexpr):
    """Of the tiles from `begin` on, those inside of [first, end): the start of the first one, and their end."""
    start = begin + tl.cdiv(first - begin, SIZE) * SIZE
    return start, start + tl.maximum(end - start, 0) // SIZE * SIZE


@triton.jit
def _start(step, whole_begin, whole_end, MASKED: tl.constexpr):
    """Start of a tile. The loop over the tiles that need a mask leaves out those that do not, and so is shorter."""
    if MASKED:
        return step + tl.where(step >= whole_begin, whole_end - whole_begin, 0)
    else:
        return step


@triton.jit
def _forward_keys(
    peak, total, out, query, low, high, key, value, key_row, num_keys, scale, begin, end, whole_begin, whole_end,
    MASKED: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from `begin` to `end`: largest score, sum of weights, weighted sum of values."""
    for step in range(begin, end, KEYS):
        start = _start(step, whole_begin, whole_end, MASKED)
        k = _load(key, start, key_row, num_keys, MASKED, KEYS, WIDTH)
        score = tl.dot(query, tl.trans(k)) * scale
        if MASKED:
            place = (start + tl.arange(0, KEYS))[None, :]
            score = tl.where((low[:, None] <= place) & (place <= high[:, None]), score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        v = _load(value, start, key_row, num_keys, MASKED, KEYS, WIDTH)
        out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None])
        peak = higher
    return peak, total, out


@triton.jit(do_not_specialize=COUNTS)
def _range_attention_forward(
    query, key, value, out, log_sum, first, last, num_queries, num_keys, heads, scale,
    query_row, query_batch, query_head, key_row, key_batch, key_head, out_row, out_batch, out_head,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: the output, and log2 of the sum of exponentials."""
    plane = tl.program_id(0).to(tl.int64)
    batch, head = plane // heads, plane % heads
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES  # the last queries see most: they begin first
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // GROUP * key_head
    value += batch * key_batch + head // GROUP * key_head
    first += batch * num_queries
    last += batch * num_queries

    q = _load(query, start, query_row, num_queries, True, QUERIES, WIDTH)
    low, high = _load_ranges(first, last, start, num_queries, num_keys, QUERIES)
    begin, end = tl.min(low, 0) // KEYS * KEYS, tl.max(high, 0) + 1
    whole_begin, whole_end = _whole(begin, tl.max(low, 0), tl.min(high, 0) + 1, KEYS)
    peak = tl.full([QUERIES], -1e30, tl.float32)  # not -inf, whose difference from itself is not a number
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    peak, total, result = _forward_keys(
        peak, total, result, q, low, high, key, value, key_row, num_keys, scale, whole_begin, whole_end, 0, 0,
        False, KEYS, WIDTH,
    )  # fmt: skip
    peak, total, result = _forward_keys(
        peak, total, result, q, low, high, key, value, key_row, num_keys, scale, begin, end - (whole_end - whole_begin),
        whole_begin, whole_end, True, KEYS, WIDTH,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # of a query that sees nothing
    _store(out + batch * out_batch + head * out_head, start, out_row, num_queries, result / total[:, None],
           QUERIES, WIDTH)  # fmt: skip
    place = start + tl.arange(0, QUERIES)
    tl.store(log_sum + plane * num_queries + place, peak + tl.log2(total), mask=place < num_queries)


@triton.jit
def _grad_query_keys(
    grad_query, query, grad, log_sum, delta, low, high, key, value, key_row, num_keys, scale, begin, end,
    whole_begin, whole_end, MASKED: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `begin` to `end` contribute."""
    for step in range(begin, end, KEYS):
        start = _start(step, whole_begin, whole_end, MASKED)
        k = _load(key, start, key_row, num_keys, MASKED, KEYS, WIDTH)
        v = _load(value, start, key_row, num_keys, MASKED, KEYS, WIDTH)
        weight = tl.exp2(tl.dot(query, tl.trans(k)) * scale - log_sum[:, None])
        if MASKED:
            place = (start + tl.arange(0, KEYS))[None, :]
            weight = tl.where((low[:, None] <= place) & (place <= high[:, None]), weight, 0.0)
        grad_score = weight * (tl.dot(grad, tl.trans(v)) - delta[:, None])
        grad_query = tl.dot(grad_score.to(k.dtype), k, grad_query)
    return grad_query


@triton.jit(do_not_specialize=COUNTS)
def _range_attention_backward_query(
    query, key, value, out, grad, grad_query, log_sum, delta, first, last, num_queries, num_keys, heads, scale,
    query_row, query_batch, query_head, key_row, key_batch, key_head, out_row, out_batch, out_head,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: their gradient, and delta, the sum of out * grad, which keys need."""
    plane = tl.program_id(0).to(tl.int64)
    batch, head = plane // heads, plane % heads
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // GROUP * key_head
    value += batch * key_batch + head // GROUP * key_head
    out += batch * out_batch + head * out_head
    grad += batch * out_batch + head * out_head
    grad_query += batch * out_batch + head * out_head
    first += batch * num_queries
    last += batch * num_queries
    log_sum += plane * num_queries
    delta += plane * num_queries

    q = _load(query, start, query_row, num_queries, True, QUERIES, WIDTH)
    g = _load(grad, start, out_row, num_queries, True, QUERIES, WIDTH)
    o = _load(out, start, out_row, num_queries, True, QUERIES, WIDTH)
    along = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    place = start + tl.arange(0, QUERIES)
    tl.store(delta + place, along, mask=place < num_queries)
    sums = tl.load(log_sum + place, mask=place < num_queries, other=0.0)
    low, high = _load_ranges(first, last, start, num_queries, num_keys, QUERIES)
    begin, end = tl.min(low, 0) // KEYS * KEYS, tl.max(high, 0) + 1
    whole_begin, whole_end = _whole(begin, tl.max(low, 0), tl.min(high, 0) + 1, KEYS)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    result = _grad_query_keys(
        result, q, g, sums, along, low, high, key, value, key_row, num_keys, scale, whole_begin, whole_end, 0, 0,
        False, KEYS, WIDTH,
    )  # fmt: skip
    result = _grad_query_keys(
        result, q, g, sums, along, low, high, key, value, key_row, num_keys, scale, begin,
        end - (whole_end - whole_begin), whole_begin, whole_end, True, KEYS, WIDTH,
    )  # fmt: skip
    _store(grad_query, start, out_row, num_queries, result * (scale * LN_2), QUERIES, WIDTH)


@triton.jit
def _grad_key_queries(
    grad_key, grad_value, k, v, key_place, query, grad, log_sum, delta, first, last, query_row, query_head, out_row,
    out_head, num_queries, num_keys, scale, begin, end, whole_begin, whole_end,
    MASKED: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds what the queries from `begin` to `end` of all heads contribute. Scores are transposed, keys x queries."""
    tiles = tl.cdiv(end - begin, QUERIES)
    # Loads are issued ahead of the loop. Where the compiler sees a division by `tiles` it takes for granted that there
    # are some, and loads what is not there.
    divisor = tl.maximum(tiles, 1)
    for index in range(0, tiles * GROUP):  # not two loops, which would need more registers than there are
        head = index // divisor
        start = _start(begin + index % divisor * QUERIES, whole_begin, whole_end, MASKED)
        q = _load(query + head * query_head, start, query_row, num_queries, MASKED, QUERIES, WIDTH)
        g = _load(grad + head * out_head, start, out_row, num_queries, MASKED, QUERIES, WIDTH)
        place = start + tl.arange(0, QUERIES)
        number = head * num_queries + place
        if MASKED:
            sums = tl.load(log_sum + number, mask=place < num_queries, other=0.0)
            along = tl.load(delta + number, mask=place < num_queries, other=0.0)
        else:
            sums = tl.load(log_sum + number)
            along = tl.load(delta + number)
        weight = tl.exp2(tl.dot(k, tl.trans(q)) * scale - sums[None, :])
        if MASKED:
            low, high = _load_ranges(first, last, start, num_queries, num_keys, QUERIES)
            weight = tl.where((low[None, :] <= key_place) & (key_place <= high[None, :]), weight, 0.0)
        grad_value = tl.dot(weight.to(g.dtype), g, grad_value)
        grad_score = weight * (tl.dot(v, tl.trans(g)) - along[None, :])
        grad_key = tl.dot(grad_score.to(q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit(do_not_specialize=COUNTS)
def _range_attention_backward_key(
    query, key, value, grad, grad_key, grad_value, log_sum, delta, first, last, queries,
    num_queries, num_keys, heads, bounds, scale,
    query_row, query_batch, query_head, key_row, key_batch, key_head, out_row, out_batch, out_head,
    to_row, to_batch, to_head,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of keys of one group: gradients of keys and values, summed over the group's query heads."""
    plane, block = tl.program_id(0).to(tl.int64), tl.program_id(1)  # the first keys are seen most: they begin first
    groups = heads // GROUP
    batch, group = plane // groups, plane % groups
    query += batch * query_batch + group * GROUP * query_head
    grad += batch * out_batch + group * GROUP * out_head
    key += batch * key_batch + group * key_head
    value += batch * key_batch + group * key_head
    log_sum += plane * GROUP * num_queries
    delta += plane * GROUP * num_queries
    first += batch * num_queries
    last += batch * num_queries
    queries += batch * tl.num_programs(1) + block
    begin, end = tl.load(queries), tl.load(queries + bounds)
    whole_begin, whole_end = _whole(begin, tl.load(queries + 2 * bounds), tl.load(queries + 3 * bounds), QUERIES)

    start = block * KEYS
    k = _load(key, start, key_row, num_keys, True, KEYS, WIDTH)
    v = _load(value, start, key_row, num_keys, True, KEYS, WIDTH)
    place = (start + tl.arange(0, KEYS))[:, None]
    sum_key = tl.zeros([KEYS, WIDTH], tl.float32)
    sum_value = tl.zeros([KEYS, WIDTH], tl.float32)
    sum_key, sum_value = _grad_key_queries(
        sum_key, sum_value, k, v, place, query, grad, log_sum, delta, first, last, query_row, query_head, out_row,
        out_head, num_queries, num_keys, scale, whole_begin, whole_end, 0, 0, False, GROUP, QUERIES, WIDTH,
    )  # fmt: skip
    sum_key, sum_value = _grad_key_queries(
        sum_key, sum_value, k, v, place, query, grad, log_sum, delta, first, last, query_row, query_head, out_row,
        out_head, num_queries, num_keys, scale, begin, end - (whole_end - whole_begin), whole_begin, whole_end,
        True, GROUP, QUERIES, WIDTH,
    )  # fmt: skip
    to = batch * to_batch + group * to_head
    _store(grad_key + to, start, to_row, num_keys, sum_key * (scale * LN_2), KEYS, WIDTH)
    _store(grad_value + to, start, to_row, num_keys, sum_value, KEYS, WIDTH)


class RangeAttentionFunction(torch.autograd.Function):
    """See `range_attention`."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, queries: Tensor, block: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        num_queries, batch, heads, width = query.shape
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
        if key.stride() != value.stride():
            key, value = key.contiguous(), value.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_sum = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
        tile = _tiles(width).forward
        if out.numel() > 0:
            _range_attention_forward[batch * heads, triton.cdiv(num_queries, tile.queries)](
                query, key, value, out, log_sum, first, last, num_queries, len(key), heads, scale / LN_2.value,
                *query.stride()[:3], *key.stride()[:3], *out.stride()[:3],
                GROUP=heads // key.shape[2], WIDTH=width, **tile.launch,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, log_sum, first, last, queries)
        ctx.block, ctx.scale = block, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, out, log_sum, first, last, queries = ctx.saved_tensors
        num_queries, batch, heads, width = query.shape
        grad = grad.contiguous()  # as `out` is
        grad_query = torch.empty_like(out)
        grad_key, grad_value = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
        delta = torch.empty_like(log_sum)
        counts = (num_queries, len(key), heads)
        strides = (*query.stride()[:3], *key.stride()[:3], *out.stride()[:3])
        sizes = {"GROUP": heads // key.shape[2], "WIDTH": width}
        _, tile, key_tile = _tiles(width)
        key_tile = key_tile._replace(keys=ctx.block)
        if out.numel() > 0:
            _range_attention_backward_query[batch * heads, triton.cdiv(num_queries, tile.queries)](
                query, key, value, out, grad, grad_query, log_sum, delta, first, last,
                *counts, ctx.scale / LN_2.value, *strides, **sizes, **tile.launch,
            )  # fmt: skip
        if key.numel() > 0:
            _range_attention_backward_key[batch * key.shape[2], queries.shape[2]](
                query, key, value, grad, grad_key, grad_value, log_sum, delta, first, last, queries,
                *counts, queries.stride(0), ctx.scale / LN_2.value, *strides, *grad_key.stride()[:3],
                **sizes, **key_tile.launch,
            )  # fmt: skip
        return grad_query, grad_key, grad_value, None, None, None, None, None


def range_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    queries: Tensor,
    block: int,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the keys that each query sees.

    Args:
        query: [Q, B, N, D], D a power of two from 16 to 128.
        key, value: [K, B, G, D], where G divides N.
        first, last, queries, block: `ranges.ranges` of what the queries see.
        scale: of the scores; None: 1 / sqrt(D).
    Returns:
        [Q, B, N, D]; zeros where a query sees nothing.
    Raises:
        ValueError: the width D is another one.
    """
    width = query.shape[-1]
    if width not in (16, 32, 64, 128):
        raise ValueError(f"it has no tiles for heads of width {width}: use 16, 32, 64 or 128")
    scale = width**-0.5 if scale is None else scale
    return RangeAttentionFunction.apply(query, key, value, first, last, queries, block, scale)


def _tiles(width: int) -> Tiles:
    return next(tiles for largest, tiles in TILES.items() if width <= largest)
