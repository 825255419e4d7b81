"""ZeRO 3: between uses, each rank holds a part of every weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from megatron.core import parallel_state
from torch import nn

from mor_megatron.model.stored_names import stored_parameters
from mor_megatron.training.gradients import Gradients
from mor_megatron.training.modes.sharded import ShardedGradients
from mor_megatron.training.modes.slices import ParameterSlice


class Zero3(ShardedGradients):
    """Weights are gathered before a module runs; gradients, fp32 copies and optimizer state lie in partitions."""

    wraps = DeepSpeedZeroOptimizer_Stage3

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

    def parameter_slices(self) -> list[ParameterSlice]:
        rank = parallel_state.get_data_parallel_rank()
        names = {id(parameter): name for name, parameter in stored_parameters(self.module)}
        slices = []
        for parameter, group, begin, length in self._places():
            offset = rank * length
            real = min(length, parameter.ds_numel - offset)  # partitions are of one size, the last ones padded
            if real > 0:
                updated = self._zero.fp32_partitioned_groups_flat[group]
                slices.append(ParameterSlice(names[id(parameter)], parameter, offset, real, updated, begin))
        return slices

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
