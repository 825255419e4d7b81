"""Head and cross entropy in chunks of rows, so that the logits of a micro-batch are never in memory as a whole.

The gradients of hidden state and weight are computed in the forward pass, while a chunk's logits are there: a backward
pass that computed them again would cost a third more matrix products. They are those of the sum of the counted
losses, so all that is left to the backward pass is to multiply them by what that sum weighs in the loss of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from mor_megatron.model.distillation import Predictions
from mor_megatron.model.elementwise import tried
from mor_megatron.model.products import add_product

Merge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From what each rank has of a row to what all have: `over_ranks`."""
CrossEntropy = Callable[[Tensor, Tensor, Tensor | None, int, Merge], Tensor]
"""`cross_entropy`, or what is faster and equal to it."""
Criterion = Callable[[slice, Tensor, Tensor | None], Tensor]
"""Losses [n] of a slice of the rows from their logits [n, V/TP], which become the gradient of the losses' sum, weighted
by the last argument, [n]."""


def whole_losses(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Cross entropy of each token from all logits at once: [S, B, V/TP], [S, B] -> [S, B] fp32."""
    real = _real(logits.shape[-1], vocab_size)
    if real < logits.shape[-1]:
        # A padding id is no prediction: without this, the loss would depend on how much padding there is.
        logits = logits.clone()
        logits[..., real:] = float("-inf")
    return vocab_parallel_cross_entropy(logits.float(), labels)


def chunked_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    counted: Tensor | None,
    chunk: int,
    vocab_size: int,
    sequence_parallel: bool,
    teacher: Predictions | None = None,
) -> Tensor:
    """Cross entropy of each token, from the head's weight. Its gradient must be a multiple of `counted`.

    Args:
        hidden: [S, B, H], or this rank's share of the sequence.
        weight: of the head, this rank's part of the vocabulary, [V/TP, H].
        labels: [S, B] int64.
        counted: [S, B], what each token weighs in the loss, 0 for nothing; None: 1.
        chunk: rows whose logits are computed at once.
        vocab_size: entries of the vocabulary that are no padding.
        sequence_parallel: `hidden` is a share.
        teacher: its predictions for the same tokens, which are learned as well.
    Returns:
        [S, B] fp32. With a teacher, [3, S, B]: what is minimized, then cross entropy and KL divergence, which have no
        gradient.
    Raises:
        RuntimeError: in the backward pass, on the device: the gradient is no multiple of `counted`.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    counted = torch.ones_like(labels, dtype=torch.float32) if counted is None else counted.float()
    rows = hidden.reshape(-1, hidden.shape[-1])
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    real = _real(len(weight), vocab_size)
    group = parallel_state.get_tensor_model_parallel_group()
    own = labels.reshape(-1) - dist.get_rank(group) * len(weight)  # places in this rank's part; outside: another rank's

    def cross_entropies(part: slice, logits: Tensor, weights: Tensor | None) -> Tensor:
        return implementation(logits.device.type)(logits, own[part], weights, real, partial(over_ranks, group))

    def distilled(part: slice, logits: Tensor, weights: Tensor | None) -> Tensor:
        return teacher.compare(part, logits, own[part], weights, real, group)

    criterion = cross_entropies if teacher is None else distilled
    losses = ChunkedLoss.apply(rows, weight, counted.reshape(-1), chunk, criterion, trains)
    if teacher is None:
        return losses.view(labels.shape)
    return torch.stack([losses, *teacher.parts]).view(3, *labels.shape)


def _real(share: int, vocab_size: int) -> int:
    """Entries of this rank's part of the vocabulary that are no padding."""
    return min(share, max(0, vocab_size - share * parallel_state.get_tensor_model_parallel_rank()))


class ChunkedLoss(torch.autograd.Function):
    """Losses [n] of rows [n, H], which a criterion gives for a chunk; see `chunked_losses`."""

    @staticmethod
    def forward(ctx, hidden, weight, counted, chunk, criterion: Criterion, trains) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        if trains:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = None
            if weight.requires_grad:
                grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            rows = hidden[part]
            logits = torch.mm(rows, weight.t(), out=buffer[: len(rows)])
            losses[part] = criterion(part, logits, counted[part] if trains else None)
            if trains:  # the logits have become their gradient
                torch.mm(logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    add_product(grad_weight, logits.t(), rows)
        if trains:
            ctx.save_for_backward(counted, grad_hidden, grad_weight)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        counted, grad_hidden, grad_weight = ctx.saved_tensors
        place = counted.argmax().view(1)  # no index that the host would have to know
        scale = grad.gather(0, place) / counted.gather(0, place).clamp(min=torch.finfo(torch.float32).tiny)
        is_multiple = ((grad - scale * counted).abs() > 1e-5 * scale.abs()).logical_not().all()
        torch._assert_async(is_multiple, "the gradient of the losses is no multiple of the tokens' weights in the loss")
        scale = scale.squeeze(0)
        return grad_hidden.mul_(scale), None if grad_weight is None else grad_weight.mul_(scale), *[None] * 4


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, real: int, merge: Merge) -> Tensor:
    """Cross entropy [n] fp32 over a vocabulary that ranks divide; overwrites the logits.

    Args:
        logits: [n, V/TP]; become the gradient of the weighted sum of losses, or nothing of use without weights.
        labels: [n], places in this rank's part of the vocabulary; outside of it: on another rank.
        weights: [n] fp32.
        real: places that are no padding. A padding id is no prediction.
        merge: over the ranks.
    """
    wide = logits.float()
    wide[:, real:] = float("-inf")
    is_here = (labels >= 0) & (labels < real)
    place = labels.clamp(0, wide.shape[1] - 1).unsqueeze(1)
    own_largest = wide.amax(-1).clamp(min=torch.finfo(torch.float32).min)  # finite, also where all is padding
    own_predicted = wide.gather(1, place).squeeze(1).where(is_here, 0.0)
    own_total = wide.sub_(own_largest.unsqueeze(1)).exp_().sum(-1)
    largest, total, predicted = merge(own_largest, own_total, own_predicted)
    if weights is not None:
        wide.mul_((weights * (own_largest - largest).exp() / total).unsqueeze(1))
        wide.scatter_add_(1, place, -(weights * is_here).unsqueeze(1))
        if wide is not logits:
            logits.copy_(wide)
    return total.log() - (predicted - largest)


def over_ranks(
    group: dist.ProcessGroup, largest: Tensor, total: Tensor, predicted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a whole vocabulary that the ranks of `group` divide.

    Args:
        largest: logit of each row, [n].
        total: sum of exponentials relative to it, [n].
        predicted: logit of the label, [n]; 0 where it is another rank's.
    """
    if dist.get_world_size(group) == 1:
        return largest, total, predicted
    highest = largest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([total * (largest - highest).exp(), predicted])
    dist.all_reduce(sums, group=group)
    return highest, *sums


@cache
def implementation(device_type: str) -> CrossEntropy:
    """What computes it on a device of this type: Triton's kernels on CUDA where they work."""
    if device_type != "cuda":
        return cross_entropy
    one = torch.zeros(1, 1, device=device_type)

    def load() -> CrossEntropy:
        from mor_megatron.model import fused_loss

        fused_loss.cross_entropy(one, one.view(1).long(), one.view(1), 1, lambda *own: own)
        return fused_loss.cross_entropy

    return tried(load, "the loss is not fused") or cross_entropy
