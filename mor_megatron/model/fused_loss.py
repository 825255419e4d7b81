"""Losses of a chunk of logits on CUDA, in two Triton kernels each: cross entropy, as `loss.cross_entropy` defines it,
and that of distillation, as `distillation.distilled_losses` does.

The first kernel reads the logits once, the second turns them into their gradient, in their own type. Between the two,
ranks that divide the vocabulary exchange a few numbers a row. Stands alone and needs Triton, as `fused` does.
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


@triton.jit
def _distilled_statistics(
    logits,
    teacher,
    labels,
    found,
    rows,
    width,
    real,
    temperature,
    LOWEST: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Of each row's real logits, what `distillation.over_ranks` takes: [7, rows]."""
    row = tl.program_id(0).to(tl.int64)
    first, their_first = logits + row * width, teacher + row * width
    high = tl.full([SIZE], LOWEST, dtype=tl.float32)
    their_high = tl.full([SIZE], LOWEST, dtype=tl.float32)
    hard = tl.zeros([SIZE], dtype=tl.float32)
    soft = tl.zeros([SIZE], dtype=tl.float32)
    targets = tl.zeros([SIZE], dtype=tl.float32)
    gaps = tl.zeros([SIZE], dtype=tl.float32)
    for part in range(PARTS):
        column = part * SIZE + tl.arange(0, SIZE)
        is_real = column < real
        value = tl.load(first + column, mask=column < width, other=0.0).to(tl.float32)
        theirs = tl.load(their_first + column, mask=column < width, other=0.0).to(tl.float32)
        gap = tl.where(is_real, theirs - value, 0.0)
        value = tl.where(is_real, value, float("-inf"))
        theirs = tl.where(is_real, theirs, float("-inf"))
        higher = tl.maximum(high, value)
        their_higher = tl.maximum(their_high, theirs)
        target = tl.exp((theirs - their_higher) / temperature)
        fall = tl.exp((their_high - their_higher) / temperature)
        hard = hard * tl.exp(high - higher) + tl.exp(value - higher)
        soft = soft * tl.exp((high - higher) / temperature) + tl.exp((value - higher) / temperature)
        targets = targets * fall + target
        gaps = gaps * fall + target * gap
        high, their_high = higher, their_higher
    highest, their_highest = tl.max(high, axis=0), tl.max(their_high, axis=0)
    fall = tl.exp((their_high - their_highest) / temperature)
    tl.store(found + row, highest)
    tl.store(found + rows + row, their_highest)
    tl.store(found + 2 * rows + row, tl.sum(hard * tl.exp(high - highest), axis=0))
    tl.store(found + 3 * rows + row, tl.sum(soft * tl.exp((high - highest) / temperature), axis=0))
    tl.store(found + 4 * rows + row, tl.sum(targets * fall, axis=0))
    tl.store(found + 5 * rows + row, tl.sum(gaps * fall, axis=0))
    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < real)
    tl.store(found + 6 * rows + row, tl.load(first + label, mask=is_here, other=0.0).to(tl.float32))


@triton.jit
def _distilled_gradient(
    logits, teacher, labels, whole, weights, rows, width, real, temperature, share, SIZE: tl.constexpr
):
    """logits -> weight * ((1 - share) * (softmax - 1 at the label) + share * T * (softmax of logits / T - theirs))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    is_real = column < real
    place = logits + row * width + column
    value = tl.load(place, mask=column < width, other=0.0).to(tl.float32)
    theirs = tl.load(teacher + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    value = tl.where(is_real, value, float("-inf")) - tl.load(whole + row)
    theirs = tl.where(is_real, theirs, float("-inf")) - tl.load(whole + rows + row)
    hard = tl.exp(value) / tl.load(whole + 2 * rows + row)
    soft = tl.exp(value / temperature) / tl.load(whole + 3 * rows + row)
    target = tl.exp(theirs / temperature) / tl.load(whole + 4 * rows + row)
    at_label = (column == tl.load(labels + row)) & is_real
    change = (1.0 - share) * (hard - tl.where(at_label, 1.0, 0.0)) + share * temperature * (soft - target)
    tl.store(place, change * tl.load(weights + row), mask=column < width)


def distilled(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    real: int,
    temperature: float,
    share: float,
    merge: Callable[[Tensor], Tensor],
) -> Tensor:
    """As `distillation.distilled_losses`, but that the statistics are returned from which the losses follow, [7, n]."""
    rows, width = logits.shape
    found = torch.empty(7, rows, dtype=torch.float32, device=logits.device)
    size = min(BLOCK, triton.next_power_of_2(width))
    options = {"SIZE": size, "num_warps": max(1, size // 512)}
    lowest, parts = torch.finfo(torch.float32).min, triton.cdiv(width, size)
    statistics = logits, teacher, labels, found, rows, width, real, temperature, lowest, parts
    _distilled_statistics[(rows,)](*statistics, **options)
    whole = merge(found)
    if weights is not None:
        gradient = logits, teacher, labels, whole, weights, rows, width, real, temperature, share
        _distilled_gradient[(rows, parts)](*gradient, **options)
    return whole
