"""What ranks of `test_cpu.py` compute: two parallel linears, forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.layer_spec import transformer_config

SEQ, WIDTH, INNER = 6, 8, 12


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input [S, 1, H], weight of its gradient [S, 1, H], and two matrices [F, H], [H, F]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (SEQ, 1, WIDTH), (SEQ, 1, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def run(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's output, and gradients of input and both matrices, each its share."""
    initialize_distributed(config)
    rank, size = dist.get_rank(), dist.get_world_size()
    layer_config = transformer_config(config)
    common = {"config": layer_config, "init_method": layer_config.init_method, "bias": False}
    up = ColumnParallelLinear(WIDTH, INNER, gather_output=False, **common)
    down = RowParallelLinear(INNER, WIDTH, input_is_parallel=True, skip_bias_add=False, **common)
    x, weight, first, second = problem()
    up.weight.data.copy_(first.chunk(size, 0)[rank])
    down.weight.data.copy_(second.chunk(size, 1)[rank])
    if config.parallel.sequence_parallel:
        x, weight = x.chunk(size)[rank].clone(), weight.chunk(size)[rank]
    x.requires_grad_()
    y = down(up(x)[0])[0]
    (y * weight).sum().backward()
    return y.detach(), x.grad, up.weight.grad, down.weight.grad
