"""What the step and the checkpoints need of DeepSpeed's engine, the same in every mode."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.replicated import is_counted_here
from mor_megatron.model.stored_names import stored_parameters
from mor_megatron.training.cuda_graph import MicroBatchGraph
from mor_megatron.training.gradients import Gradients, sum_of_squares
from mor_megatron.training.modes.slices import ParameterSlice
from mor_megatron.training.optimizer import set_learning_rate
from mor_megatron.training.sections import UNTIMED, Sections

_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepOutcome:
    """What `Engine.step` did, equal on every rank."""

    grad_norm: float
    """Global L2 norm before clipping, without loss scale; inf if it was not finite."""
    applied: bool
    """Whether weights were updated."""
    overflow: bool = False
    """fp16: the step was skipped and the loss scale will fall, so that this is no fault."""


class Engine(ABC):
    """A model and its optimizer in DeepSpeed's engine, in one of its modes.

    Args:
        deepspeed: DeepSpeed's engine, just initialized.
    """

    wraps: ClassVar[type]
    """The class of DeepSpeed's optimizer in this mode."""
    partitions_state: ClassVar[bool]
    """Whether data-parallel ranks divide the optimizer's state among themselves; else each has all of it."""
    partitions_weights: ClassVar[bool] = False
    """Whether they divide the weights."""
    graph: MicroBatchGraph | None = None
    """What runs this engine's micro-batches with `--enable-cuda-graph`; `train_step` makes it."""

    def __init__(self, deepspeed: DeepSpeedEngine):
        assert isinstance(deepspeed.optimizer, self.wraps), type(deepspeed.optimizer)
        self.deepspeed = deepspeed
        self.module: nn.Module = deepspeed.module
        if deepspeed.bfloat16_enabled() or deepspeed.fp16_enabled():
            # Cast every contribution before it is added, over recursions as well as over micro-batches: a sum of
            # Nr x micro-batches terms in 16 bits loses the small ones.
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    parameter.grad_dtype = torch.float32

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that DeepSpeed's wraps, which has the moments."""
        return self.deepspeed.optimizer.optimizer

    @property
    def loss_scale(self) -> float:
        """The factor on every loss of the next backward pass: 1 but for fp16."""
        return 1.0

    def forward(self, *inputs: Any) -> Any:
        """The model's forward pass through DeepSpeed's hooks."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's own backward pass; it multiplies by the loss scale."""
        self.deepspeed.backward(loss)

    def gradients(self) -> Gradients:
        """This rank's gradients of the iteration so far, each whole; only where Megatron-core's schedule drives."""
        return [(parameter, parameter.grad) for parameter in self.module.parameters() if parameter.grad is not None]

    def flat_gradients(self) -> list[Tensor]:
        """`gradients` in as few tensors as there are; they may end in padding of zeros."""
        return [gradient for _, gradient in self.gradients()]

    def gradients_are_finite(self) -> Tensor:
        """Whether every accumulated gradient of this rank is finite, 0-d bool; only where the schedule drives."""
        # A sum runs at memory speed, and is finite if its terms are, or so close to overflow that it hardly matters.
        sums = [gradient.sum() for gradient in self.flat_gradients()] or [torch.zeros((), device=device())]
        return torch.stack(sums).isfinite().all()

    def discard(self) -> None:
        """Forget the accumulated gradients; weights, optimizer state and loss scale stay as they are."""
        self.deepspeed.optimizer.zero_grad()

    def step(self, lr: float, clip_grad: float, sections: Sections = UNTIMED) -> StepOutcome:
        """Reduce, clip and update; collective over all ranks. A norm that is not finite updates nothing on any rank.

        Args:
            lr: learning rate of this step.
            clip_grad: largest global norm, 0 for no clipping.
            sections: where the time of reduction and update is added up.
        """
        with sections("optimizer"):
            set_learning_rate(self.optimizer.param_groups, lr)
            return self._step(clip_grad, sections)

    @abstractmethod
    def _step(self, clip_grad: float, sections: Sections) -> StepOutcome: ...

    def time_reduction(self, sections: Sections) -> None:
        """From now on, add the time of a reduction inside DeepSpeed's step to `all-grads-sync`."""
        reduce = self.deepspeed.allreduce_gradients

        def timed(*args: Any, **kwargs: Any) -> Any:
            with sections("all-grads-sync"):
                return reduce(*args, **kwargs)

        self.deepspeed.allreduce_gradients = timed

    def parameter_slices(self) -> list[ParameterSlice]:
        """All that this rank updates, and what it holds of frozen weights; together with the other data-parallel ranks,
        every element at least once."""
        return [*self.updated_slices(), *self.frozen_slices()]

    @abstractmethod
    def updated_slices(self) -> list[ParameterSlice]:
        """The trained ones of `parameter_slices`."""

    def frozen_slices(self) -> list[ParameterSlice]:
        """The others. What would be updated is the weight itself."""
        frozen = [(name, weight) for name, weight in stored_parameters(self.module) if not weight.requires_grad]
        return [ParameterSlice(name, weight, 0, weight.numel(), weight, 0) for name, weight in frozen]

    def distinct_slices(self) -> Iterator[ParameterSlice]:
        """What this rank has to save: over all ranks, every element of the model exactly once."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for each in self.parameter_slices():
            if not is_counted_here(each.parameter):
                continue
            if self.partitions_state if each.parameter.requires_grad else self.partitions_weights:
                yield each
                continue
            begin, end = each.length * rank // size, each.length * (rank + 1) // size  # replicas divide the work
            if begin < end:
                yield replace(each, offset=begin, length=end - begin, begin=begin)

    def shard_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of a parameter's tensor-parallel shard."""
        return tuple(parameter.shape)

    @abstractmethod
    def refresh(self) -> None:
        """Make the model's weights those that the optimizer updates; collective over data-parallel ranks."""

    def loss_scaler_state(self) -> dict[str, float] | None:
        """What fp16's loss scale depends on; None without one."""
        scaler = self._loss_scaler
        return None if scaler is None else {name: getattr(scaler, name) for name in _LOSS_SCALER}

    def set_loss_scaler_state(self, state: dict[str, float] | None) -> None:
        """Restore it; a run that has just turned to fp16, or away from it, has nothing to restore."""
        scaler = self._loss_scaler
        if state is not None and scaler is not None:
            for name in _LOSS_SCALER:
                setattr(scaler, name, state[name])

    @property
    def _loss_scaler(self) -> DynamicLossScaler | None:
        return None

    def weights_norm(self) -> float:
        """L2 norm of the whole model's weights in fp32, each counted once; collective over all ranks."""
        total = sum_of_squares([each.within(each.updated) for each in self.distinct_slices()]).to(device())
        dist.all_reduce(total)
        return math.sqrt(float(total))
