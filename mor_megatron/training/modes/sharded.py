"""Modes in which DeepSpeed divides gradients among data-parallel ranks, inside its step or before: most of ZeRO."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from mor_megatron.training.gradients import Gradients, clip, global_norm
from mor_megatron.training.modes.base import Engine, StepOutcome
from mor_megatron.training.modes.slices import ParameterSlice, slices_of_partitions
from mor_megatron.training.sections import Sections


class ShardedGradients(Engine):
    """Takes the norm and clips where DeepSpeed does: in its step, after the reduction, in place of its own."""

    partitions_state = True

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        self._zero = deepspeed.optimizer
        self._limit = 0.0  # for `norm_and_clip` in the step under way
        assert self._zero.clip_grad == 0.0
        if deepspeed.fp16_enabled():
            self._zero.loss_scaler.raise_error_at_min_scale = False  # the loop counts and reports skipped steps

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale) if self.deepspeed.fp16_enabled() else 1.0

    def _step(self, clip_grad: float, sections: Sections) -> StepOutcome:
        scale, self._limit = self.loss_scale, clip_grad
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        norm = float(self.deepspeed.get_global_grad_norm()) if applied else math.inf
        if not applied:
            self.discard()  # DeepSpeed forgets them everywhere but in the shards of an offloaded optimizer
        can_fall = self.deepspeed.fp16_enabled() and scale > self._zero.loss_scaler.min_scale
        return StepOutcome(grad_norm=norm, applied=applied, overflow=not applied and can_fall)

    def norm_and_clip(self) -> Tensor:
        """Clip; the norm before, times the loss scale, 0-d. DeepSpeed skips a step whose norm is not finite."""
        gradients = self.gradient_shards()
        norm = global_norm(gradients, self._zero.dp_process_group)
        if math.isfinite(norm):
            clip(gradients, norm, self._limit * self._zero.loss_scale)
        return torch.tensor(norm, dtype=torch.float64, device=self._zero.device)

    @abstractmethod
    def gradient_shards(self) -> Gradients:
        """This rank's shards of the reduced gradients, times the loss scale, as they are inside the step."""

    @property
    def _loss_scaler(self) -> DynamicLossScaler | None:
        scaler = self._zero.loss_scaler
        return scaler if self.deepspeed.fp16_enabled() and isinstance(scaler, DynamicLossScaler) else None


class Zero12(ShardedGradients):
    """ZeRO 1 and 2: weights whole, fp32 copies and optimizer state in flat partitions."""

    wraps = DeepSpeedZeroOptimizer

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        self._zero.scaled_global_norm = lambda: self.norm_and_clip()
        own = set(self.module.parameters())
        self._not_in_model = [weight for group in self._zero.bit16_groups for weight in group if weight not in own]
        if deepspeed.bfloat16_enabled() or deepspeed.fp16_enabled():
            # ZeRO 2 would round to the parameters' type what a backward pass leaves before it is reduced.
            self._zero._gradient_reduction_buffer_dtype = lambda: torch.float32

    def _step(self, clip_grad: float, sections: Sections) -> StepOutcome:
        for weight in self._not_in_model:
            (0.0 * weight).sum().backward()  # DeepSpeed does not step without a gradient
        return super()._step(clip_grad, sections)

    def discard(self) -> None:
        super().discard()
        # What DeepSpeed forgets after an overflow.
        self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
        if self._zero.cpu_offload:
            self._zero.reset_cpu_buffers()
        for group in range(len(self._zero.bit16_groups)):
            self._zero.averaged_gradients[group] = self._zero.all_grad_tensors[group] = None

    def gradient_shards(self) -> Gradients:
        zero = self._zero
        shards: Gradients = []
        for group, parameters in enumerate(zero.params_in_partition):
            if zero.cpu_offload:
                flat = zero.single_partition_of_fp32_groups[group].grad.view(-1)
                for parameter in parameters:
                    _, _, begin, length = zero.grad_position[zero.get_param_id(parameter)]
                    shards.append((parameter, flat.narrow(0, begin, length)))
            else:
                real = [part for part in zero.averaged_gradients[group] if not getattr(part, "_zero_padding", False)]
                shards += zip(parameters, real, strict=False)  # trailing padding is not always marked
        return shards

    def updated_slices(self) -> list[ParameterSlice]:
        return list(slices_of_partitions(self.module, self._zero.single_partition_of_fp32_groups))

    @torch.no_grad()
    def refresh(self) -> None:
        self._zero.update_lp_params()
