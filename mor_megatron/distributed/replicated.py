"""Gradients of weights that more than one rank of a model replica holds.

| weight                         | held by                    | a rank's gradient is     | and so it is   |
|--------------------------------|----------------------------|--------------------------|----------------|
| a layer of Nr recursions       | one pipeline rank (a ring) | the whole                | left alone     |
| norms, routers                 | all tensor-parallel ranks  | the whole                | left alone     |
| the same, sequence parallel    | all tensor-parallel ranks  | that of its own tokens   | summed         |
| embedding tied to a head       | first, last pipeline rank  | that of its own use      | summed         |

What differs between data-parallel ranks is DeepSpeed's business.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.model.mor_model import MoRModel


def reduce_replicated(model: MoRModel, gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Make the gradients of an iteration whole; collective over a model replica, once an iteration.

    Args:
        model: this rank's part.
        gradients: parameters and their whole gradients, summed over micro-batches, not yet reduced over data-parallel
            ranks; changed in place.
    """
    if model.config.sequence_parallel:
        partial = [gradient for parameter, gradient in gradients if getattr(parameter, "sequence_parallel", False)]
        group = parallel_state.get_tensor_model_parallel_group()
        flat = torch.cat([gradient.reshape(-1) for gradient in partial])
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(partial, flat.split([gradient.numel() for gradient in partial]), strict=True):
            gradient.copy_(total.view_as(gradient))
    tied = model.tied_weight
    if tied is not None:
        (gradient,) = (gradient for parameter, gradient in gradients if parameter is tied)
        dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
