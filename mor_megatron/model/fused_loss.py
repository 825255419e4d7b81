"""Cross entropy of a chunk of logits on CUDA, in two Triton kernels; see `loss.cross_entropy`, which defines it.

The first reads the logits once, the second turns them into their gradient, in their own type. Between the two, ranks
that divide the vocabulary exchange three numbers a row. Stands alone and needs Triton, as `fused` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

Merge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
BLOCK = 4096
"""Logits of a row per program, or per step of one: 16 a thread."""


@triton.jit
def _statistics(
    logits,
    labels,
    largest,
    total,
    predicted,
    width,
    real,
    LOWEST: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Of each row's real logits: the largest, the sum of exponentials relative to it, and the label's logit."""
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * width
    high = tl.full([SIZE], LOWEST, dtype=tl.float32)  # finite: the difference of two infinities is no number
    added = tl.zeros([SIZE], dtype=tl.float32)
    for part in range(PARTS):
        column = part * SIZE + tl.arange(0, SIZE)
        value = tl.load(first + column, mask=column < width, other=0.0).to(tl.float32)
        value = tl.where(column < real, value, float("-inf"))
        higher = tl.maximum(high, value)
        added = added * tl.exp(high - higher) + tl.exp(value - higher)
        high = higher
    highest = tl.max(high, axis=0)
    tl.store(largest + row, highest)
    tl.store(total + row, tl.sum(added * tl.exp(high - highest), axis=0))
    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < real)
    tl.store(predicted + row, tl.load(first + label, mask=is_here, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits, labels, log_total, weights, width, real, SIZE: tl.constexpr):
    """logits -> weight * (softmax - 1 at the label), 0 in the padding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    place = logits + row * width + column
    value = tl.load(place, mask=column < width, other=0.0).to(tl.float32)
    value = tl.where(column < real, value, float("-inf"))
    label = tl.load(labels + row)
    probability = tl.exp(value - tl.load(log_total + row))
    at_label = (column == label) & (column < real)
    change = (probability - tl.where(at_label, 1.0, 0.0)) * tl.load(weights + row)
    tl.store(place, change, mask=column < width)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, real: int, merge: Merge) -> Tensor:
    """As `loss.cross_entropy`."""
    rows, width = logits.shape
    largest, total, predicted = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    size = min(BLOCK, triton.next_power_of_2(width))
    options = {"SIZE": size, "num_warps": max(1, size // 512)}
    lowest, parts = torch.finfo(torch.float32).min, triton.cdiv(width, size)
    _statistics[(rows,)](logits, labels, largest, total, predicted, width, real, lowest, parts, **options)
    largest, total, predicted = merge(largest, total, predicted)
    log_total = total.log()
    if weights is not None:
        _gradient[(rows, parts)](logits, labels, largest + log_total, weights, width, real, **options)
    return log_total - (predicted - largest)
