"""Core attention through flash-attn, on regular rows and, without padding, on ragged ones.

Its causal mask is aligned to the bottom right corner: right for active tokens among themselves, where the i-th query
is the i-th key. Active tokens that attend to the keys of *all* tokens, and documents kept apart, need a mask, which
flash-attn does not take; they stay on PyTorch's attention.

Reasoned from flash-attn 2.8.3, not run on a GPU; the layouts and `cu_seqlens` are tested on the CPU against a plain
implementation of flash-attn's two functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mor_megatron.model.attention import AttentionPattern, CoreAttention


class FlashAttention(CoreAttention):
    """softmax(q k^T / sqrt(D)) v; see `CoreAttention` for the shapes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Imported where it is used: without a GPU it cannot be installed.
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        self.regular: Callable = flash_attn_func
        self.varlen: Callable = flash_attn_varlen_func

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        """query [R, C, N, D], key and value [R, C, G, D] -> [R, C, N*D]."""
        if pattern.mask is not None:
            return super().forward(query, key, value, pattern)
        rows, columns = query.shape[:2]
        options = {
            "softmax_scale": self.softmax_scale,
            "causal": True,
            # Its backward adds up dq in the order in which blocks finish, unless told otherwise.
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if pattern.active.ragged:
            packing = pattern.active.packing
            starts, longest = packing.cu_seqlens, packing.longest
            packed = (x.squeeze(1) for x in (query, key, value))  # [T, N or G, D]
            out = self.varlen(*packed, starts, starts, longest, longest, **options)
        else:
            out = self.regular(*(x.transpose(0, 1) for x in (query, key, value)), **options).transpose(0, 1)
        return out.reshape(rows, columns, -1)
