"""Core attention on a GPU: a kernel for each kind of shape.

| rows | attention | kernel |
|---|---|---|
| as many in every sequence | among themselves | cuDNN or flash, through PyTorch's scaled-dot-product attention |
| ragged | among themselves | range attention, our own; else `varlen_attn`, flash on packed rows |
| any | to the keys of all tokens; within documents | range attention |

Rows go into a frame for scaled-dot-product attention where these are not to be used (`model/kernels.py` decides), and
where nearly all tokens attend to the keys of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mor_megatron.model.attention import AttentionPattern, CoreAttention

MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What takes any mask."""
SPREAD = 0.75
"""Share of the tokens above which it should be faster to attend as if all were active, without a mask. With two thirds
of them, range attention takes half of the time (docs/gpu.md); with all, 1.75 times the time."""


@dataclass(frozen=True)
class AttentionKernels:
    """The choice for one model on one kind of GPU."""

    fixed: tuple[SDPBackend, ...]
    """For regular rows, the preferred one first."""
    rows: frozenset[int]
    """Numbers of rows that come back in every micro-batch. Others are not for cuDNN, which makes a plan for each."""
    no_varlen: str | None = None
    """Why `varlen_attn` does not take over where range attention is not used; None: it does."""
    no_ranges: str | None = None
    """Why range attention is not used; None: it is."""


class AttentionByShape(CoreAttention):
    """softmax(q k^T / sqrt(D)) v; see `CoreAttention` for the shapes."""

    def __init__(self, *args, kernels: AttentionKernels, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernels = kernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        """query [R, C, N, D], key and value [R', C', G, D] -> [R, C, N*D]."""
        if pattern.masked:
            attend = self._ranges if self.kernels.no_ranges is None and not _nearly_all(pattern) else self._framed
        elif pattern.active.ragged:
            if self.kernels.no_ranges is None:
                attend = self._packed
            else:
                attend = self._varlen if self.kernels.no_varlen is None else self._framed
        else:
            return self._sdpa(query, key, value, None)
        return attend(query, key, value, pattern)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        packed = (x.squeeze(1) for x in (query, key, value))
        out = varlen(*packed, pattern.compact.cu_seqlens, pattern.active.seq_length, self.softmax_scale)
        return out.view(*query.shape[:2], -1)

    def _ranges(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        frame = pattern.exact
        out = _range_attention()(*frame.inputs(query, key, value), *frame.ranges, self.softmax_scale)
        return frame.take(out.flatten(2))

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        ranges = pattern.compact.packed_ranges
        return _range_attention()(query, key, value, *ranges, self.softmax_scale).flatten(2)

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


def _nearly_all(pattern: AttentionPattern) -> bool:
    """Whether to attend as if all tokens were active."""
    metadata = pattern.metadata
    return metadata.document_ids is None and pattern.active.count > SPREAD * metadata.seq_length * metadata.batch_size


@lru_cache(maxsize=1)
def _varlen_attn() -> tuple[Callable, dict[str, bool]]:
    from torch.nn.attention.varlen import varlen_attn

    # Up to 2.11, PyTorch has no such argument, and takes groups without being told.
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@lru_cache(maxsize=1)
def _range_attention() -> Callable:
    from mor_megatron.model.range_attention import range_attention  # needs Triton

    return range_attention
