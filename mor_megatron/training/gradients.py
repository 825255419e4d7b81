"""An iteration's gradients: their global norm, their clipping.

The norm is ours in every mode. DeepSpeed's takes one collective a parameter group, which do not match where pipeline
ranks have different groups (routers live on the first), and its precision differs between modes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.replicated import is_counted_here

Gradients = list[tuple[nn.Parameter, Tensor]]
"""Parameters and their gradients, or this rank's shards of them; padding is left out."""

_RUN = 1024


def global_norm(gradients: Gradients, data_parallel_group: dist.ProcessGroup | None = None) -> float:
    """L2 norm of the whole model's gradient; collective over tensor- and pipeline-parallel ranks.

    Each parameter counts once (`is_counted_here`).

    Args:
        gradients: reduced over data-parallel ranks.
        data_parallel_group: whose ranks hold different shards; None where each has the whole.
    """
    counted = [gradient for parameter, gradient in gradients if is_counted_here(parameter)]
    total = sum_of_squares(counted).to(device())  # offloaded gradients are not where collectives are
    for group in (data_parallel_group, parallel_state.get_model_parallel_group()):
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
    return math.sqrt(float(total))


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of all elements, 0-d fp64, to 3e-8: fp32 over runs of 1024 elements, fp64 over the runs.

    An fp64 sum of every element would take five times as long on a CPU.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    squares = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // _RUN * _RUN
        for rows in (flat[:whole].view(-1, _RUN), flat[whole:].view(1, -1)):
            squares.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum())
    return torch.stack(squares).sum()


def clip(gradients: Gradients, norm: float, limit: float) -> None:
    """Scale gradients of global norm `norm` down to `limit`; 0 is no limit."""
    if 0.0 < limit < norm and gradients:
        torch._foreach_mul_([gradient for _, gradient in gradients], limit / norm)
