"""Modes in which every rank has whole gradients until the step: fp32 and bf16 without ZeRO, bf16 with ZeRO 1."""

from __future__ import annotations

import math

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.model.stored_names import stored_parameters
from mor_megatron.training.gradients import Gradients, clip, global_norm
from mor_megatron.training.modes.base import Engine, StepOutcome
from mor_megatron.training.modes.slices import ParameterSlice, slices_of_partitions
from mor_megatron.training.sections import Sections


class WholeGradients(Engine):
    """Reduces, takes the norm and clips before DeepSpeed's step."""

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        deepspeed.enable_backward_allreduce = False  # reduced here, to see the norm before it is clipped

    def _step(self, clip_grad: float, sections: Sections) -> StepOutcome:
        if parallel_state.get_data_parallel_world_size() > 1:  # alone, DeepSpeed would copy every gradient twice
            with sections("all-grads-sync"):
                self.deepspeed.buffered_allreduce_fallback()
        norm = self.norm_and_clip(clip_grad)
        if not math.isfinite(norm):
            self.discard()
            return StepOutcome(grad_norm=math.inf, applied=False)
        self.deepspeed.step()
        return StepOutcome(grad_norm=norm, applied=self.deepspeed.was_step_applied())

    def norm_and_clip(self, limit: float) -> float:
        """Clip the reduced gradients to the global norm `limit`; the norm before."""
        gradients = self.gradients()
        norm = global_norm(gradients)
        if math.isfinite(norm):
            clip(gradients, norm, limit)
        return norm


class Fp32(WholeGradients):
    """ZeRO 0: DeepSpeed steps torch's own optimizer, which updates the weights themselves."""

    wraps = torch.optim.Optimizer
    partitions_state = False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer

    def parameter_slices(self) -> list[ParameterSlice]:
        named = stored_parameters(self.module)
        return [ParameterSlice(name, weight, 0, weight.numel(), weight, 0) for name, weight in named]

    def refresh(self) -> None:
        """Nothing to do."""


class Bf16(WholeGradients):
    """ZeRO 0: an fp32 copy of every weight."""

    wraps = FP16_UnfusedOptimizer
    partitions_state = False

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        # It made the optimizer's state by a step on zero gradients: without effect at rate 0, but Adam counted it.
        self.optimizer.state.clear()
        deepspeed.optimizer.mpu = None  # its own norm, which nothing reads, would take collectives a parameter group

    def parameter_slices(self) -> list[ParameterSlice]:
        copies = {id(weight): copy for weight, copy in self._copies()}
        named = stored_parameters(self.module)
        return [ParameterSlice(name, weight, 0, weight.numel(), copies[id(weight)], 0) for name, weight in named]

    @torch.no_grad()
    def refresh(self) -> None:
        for weight, copy in self._copies():
            weight.copy_(copy)

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.deepspeed.optimizer.fp16_groups, self.deepspeed.optimizer.fp32_groups, strict=True)
        return [pair for group in groups for pair in zip(*group, strict=True)]


class Bf16Zero1(WholeGradients):
    """ZeRO 1: gradients gather in flat fp32 buffers, and each rank updates its partition of flat fp32 weights."""

    wraps = BF16_Optimizer
    partitions_state = True

    def gradients(self) -> Gradients:
        optimizer = self.deepspeed.optimizer
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        return [pair for group in groups for pair in zip(*group, strict=True)]

    def flat_gradients(self) -> list[Tensor]:
        return self.deepspeed.optimizer.get_grads_for_reduction()[0]

    def parameter_slices(self) -> list[ParameterSlice]:
        return list(slices_of_partitions(self.module, self.deepspeed.optimizer.fp32_groups_flat_partition))

    @torch.no_grad()
    def refresh(self) -> None:
        self.deepspeed.optimizer.update_lp_params()
