"""Gradients of weights that more than one rank of a model replica holds.

| weight                         | held by                    | a rank's gradient is     | and so it is   |
|--------------------------------|----------------------------|--------------------------|----------------|
| a layer of Nr recursions       | one pipeline rank (a ring) | the whole                | left alone     |
| norms, routers, uncut factors  | all tensor-parallel ranks  | the whole                | left alone     |
| the same, sequence parallel    | all tensor-parallel ranks  | that of its own tokens   | summed         |
| embedding tied to a head       | first, last pipeline rank  | that of its own use      | summed         |

What differs between data-parallel ranks is DeepSpeed's business.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether it is the last pipeline rank's copy of the embedding, which is the first one's."""
    return getattr(parameter, "is_tied_copy", False)


def is_counted_here(parameter: nn.Parameter) -> bool:
    """Whether sums over a model replica take this rank's part of a parameter, so that each element counts once.

    Every tensor-parallel rank's shard counts; of what all of them hold, rank 0's; a tied copy does not.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return (first or getattr(parameter, "tensor_model_parallel", False)) and not is_tied_copy(parameter)


def reduce_replicated(
    gradients: list[tuple[nn.Parameter, Tensor]], sequence_parallel: bool, tied: nn.Parameter | None
) -> None:
    """Make the gradients of an iteration whole; collective over a model replica, once an iteration.

    Args:
        gradients: this rank's parameters and their whole gradients, summed over micro-batches, not yet reduced over
            data-parallel ranks; changed in place.
        sequence_parallel: whether tensor-parallel ranks apply norms and routers to different tokens.
        tied: this rank's embedding or head, if they are one weight that two pipeline ranks hold.
    """
    partial = [gradient for parameter, gradient in gradients if getattr(parameter, "sequence_parallel", False)]
    if sequence_parallel and partial:  # ranks of a tensor-parallel group train the same weights
        group = parallel_state.get_tensor_model_parallel_group()
        flat = torch.cat([gradient.reshape(-1) for gradient in partial])
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(partial, flat.split([gradient.numel() for gradient in partial]), strict=True):
            gradient.copy_(total.view_as(gradient))
    if tied is not None and tied.requires_grad:
        (gradient,) = (gradient for parameter, gradient in gradients if parameter is tied)
        dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
