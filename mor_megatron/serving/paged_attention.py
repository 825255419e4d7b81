"""Attention over pages on a GPU, as a Triton kernel: any number of queries of any number of tables in one call.

A program has a few consecutive queries of one table, with all query heads of one key head, so that a tile of scores is
as high as a product needs. Where there are few programs, the keys of a table are divided among several, and a second
kernel joins their sums. Scores and sums are in fp32. Stands alone and needs Triton, so that it is imported where it is
used only.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 8
"""Parts of the keys of a table, where programs are fewer than processors."""


@triton.jit(do_not_specialize=["pages"])
def _attend(
    query, keys, values, out, peaks, totals, tables, table, seen, begin, scale, pages, query_row, key_row, heads,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    HEAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some queries of one table and one key head, and one part of the keys: weighted sum of values, and with SPLITS
    over 1 the largest score and the sum of weights beside it."""
    first = tl.load(begin + tl.program_id(0))
    last = tl.load(begin + tl.program_id(0) + 1) - 1
    group, split = tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, QUERIES)
    row, head = first + member // GROUP, group * GROUP + member % GROUP
    inside = row <= last
    column = tl.arange(0, WIDTH)
    to_query = row[:, None] * query_row + head[:, None] * HEAD + column[None, :]
    real = inside[:, None] & (column < HEAD)[None, :]
    q = tl.load(query + to_query, mask=real, other=0.0)
    sees = tl.load(seen + row, mask=inside, other=0).to(tl.int32)
    end = tl.load(seen + last).to(tl.int32)
    own = tables + tl.load(table + first) * pages
    each = tl.cdiv(tl.cdiv(end, SPLITS), KEYS) * KEYS
    low = split * each
    high = tl.minimum(low + each, end)
    sees = tl.minimum(sees, high)

    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        page = tl.load(own + key // SIZE, mask=key < high, other=0)
        place = (page * SIZE + key % SIZE).to(tl.int64) * key_row + group * HEAD
        stored = (key < high)[:, None] & (column < HEAD)[None, :]
        k = tl.load(keys + place[:, None] + column[None, :], mask=stored, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(key[None, :] < sees[:, None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # an early query sees nothing of a late part
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(values + place[:, None] + column[None, :], mask=stored, other=0.0)
        result = result * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher

    if SPLITS == 1:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]  # nobody's queries see nothing
        tl.store(out + row[:, None] * heads * HEAD + head[:, None] * HEAD + column[None, :], result, mask=real)
    else:
        part = (row * heads + head) * SPLITS + split
        tl.store(out + part[:, None] * HEAD + column[None, :], result, mask=real)
        tl.store(peaks + part, peak, mask=inside)
        tl.store(totals + part, total, mask=inside)


@triton.jit
def _join(parts, peaks, totals, out, SPLITS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """The sums of all parts of one query head."""
    place = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    peak = tl.load(peaks + place * SPLITS + split)
    highest = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(totals + place * SPLITS + split), 0)
    real = (column < HEAD)[None, :] & (split >= 0)[:, None]
    part = tl.load(parts + (place * SPLITS + split)[:, None] * HEAD + column[None, :], mask=real, other=0.0)
    result = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + place * HEAD + column, result, mask=column < HEAD)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    table: Tensor,
    seen: Tensor,
    begin: Tensor,
    size: int,
    most: int,
) -> Tensor:
    """Attention of each query to the first rows of a table, [Q, N, D].

    Args:
        query: [Q, N, D], rows and heads dense.
        keys, values: [rows, G, D], dense.
        tables: numbers of pages, [tables, pages].
        table: which table each query reads, [Q].
        seen: how many rows it sees, [Q], ascending among the queries of a part; 0: it gives zeros.
        begin: first queries of parts, [parts + 1]. Those of a part read one table.
        size: rows of a page.
        most: queries of a part.
    """
    count, heads, width = query.shape
    groups = keys.shape[1]
    group, programs = heads // groups, (len(begin) - 1) * groups
    queries = max(16, triton.next_power_of_2(most * group))
    tile = 64 if width <= 64 else 32
    splits = SPLITS if programs <= _processors(query.device) else 1
    out = torch.empty_like(query)
    options = {"HEAD": width, "WIDTH": max(16, triton.next_power_of_2(width))}
    parts, peaks, totals = out, out, out
    if splits > 1:
        parts = torch.empty(count, heads, splits, width, dtype=torch.float32, device=query.device)
        peaks, totals = torch.empty(2, count, heads, splits, dtype=torch.float32, device=query.device).unbind()
    scale = width**-0.5 / math.log(2)  # exp(x) = exp2(x / log(2)), and exp2 is the instruction that a GPU has
    _attend[len(begin) - 1, groups, splits](
        query, keys, values, parts, peaks, totals, tables, table, seen, begin, scale, tables.shape[1],
        query.stride(0), keys.stride(0), heads,
        GROUP=group, QUERIES=queries, SIZE=size, KEYS=tile, SPLITS=splits, num_warps=4, num_stages=2, **options,
    )  # fmt: skip
    if splits > 1:
        _join[(count * heads,)](parts, peaks, totals, out, SPLITS=splits, num_warps=1, **options)
    return out


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _rotate(source, target, c, s, heads, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Heads of one row, dense in both places."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    own = head * 2 * HALF + column
    x1 = tl.load(source + own, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + own + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + own, x1 * c - x2 * s, mask=inside)
    tl.store(target + own + HALF, x2 * c + x1 * s, mask=inside)


@triton.jit
def _store(
    query, key, value, cos, sin, places, keys, values, out, query_row, key_row, value_row, heads, groups,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row) * groups * 2 * HALF
    column = tl.arange(0, BLOCK)[None, :]
    angle = row * 2 * HALF + column
    c = tl.load(cos + angle, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + HALF + angle, mask=column < HALF, other=0.0).to(tl.float32)
    _rotate(query + row * query_row, out + row * heads * 2 * HALF, c, s, heads, HEADS, HALF, BLOCK)
    _rotate(key + row * key_row, keys + place, c, s, groups, GROUPS, HALF, BLOCK)
    _rotate(value + row * value_row, values + place, c * 0.0 + 1.0, s * 0.0, groups, GROUPS, HALF, BLOCK)


def store_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor],
    places: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Store the keys and values of rows, and give their queries; queries and keys are rotated.

    Args:
        query: [T, N, D].
        key, value: [T, G, D]; like those of queries, their heads are dense.
        rotation: cos and sin at the rows' positions, [T, 1, D], dense; the first half of sin is negative.
        places: where the rows are stored, [T].
        keys, values: buffers [rows, G, D], dense.
    """
    count, heads, width = query.shape
    out = torch.empty(count, heads, width, dtype=query.dtype, device=query.device)
    _store[(count,)](
        query, key, value, *rotation, places, keys, values, out, query.stride(0), key.stride(0), value.stride(0),
        heads, key.shape[1],
        HEADS=triton.next_power_of_2(heads), GROUPS=triton.next_power_of_2(key.shape[1]),
        HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
    return out
