"""How well a router's score, which is causal, predicts the selection by whole-sequence top-k (expert-choice only).

The auxiliary loss trains `sigmoid(logit)` to be the probability that a candidate of a recursion is kept. The pass that
selects by top-k gives, for each candidate, its score and whether it was kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM

BINS = 10
"""Number of equally wide bins of the score; 0.5 is an edge."""


@contextmanager
def router_logits(model: MoRForCausalLM) -> Iterator[list[Tensor]]:
    """Record the logits that the causal threshold reads.

    Yields:
        A list that grows by one entry at each recursion of each pass: the logits of the candidates, [candidates] fp32,
        in the order of the batch's real tokens.
    """
    seen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda module, inputs, logits: seen.append(logits.squeeze(1)))
        for router in model.model.router.threshold_routers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Calibration:
    """Sums over candidates, by recursion and bin of the score. Recursions of capacity 1 are left out.

    Args:
        capacity: fraction of tokens that each recursion keeps, [Nr].
        threshold: lowest score with which a token is kept.
    """

    def __init__(self, capacity: Sequence[float], threshold: float, device: torch.device):
        self.capacity, self.threshold = capacity, threshold
        num_recursions = len(capacity)
        self.sums = torch.zeros(num_recursions, BINS, 3, dtype=torch.float64, device=device)
        """[Nr, BINS, (number of candidates, sum of their scores, number kept)]"""
        self.agreed = torch.zeros(num_recursions, dtype=torch.float64, device=device)
        """Candidates that threshold and top-k treat alike, [Nr]."""

    def add(self, logits: list[Tensor], depths: Tensor) -> None:
        """Add one pass that selected by top-k.

        Args:
            logits: those of its recursions, from `router_logits`.
            depths: recursions that each token took, [B, S]; -1 at padding.
        """
        depths = depths[depths >= 0]
        for r, logit in enumerate(logits):
            if self.capacity[r] == 1.0:
                continue
            kept = (depths[depths >= r] > r).double()
            score = torch.sigmoid(logit).double()
            bins = (score * BINS).long().clamp(max=BINS - 1)
            values = torch.stack([torch.ones_like(score), score, kept], dim=1)
            self.sums[r].index_add_(0, bins, values)
            self.agreed[r] += ((score >= self.threshold).double() == kept).sum()

    def tensors(self) -> list[Tensor]:
        """The tensors that are summed over ranks."""
        return [self.sums, self.agreed]

    def report(self) -> list[dict]:
        """For each recursion: candidates, fraction kept, agreement, expected calibration error, and the bins."""
        recursions = []
        for r, (bins, agreed) in enumerate(zip(self.sums.cpu(), self.agreed.tolist(), strict=True)):
            count, scores, kept = bins.unbind(1)
            total = count.sum().item()
            if total == 0:
                continue
            recursions.append(
                {
                    "recursion": r,
                    "candidates": int(total),
                    "kept": kept.sum().item() / total,
                    "agreement": agreed / total,
                    "calibration_error": (scores - kept).abs().sum().item() / total,
                    "bins": [
                        {"candidates": int(n), "mean_score": (s / n).item(), "kept": (k / n).item()}
                        for n, s, k in zip(count, scores, kept, strict=True)
                        if n > 0
                    ],
                }
            )
        return recursions
