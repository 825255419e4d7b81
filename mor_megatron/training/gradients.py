"""An iteration's gradients: where each of DeepSpeed's optimizers keeps them, their global norm, their clipping.

The norm is ours in every mode. DeepSpeed's takes one collective a parameter group, which do not match where pipeline
ranks have different groups (routers live on the first), and its precision differs between modes.
"""

from __future__ import annotations

import math

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.distributed.cpu import device

Engine = deepspeed.DeepSpeedEngine
Gradients = list[tuple[nn.Parameter, Tensor]]
"""Parameters and their gradients, or this rank's shares of them; padding is left out."""

_RUN = 1024


def is_sharded(optimizer: object) -> bool:
    """Whether DeepSpeed divides gradients among data-parallel ranks inside its step, or before."""
    return isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)


def whole_gradients(engine: Engine) -> Gradients:
    """This rank's gradients of the iteration so far, each whole, fp32; schedule-driven only."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        return [pair for group in groups for pair in zip(*group, strict=True)]
    parameters = engine.module.parameters()
    return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]


def accumulated_gradients(engine: Engine) -> list[Tensor]:
    """The same in as few tensors as there are; they may end in padding of zeros."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        return engine.optimizer.get_grads_for_reduction()[0]
    return [gradient for _, gradient in whole_gradients(engine)]


def gradients_are_finite(engine: Engine) -> bool:
    """Whether every accumulated gradient of this rank is finite."""
    # A sum runs at memory speed, and is finite if its terms are (or so close to overflow that it matters as little).
    gradients = accumulated_gradients(engine)
    return not gradients or all(torch.stack([gradient.sum() for gradient in gradients]).isfinite().tolist())


def discard_gradients(engine: Engine) -> None:
    """Forget the accumulated gradients; weights, optimizer state and loss scale stay as they are."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if not is_sharded(optimizer):
        return
    # What DeepSpeed forgets after an overflow.
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        else:
            optimizer.averaged_gradients = {}
        return
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
    for group in range(len(optimizer.bit16_groups)):
        optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


def global_norm(gradients: Gradients, data_parallel_group: dist.ProcessGroup | None = None) -> float:
    """L2 norm of the whole model's gradient; collective over tensor- and pipeline-parallel ranks.

    Each parameter counts once: one that tensor parallelism cuts on all its ranks, any other on rank 0 of them, and a
    copy of the tied embedding (`ds_pipe_replicated`) not at all.

    Args:
        gradients: reduced over data-parallel ranks.
        data_parallel_group: whose ranks hold different shares; None where each has the whole.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    counted = [
        gradient
        for parameter, gradient in gradients
        if (first or is_model_parallel_parameter(parameter)) and not getattr(parameter, "ds_pipe_replicated", False)
    ]
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


class ShardedClipping:
    """Our norm and clipping where ZeRO's optimizers compute theirs: in their step, after the reduction.

    Args:
        optimizer: of ZeRO 1, 2 or 3; its own clipping has to be off.
    """

    def __init__(self, optimizer: ZeROOptimizer):
        assert optimizer.clip_grad == 0.0
        self.optimizer = optimizer
        self.limit = 0.0
        """Largest global norm of the next step, 0 for no clipping."""
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer._get_norm_groups = lambda: [self.norm()]
        else:
            optimizer.scaled_global_norm = lambda: self.norm()

    def norm(self) -> Tensor:
        """Clip; the norm before, times the loss scale, 0-d. DeepSpeed skips a step whose norm is not finite."""
        optimizer, scale = self.optimizer, self.optimizer.loss_scale
        gradients = sharded_gradients(optimizer)
        norm = global_norm(gradients, optimizer.dp_process_group)
        if math.isfinite(norm):
            clip(gradients, norm, self.limit * scale)
        return torch.tensor(norm, dtype=torch.float64, device=optimizer.device)


def sharded_gradients(optimizer: ZeROOptimizer) -> Gradients:
    """This rank's shares of the reduced gradients, as they are inside the step of a sharding optimizer."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _stage3_shares(optimizer)
    shares: Gradients = []
    for group, parameters in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            flat = optimizer.single_partition_of_fp32_groups[group].grad.view(-1)
            for parameter in parameters:
                _, _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                shares.append((parameter, flat.narrow(0, start, length)))
        else:
            real = [part for part in optimizer.averaged_gradients[group] if not getattr(part, "_zero_padding", False)]
            shares += zip(parameters, real, strict=False)  # trailing padding is not always marked
    return shares


def _stage3_shares(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Gradients:
    if not optimizer.offload_optimizer:
        return [
            pair
            for group, parameters in enumerate(optimizer.fp16_groups)
            for pair in zip(parameters, optimizer.averaged_gradients[group], strict=True)
        ]
    shares: Gradients = []
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            shares.append((parameter, optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, start, length)))
    return shares
