"""Tensors that a pipeline rank keeps for a later chunk of the same micro-batch.

The schedule runs the backward pass of each chunk by itself, the later chunk first. What an earlier chunk kept becomes a
leaf there, collects gradient, and hands it over when the earlier chunk's backward pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent: Tensor, leaves: tuple[Tensor, ...], *kept: Tensor) -> Tensor:
        ctx.leaves = leaves
        return sent.view_as(sent)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, *(leaf.grad for leaf in ctx.leaves)


def keep(sent: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Keep tensors of this chunk for a later one.

    Args:
        sent: what the chunk sends; its backward starts this chunk's.
        kept: tensors of this chunk's graph.
    Returns:
        `sent`, to be sent instead, and one leaf for each kept tensor, of the same storage. The gradients that the
        leaves have when `sent` goes backward join those of the kept tensors.
    """
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in kept]
    if not kept or not torch.is_grad_enabled():
        return sent, leaves
    return _HandOver.apply(sent, tuple(leaves), *kept), leaves
