"""One micro-batch of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids, and what the loss and attention need to know about them."""

    tokens: Tensor
    """[B, S] int64"""
    labels: Tensor | None = None
    """[B, S] int64, the token after each one; None asks the model for logits."""
    loss_mask: Tensor | None = None
    """[B, S] fp32, 1 where the prediction counts; None counts all."""
    position_ids: Tensor | None = None
    """[B, S] int64; None is 0..S-1."""
    document_ids: Tensor | None = None
    """[B, S] int64, index of the document in the sample; None attends across documents."""
    corpus_ids: Tensor | None = None
    """[B] int64, the corpus of a blend that each sample is from; None: there is only one."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; from pinned memory, the host does not wait for the copy."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; PyTorch's DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(None if x is None else change(x) for x in vars(self).values()))
