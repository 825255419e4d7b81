"""FlexAttention's block mask of queries that each see a range of keys, built on the device in a few small operations.

`create_block_mask` would evaluate the whole Q x K mask for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block: FlexAttention's default."""


def block_mask(first: Tensor, last: Tensor, num_keys: int) -> BlockMask:
    """The mask under which query q of sequence b sees the keys first[b, q] to last[b, q].

    Args:
        first, last: [B, Q] int32, Q a multiple of `BLOCK`; a query with last = -1 sees nothing.
        num_keys: K.
    """
    from torch.nn.attention.flex_attention import BlockMask  # takes a second to import

    some, all_of_it = _blocks(first, last, num_keys)
    partial = some & ~all_of_it

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first[b, q] <= k) & (k <= last[b, q])

    lists = {}
    for name, blocks in (("", partial), ("full_", all_of_it)):
        lists[f"{name}kv_num_blocks"], lists[f"{name}kv_indices"] = _listed(blocks)
        lists[f"{name}q_num_blocks"], lists[f"{name}q_indices"] = _listed(blocks.transpose(1, 2))
    return BlockMask(seq_lengths=(first.shape[1], num_keys), **lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)


def _blocks(first: Tensor, last: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """In which blocks some query may see some key, and in which every query sees every key, [B, Q/128, K/128] bool."""
    shape = (first.shape[0], -1, BLOCK)
    firsts, lasts = first.view(shape), last.view(shape)
    earliest = first.masked_fill(last < 0, num_keys).view(shape).amin(-1, keepdim=True)
    begin = torch.arange(0, num_keys, BLOCK, device=first.device)
    end = begin + BLOCK - 1
    some = (earliest <= end) & (begin <= lasts.amax(-1, keepdim=True))
    all_of_it = (firsts.amax(-1, keepdim=True) <= begin) & (end <= lasts.amin(-1, keepdim=True))
    return some, all_of_it


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks [B, n, m], how many are true, [B, 1, n], and their columns first, [B, 1, n, m]; int32."""
    blocks = blocks.unsqueeze(1).int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()
