"""Learning from the predictions of another model beside the labels (Hinton et al., arXiv 1503.02531).

    loss = (1 - w) * cross entropy + w * T^2 * KL(p || q),  p, q = softmax(logits / T) of the teacher and of the model

T^2 keeps the size of the second gradient, which is T * (q - p) then. The teacher is a model of ours of one pipeline
stage, on the ranks that have the head. Its head is cut over tensor-parallel ranks as the model's is, so that a rank has
the logits of both for the same entries of the vocabulary, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from mor_megatron.data.batch import Batch
from mor_megatron.model.elementwise import tried
from mor_megatron.recursion.context import RoutingContext

if TYPE_CHECKING:  # a model has a teacher, and a teacher is a model
    from mor_megatron.model.mor_model import MoRModel


class Mixture(NamedTuple):
    """How the two losses are mixed."""

    temperature: float
    """T"""
    weight: float
    """w"""


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how a model learns from it."""

    teacher: MoRModel
    """In evaluation mode, without gradients."""
    mixture: Mixture

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Predictions:
        """Those of the teacher for every token of a micro-batch."""
        teacher = self.teacher
        context = RoutingContext(selection="threshold", losses="none", metrics=None)
        states = teacher.final_states(batch, context)
        if teacher.config.sequence_parallel:
            states = gather_from_sequence_parallel_region(states)
        weight = teacher.output_layer.weight if teacher.tied_head is None else teacher.tied_head
        return Predictions(states.flatten(0, 1), weight.detach(), self.mixture)


class Predictions:
    """A teacher's, of the n tokens of a micro-batch; its logits are computed where they are compared.

    Args:
        rows: what its head reads, [n, H] of its own width.
        weight: of its head, this rank's part of the vocabulary, [V/TP, H].
    """

    def __init__(self, rows: Tensor, weight: Tensor, mixture: Mixture):
        self.rows, self.weight, self.mixture = rows, weight, mixture
        self.parts = torch.empty(2, len(rows), dtype=torch.float32, device=rows.device)
        """Cross entropy and KL divergence of each token, as far as they were compared."""

    def compare(
        self,
        part: slice,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        real: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """As `distilled_losses`, for a slice of the tokens; returns the first row, keeps the others in `parts`."""
        theirs = torch.mm(self.rows[part], self.weight.t())
        distilled = implementation(logits.device.type)

        def merge(statistics: Tensor) -> Tensor:
            return over_ranks(group, statistics, self.mixture.temperature)

        losses = distilled(logits, theirs, labels, weights, real, self.mixture, merge)
        self.parts[:, part] = losses[1:]
        return losses[0]


def distilled_losses(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    real: int,
    mixture: Mixture,
    merge: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loss, cross entropy and KL divergence, [3, n] fp32, over a vocabulary that ranks divide.

    Args:
        logits: [n, V/TP]; become the gradient of the weighted sum of losses, or nothing of use without weights.
        teacher: its logits, [n, V/TP]; become nothing of use.
        labels: [n], places in this rank's part of the vocabulary; outside of it: on another rank.
        weights: [n] fp32.
        real: places that are no padding.
        mixture: of the two losses.
        merge: `over_ranks`.
    """
    temperature, share = mixture
    ours, theirs = logits.float(), teacher.float()
    gap = theirs - ours
    for wide, value in ((ours, float("-inf")), (theirs, float("-inf")), (gap, 0.0)):
        wide[:, real:] = value
    is_here = (labels >= 0) & (labels < real)
    place = labels.clamp(0, ours.shape[1] - 1).unsqueeze(1)
    predicted = ours.gather(1, place).squeeze(1).where(is_here, 0.0)
    lowest = torch.finfo(torch.float32).min  # finite, also where all is padding
    highest, their_highest = ours.amax(-1).clamp(min=lowest), theirs.amax(-1).clamp(min=lowest)
    hard = ours.sub_(highest.unsqueeze(1)).exp()
    soft = ours.div_(temperature).exp_()
    targets = theirs.sub_(their_highest.unsqueeze(1)).div_(temperature).exp_()
    sums = hard.sum(-1), soft.sum(-1), targets.sum(-1), (targets * gap).sum(-1), predicted
    own = torch.stack([highest, their_highest, *sums])
    whole = merge(own)
    if weights is not None:
        factor = _factors(own[:2] - whole[:2], temperature)[:3] / whole[2:5]  # sums here -> probabilities of all
        ours_hard, ours_soft, their_soft = (factor * weights).unsqueeze(2)
        gradient = hard.mul_((1.0 - share) * ours_hard)
        gradient.add_(soft.mul_(ours_soft).sub_(targets.mul_(their_soft)), alpha=share * temperature)
        gradient.scatter_add_(1, place, -((1.0 - share) * weights * is_here).unsqueeze(1))
        logits.copy_(gradient)
    return losses_of(whole, mixture)


def losses_of(statistics: Tensor, mixture: Mixture) -> Tensor:
    """[3, n] as `distilled_losses`, from what `over_ranks` returns."""
    temperature, share = mixture
    highest, their_highest, hard, soft, targets, gap, predicted = statistics
    cross_entropy = hard.log() - (predicted - highest)
    log_normalizers = (highest / temperature + soft.log()) - (their_highest / temperature + targets.log())
    divergence = gap / (targets * temperature) + log_normalizers
    loss = (1.0 - share) * cross_entropy + share * temperature**2 * divergence
    return torch.stack([loss, cross_entropy, divergence])


def over_ranks(group: dist.ProcessGroup, statistics: Tensor, temperature: float) -> Tensor:
    """Statistics of a whole vocabulary that the ranks of `group` divide.

    Args:
        statistics: of each row here, [7, n]: the model's largest logit m and the teacher's m'; sums of exp(z - m),
            exp((z - m) / T), exp((z' - m') / T) and of the last times (z' - z); the label's logit, 0 where it is
            another rank's.
    """
    if dist.get_world_size(group) == 1:
        return statistics
    highest = statistics[:2].clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = statistics[2:] * _factors(statistics[:2] - highest, temperature)
    dist.all_reduce(sums, group=group)
    return torch.cat([highest, sums])


def _factors(drop: Tensor, temperature: float) -> Tensor:
    """What turns sums relative to one largest logit into those relative to another, [5, n]; `drop` [2, n]: by how much
    the first lies below it."""
    soft = (drop / temperature).exp()
    return torch.stack([drop[0].exp(), soft[0], soft[1], soft[1], torch.ones_like(drop[0])])


@cache
def implementation(device_type: str) -> Callable[..., Tensor]:
    """What computes `distilled_losses` on a device of this type: Triton's kernels on CUDA where they work."""
    if device_type != "cuda":
        return distilled_losses
    one = torch.zeros(1, 1, device=device_type)

    def load() -> Callable[..., Tensor]:
        from mor_megatron.model import fused_loss

        def fused(logits, teacher, labels, weights, real, mixture, merge) -> Tensor:
            whole = fused_loss.distilled(logits, teacher, labels, weights, real, *mixture, merge)
            return losses_of(whole, mixture)

        fused(one, one.clone(), one.view(1).long(), one.view(1), 1, Mixture(1.0, 0.5), lambda own: own)
        return fused

    return tried(load, "the loss of distillation is not fused") or distilled_losses
