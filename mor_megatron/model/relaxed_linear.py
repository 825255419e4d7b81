"""Megatron-core's parallel linear layers with the low-rank update of the recursion that calls them.

The rows between the two products are as narrow as the rank R, and so is what tensor-parallel ranks exchange:

| layer      | A                     | exchanged between the products      | B                     |
|------------|-----------------------|-------------------------------------|-----------------------|
| column     | whole on each rank    | nothing; backward, gradients summed | cut as the weight is  |
| column, SP | the same, its tokens' | gathered over the sequence          | the same              |
| row        | cut as the weight is  | summed                              | whole on each rank    |
| row, SP    | the same              | summed and scattered                | the same, its tokens' |

Under sequence parallelism (SP), the factor that is whole meets a rank's own tokens only. So its gradient is summed over
ranks, as that of a norm is (`distributed.replicated`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.model.attention import PartialProduct
from mor_megatron.recursion.relaxation import Adapters, adapted


@dataclass(frozen=True)
class Parts:
    """The linear maps that one parallel linear layer computes together."""

    widths: dict[str, int]
    """Of their outputs; names are those of `recursion.relaxation.PARTS`."""
    groups: int = 1
    """A rank's output has the parts' shares of one group after those of another (heads: q, k, v; q, k, v; ..)."""
    is_row: bool = False
    """Its input is cut, not its output."""


class RelaxedLinear(PartialProduct):
    """Before a parallel linear layer's class: a call says which recursion it belongs to, and gets its update."""

    run_config: ClassVar[Config | None] = None
    parts: ClassVar[Parts]

    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, **options):
        super().__init__(inputs, outputs, config=config, **options)
        self.adapters = None
        if self.run_config is not None:
            self.adapters = ParallelAdapters(self.run_config, config, self.parts, inputs)

    def forward(
        self,
        hidden: Tensor,
        recursion: int | None = None,
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ):
        """As the layer; or `product(hidden, weight, bias)`, of the first part.

        Args:
            recursion: whose update is added; None: none.
        """
        result = super().forward(hidden, product=product)
        if self.adapters is None or recursion is None:
            return result
        if product is not None:
            return self.adapters(hidden, recursion, result)
        out, bias = result
        return self.adapters(hidden, recursion, out), bias


def relaxed(layer: type, config: Config | None = None, parts: Parts | None = None) -> type:
    """The class of a parallel linear layer that knows its recursion.

    Args:
        layer: Megatron-core's or Transformer Engine's.
        config: of the run, if it gives these parts adapters; None: there are none.
        parts: what the layer computes.
    """
    given = parts is not None and adapted(config.recursion, config.plan).keys() & parts.widths.keys()
    attributes = {"run_config": config, "parts": parts} if given else {}
    return type(f"Relaxed{layer.__name__}", (RelaxedLinear, layer), attributes)


class ParallelAdapters(Adapters):
    """Adapters beside a parallel linear layer.

    Args:
        run_config: of the run.
        config: of the layer.
        parts: what the layer computes.
        inputs: whole width of its input.
    """

    def __init__(self, run_config: Config, config: TransformerConfig, parts: Parts, inputs: int):
        size, settings = config.tensor_model_parallel_size, run_config.recursion
        widths = parts.widths if parts.is_row else {part: width // size for part, width in parts.widths.items()}
        recursions = adapted(settings, run_config.plan)
        super().__init__(settings, recursions, inputs // size if parts.is_row else inputs, widths, config.params_dtype)
        self.is_row, self.groups, self.sequence_parallel = parts.is_row, parts.groups, config.sequence_parallel
        for part in self.recursions:
            a, b = self.factors(part)
            cut, whole = (a, b) if parts.is_row else (b, a)
            set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=2, stride=1)
            whole.sequence_parallel = config.sequence_parallel

    def forward(self, rows: Tensor, recursion: int, out: Tensor) -> Tensor:
        """`out` of the layer, or of its first part alone, with the recursion's updates."""
        updates = tuple(super().forward(rows, recursion).values())
        if not updates:
            return _WithoutEffect.apply(out, *self.parameters())
        if len(updates) == 1:
            return out + updates[0].view_as(out)
        shares = [update.unflatten(-1, (self.groups, -1)) for update in updates]
        return out + torch.cat(shares, -1).flatten(-2)

    def exchange(self, inner: Tensor) -> Tensor:
        """See the table above."""
        if self.is_row and self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner)
        if self.is_row:
            return reduce_from_tensor_model_parallel_region(inner)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner)
        return copy_to_tensor_model_parallel_region(inner)


class _WithoutEffect(torch.autograd.Function):
    """A tensor as it is; weights that did not meet it get a gradient of zeros.

    Ranks reduce gradients together. Where recursion 0 has no adapters, a rank may have no token that meets any.
    """

    @staticmethod
    def forward(ctx, out: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
