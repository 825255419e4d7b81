"""Core attention on a GPU: a kernel for each kind of shape.

| rows | attention | kernel |
|---|---|---|
| as many in every sequence | among themselves | cuDNN or flash, through PyTorch's scaled-dot-product attention |
| ragged | among themselves | `varlen_attn`: flash on packed rows |
| any | to the keys of all tokens; within documents | FlexAttention |

Without `varlen_attn` or FlexAttention (`model/kernels.py` decides), rows go into a frame for scaled-dot-product
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mor_megatron.model.attention import AttentionPattern, CoreAttention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What takes any mask."""


@dataclass(frozen=True)
class AttentionKernels:
    """The choice for one model on one kind of GPU."""

    fixed: tuple[SDPBackend, ...]
    """For regular rows, the preferred one first."""
    rows: frozenset[int]
    """Numbers of rows that come back in every micro-batch. Others are not for cuDNN, which makes a plan for each."""
    no_varlen: str | None = None
    """Why `varlen_attn` is not used; None: it is."""
    no_flex: str | None = None
    """Why FlexAttention is not used; None: it is."""


class AttentionByShape(CoreAttention):
    """softmax(q k^T / sqrt(D)) v; see `CoreAttention` for the shapes."""

    def __init__(self, *args, kernels: AttentionKernels, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernels = kernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        """query [R, C, N, D], key and value [R', C', G, D] -> [R, C, N*D]."""
        if pattern.masked:
            attend = self._flex if self.kernels.no_flex is None else self._framed
        elif pattern.active.ragged:
            attend = self._varlen if self.kernels.no_varlen is None else self._framed
        else:
            return self._sdpa(query, key, value, None)
        return attend(query, key, value, pattern)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        packed = (x.squeeze(1) for x in (query, key, value))
        out = varlen(*packed, pattern.compact.cu_seqlens, pattern.active.seq_length, self.softmax_scale)
        return out.view(*query.shape[:2], -1)

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        frame = pattern.compact
        inputs = (x.permute(1, 2, 0, 3) for x in frame.inputs(query, key, value))
        out = flex(*inputs, frame.block_mask, self.softmax_scale)
        return frame.take(out.permute(2, 0, 1, 3).flatten(2))

    def _framed(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        frame = pattern.spread if pattern.keys_of_all else pattern.compact
        return frame.take(self._sdpa(*frame.inputs(query, key, value), frame.mask))

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [Q, B, N, D], key and value [K, B, G, D], mask [B, 1, Q, K] -> [Q, B, N*D]."""
        backends = [b for b in self.kernels.fixed if len(query) in self.kernels.rows or b != SDPBackend.CUDNN_ATTENTION]
        if mask is not None:
            backends = MASKED
            heads = query.shape[2] // key.shape[2]  # these kernels have no groups
            key, value = (x.repeat_interleave(heads, dim=2) if heads > 1 else x for x in (key, value))
        with sdpa_kernel(backends, set_priority=True):
            out = self._attend(query.permute(1, 2, 0, 3), key, value, mask)
        return out.permute(2, 0, 1, 3).flatten(2)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None = None
) -> Tensor:
    """Causal attention within packed sequences: query [T, N, D], key and value [T, G, D] -> [T, N, D].

    Args:
        cu_seqlens: first row of each sequence, and T, [B + 1] int32.
        longest: at least the rows of the longest sequence; it need not be exact.
    """
    attend, options = _varlen_attn()
    return attend(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0), **options
    )


def flex(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float | None = None) -> Tensor:
    """Attention under a block mask: query [B, N, Q, D], key and value [B, G, K, D] -> [B, N, Q, D]."""
    grouped = key.shape[1] != query.shape[1]
    return _flex_attention()(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=grouped)


@lru_cache(maxsize=1)
def _varlen_attn() -> tuple[Callable, dict[str, bool]]:
    from torch.nn.attention.varlen import varlen_attn

    # Up to 2.11, PyTorch has no such argument, and takes groups without being told.
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@lru_cache(maxsize=1)
def _flex_attention() -> Callable:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    # One kernel for each length of a frame, with and without gradients.
    config.recompile_limit = max(config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
