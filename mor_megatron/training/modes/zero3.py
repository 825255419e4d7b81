"""ZeRO 3: between uses, each rank holds a part of every weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.model.stored_names import stored_parameters
from mor_megatron.training.gradients import Gradients
from mor_megatron.training.modes.sharded import ShardedGradients
from mor_megatron.training.modes.slices import ParameterSlice


class Zero3(ShardedGradients):
    """Weights are gathered before a module runs; gradients, fp32 copies and optimizer state lie in partitions."""

    wraps = DeepSpeedZeroOptimizer_Stage3
    partitions_weights = True

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        self._zero._get_norm_groups = lambda: [self.norm_and_clip()]

    def discard(self) -> None:
        super().discard()
        # What DeepSpeed forgets after an overflow.
        if self._zero.offload_optimizer:
            self._zero.reset_cpu_buffers()
        else:
            self._zero.averaged_gradients = {}

    def gradient_shards(self) -> Gradients:
        zero = self._zero
        if not zero.offload_optimizer:
            return [
                pair
                for group, parameters in enumerate(zero.fp16_groups)
                for pair in zip(parameters, zero.averaged_gradients[group], strict=True)
            ]
        return [
            (parameter, zero.fp32_partitioned_groups_flat[group].grad.narrow(0, begin, length))
            for parameter, group, begin, length in self._places()
        ]

    def updated_slices(self) -> list[ParameterSlice]:
        names = {id(parameter): name for name, parameter in stored_parameters(self.module)}
        flat = self._zero.fp32_partitioned_groups_flat
        return [
            part
            for parameter, group, begin, length in self._places()
            for part in _of_this_rank(names[id(parameter)], parameter, length, flat[group], begin)
        ]

    def frozen_slices(self) -> list[ParameterSlice]:
        return [
            part
            for name, parameter in stored_parameters(self.module)
            if not parameter.requires_grad
            for part in _of_this_rank(name, parameter, parameter.ds_tensor.numel(), parameter.ds_tensor, 0)
        ]

    def shard_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)  # an empty tensor is in the weight's place

    @torch.no_grad()
    def refresh(self) -> None:
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)

    def _places(self) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """Every parameter, the flat partition that this rank's part of it lies in, where that begins, its length."""
        for parameters in self._zero.fp16_groups:
            for parameter in parameters:
                yield parameter, *self._zero.grad_position[self._zero.get_param_id(parameter)]


def _of_this_rank(
    name: str, parameter: nn.Parameter, length: int, tensor: Tensor, begin: int
) -> Iterator[ParameterSlice]:
    """What this rank has of a parameter, if anything: partitions are of one `length`, the last ones padded."""
    offset = parallel_state.get_data_parallel_rank() * length
    real = min(length, parameter.ds_numel - offset)
    if real > 0:
        yield ParameterSlice(name, parameter, offset, real, tensor, begin)
