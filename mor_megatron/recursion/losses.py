"""Router losses, and how they join the graph.

A loss is attached to the hidden state where it arises, so that nothing but hidden state has to reach the place where
the cross entropy is computed; in a pipeline these are different ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def attach_loss(hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
    """hidden, unchanged, whose backward also back-propagates scale * loss (a scalar)."""
    if scale == 0.0 or not torch.is_grad_enabled() or not loss.requires_grad:
        return hidden
    return _AttachLoss.apply(hidden, scale * loss)


def selection_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of router logits towards being selected, mean over candidates (docs/mor.md, sec. 3.2).

    Args:
        logits: fp32, any shape.
        target: 1.0 where the candidate was selected, same shape.
    """
    return F.binary_cross_entropy_with_logits(logits, target)


def z_loss(logits: Tensor) -> Tensor:
    """mean(logsumexp(logits over the last dim)^2), mean(logit^2) for a single output (docs/mor.md, sec. 3.2, 4)."""
    return torch.logsumexp(logits, dim=-1).square().mean()


def balance_loss(probabilities: Tensor, frequencies: Tensor) -> Tensor:
    """Balancing of depths, Nr * sum_i P_i f_i, 1 when uniform; gradient through P only (docs/mor.md, sec. 4).

    Args:
        probabilities: mean router scores, alpha included, over each sequence or over the micro-batch, [.., Nr].
        frequencies: fraction of tokens that chose each depth, over the same, [.., Nr].
    """
    return probabilities.shape[-1] * (probabilities * frequencies).sum(-1).mean()
