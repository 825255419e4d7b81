"""What a MoR model returns. This file travels with an exported model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .cache_mor import MoRCache


@dataclass
class MoRModelOutput(ModelOutput):
    """Of `MoRModel`."""

    last_hidden_state: Tensor | None = None
    """[B, S, H] after the final norm. At padding: that of the last real token before it, 0 if there is none."""
    cache: MoRCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, S, H] each, where they were asked for: what each position of the unrolled network reads, and
    `last_hidden_state`. From its exit on, a token keeps its exit state. At padding as there."""
    depths: Tensor | None = None
    """[B, S] int8: recursions that each token passed; -1 at padding."""
    router_loss: Tensor | None = None
    """Router losses times their coefficients, where they were asked for."""


@dataclass
class MoRHeadOutput(ModelOutput):
    """Of a model with a head."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MoRCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """As in `MoRModelOutput`."""
    depths: Tensor | None = None
    """As in `MoRModelOutput`."""
    router_loss: Tensor | None = None
    """Part of `loss`."""

    @property
    def past_key_values(self) -> MoRCache | None:
        """The cache's old name."""
        return self.cache


__all__ = ["MoRHeadOutput", "MoRModelOutput"]
