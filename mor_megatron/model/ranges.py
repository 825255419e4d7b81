"""Attention in which every query sees one range of keys: what it computes, and which queries see a block of keys.

`range_attention` computes the same on a GPU, in blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Keys whose gradients are computed at once: what was fastest on an H100 (docs/gpu.md)."""


class Ranges(NamedTuple):
    """What the queries of each sequence see, and for each block of keys, who sees it."""

    first: Tensor
    """First key that a query sees, [B, Q] int32."""
    last: Tensor
    """Last one, [B, Q] int32."""
    queries: Tensor
    """Of each block of keys, the first query and the end of those that see some of it, and the same for all of it,
    [4, B, K / block] int32."""
    block: int
    """Keys of a block."""


def ranges(first: Tensor, last: Tensor, num_keys: int, block: int = BLOCK) -> Ranges:
    """The ranges with their inverse, in a few small operations on the device.

    Args:
        first, last: [B, Q] int32, non-decreasing in q and first <= last; then slots that see nothing, with last = -1.
        num_keys: K.
    """
    empty = last < 0
    # A slot that sees nothing sorts behind all others.
    firsts, lasts = (x.masked_fill(empty, num_keys + block).contiguous() for x in (first, last))
    begin = torch.arange(0, num_keys, block, dtype=torch.int32, device=first.device).expand(first.shape[0], -1)
    end = begin + (block - 1)
    begins = torch.searchsorted(lasts, torch.cat((begin, end), 1), out_int32=True).chunk(2, 1)
    ends = torch.searchsorted(firsts, torch.cat((end, begin), 1), out_int32=True, right=True).chunk(2, 1)
    queries = torch.stack((begins[0], ends[0], begins[1], ends[1]))
    return Ranges(firsts, last.contiguous(), queries, block)


def attend(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float | None = None
) -> Tensor:
    """The definition, through the whole matrix of scores.

    Args:
        query: [Q, B, N, D].
        key, value: [K, B, G, D], where G divides N.
        first, last: [B, Q]; query q of sequence b sees the keys first[b, q] to last[b, q].
        scale: of the scores; None: 1 / sqrt(D).
    Returns:
        [Q, B, N, D]; zeros where a query sees nothing.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    keys = torch.arange(len(key), device=key.device)
    seen = (first.unsqueeze(2) <= keys) & (keys <= last.unsqueeze(2))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    some = seen.any(2, keepdim=True)  # softmax of nothing is not a number
    weights = scores.masked_fill(~(seen | ~some).unsqueeze(1), float("-inf")).softmax(-1) * some.unsqueeze(1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value)
