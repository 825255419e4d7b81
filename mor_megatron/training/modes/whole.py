"""Modes in which every rank has whole gradients until the step: fp32 and bf16 without ZeRO, bf16 with ZeRO 1."""

from __future__ import annotations

import math

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.config.deepspeed_settings import GRADIENT_BUCKET
from mor_megatron.distributed.cpu import device
from mor_megatron.training.gradients import Gradients, clip, global_norm
from mor_megatron.training.modes.base import Engine, StepOutcome
from mor_megatron.training.modes.slices import ParameterSlice, slices_of_partitions, trained_parameters
from mor_megatron.training.modes.uses import accumulate_each_use
from mor_megatron.training.sections import Sections


class WholeGradients(Engine):
    """Reduces, takes the norm and clips before DeepSpeed's step."""

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        deepspeed.enable_backward_allreduce = False  # reduced here, to see the norm before it is clipped

    def _step(self, clip_grad: float, sections: Sections) -> StepOutcome:
        if parallel_state.get_data_parallel_world_size() > 1:  # alone, DeepSpeed would copy every gradient twice
            with sections("all-grads-sync"):
                self.reduce()
        norm = self.norm_and_clip(clip_grad)
        if not math.isfinite(norm):
            self.discard()
            return StepOutcome(grad_norm=math.inf, applied=False)
        self.deepspeed.step()
        return StepOutcome(grad_norm=norm, applied=self.deepspeed.was_step_applied())

    def reduce(self) -> None:
        """Average the gradients over data-parallel ranks."""
        self.deepspeed.buffered_allreduce_fallback(elements_per_buffer=GRADIENT_BUCKET)

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

    def updated_slices(self) -> list[ParameterSlice]:
        named = trained_parameters(self.module)
        return [ParameterSlice(name, weight, 0, weight.numel(), weight, 0) for name, weight in named]

    def refresh(self) -> None:
        """Nothing to do."""


class Bf16(WholeGradients):
    """ZeRO 0: an fp32 copy of every weight."""

    wraps = FP16_UnfusedOptimizer
    partitions_state = False

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        accumulate_each_use(self.module)
        # It made the optimizer's state by a step on zero gradients: without effect at rate 0, but Adam counted it.
        self.optimizer.state.clear()
        deepspeed.optimizer.mpu = None  # its own norm, which nothing reads, would take collectives a parameter group

    def updated_slices(self) -> list[ParameterSlice]:
        copies = {id(weight): copy for weight, copy in self._copies()}
        named = trained_parameters(self.module)
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

    def __init__(self, deepspeed: DeepSpeedEngine):
        super().__init__(deepspeed)
        optimizer = deepspeed.optimizer
        # `.grad` is a view of the flat buffers for good; DeepSpeed would add it to them and forget it.
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer.clear_lp_grads = lambda set_to_none=False: None
        for parameter, gradient in self.gradients():
            parameter.grad = gradient.view_as(parameter)
        accumulate_each_use(self.module)
        # Its own norm, which nothing reads, would take a pass over all gradients, and a collective.
        no_gradients = [torch.zeros((), device=device())]
        optimizer.get_grads_for_norm = lambda: (no_gradients, {})
        optimizer.mpu = None

    def gradients(self) -> Gradients:
        optimizer = self.deepspeed.optimizer
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        return [pair for group in groups for pair in zip(*group, strict=True)]

    def flat_gradients(self) -> list[Tensor]:
        return self.deepspeed.optimizer.get_grads_for_reduction()[0]

    def reduce(self) -> None:
        for flat in self.flat_gradients():  # a bucket of one tensor is reduced in place
            self.deepspeed.allreduce_bucket([flat], parallel_state.get_data_parallel_group())

    def updated_slices(self) -> list[ParameterSlice]:
        return list(slices_of_partitions(self.module, self.deepspeed.optimizer.fp32_groups_flat_partition))

    @torch.no_grad()
    def refresh(self) -> None:
        self.deepspeed.optimizer.update_lp_params()
