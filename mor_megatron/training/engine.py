"""The DeepSpeed engine: how it is built, which branch of the step drives it, and what its step does.

DeepSpeed does ZeRO, fp32 master weights and the reduction over data-parallel ranks. What is added here and in
`gradients.py` makes every mode keep the same promises: fp32 gradient sums, over recursions as over micro-batches,
reduced as fp32; the global norm of the whole model, summed in fp64, before clipping; no update from anything that is
not finite.

| run        | ZeRO | driver   | DeepSpeed's optimizer        | gradients accumulate in              | reduced       |
|------------|------|----------|------------------------------|--------------------------------------|---------------|
| fp32       | 0    | schedule | none: torch's own            | `.grad`                              | before step   |
| fp32       | 1    | schedule | DeepSpeedZeroOptimizer       | `.grad`                              | in step       |
| bf16       | 0    | schedule | FP16_UnfusedOptimizer        | `.grad`, fp32 by `Tensor.grad_dtype` | before step   |
| bf16       | 1    | schedule | BF16_Optimizer               | its flat fp32 buffers, by hooks      | before step   |
| fp16       | 1    | engine   | DeepSpeedZeroOptimizer       | `.grad_accum`, fp32                  | in step       |
| any        | 2    | engine   | DeepSpeedZeroOptimizer       | this rank's share, fp32              | each backward |
| any        | 3    | engine   | DeepSpeedZeroOptimizer_Stage3 | this rank's share, fp32             | each backward |
| offloaded  | 1-3  | engine   | as above, fp32 state in CPU memory | as above                       | as above      |

Where the schedule drives, each rank looks at its loss and its whole gradient before anything is reduced, so that the
rank that broke is known. Where the engine drives, gradients are mixed with other ranks' as they arise: each rank looks
at its loss before the step, which names the rank, and the step looks at the global norm, which does not.

ZeRO 3 gathers a module's weights before it runs. Weights that another module reads (the embedding as head, the query
part of a fused projection, a router's list) are gathered where they are read: DeepSpeed notices.

fp16: the loss and the router losses are multiplied by the loss scale. A norm that is not finite is an overflow: no
rank updates, and the scale falls.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.config.deepspeed_settings import deepspeed_settings
from mor_megatron.config.schema import Config
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.mpu import ModelParallelUnit
from mor_megatron.training.gradients import (
    Engine,
    ShardedClipping,
    clip,
    discard_gradients,
    global_norm,
    is_sharded,
    whole_gradients,
)
from mor_megatron.training.optimizer import build_optimizer, set_learning_rate
from mor_megatron.training.sections import UNTIMED, Sections

Driver = Literal["schedule", "engine"]


@dataclass(frozen=True)
class StepOutcome:
    """What `apply_step` did, equal on every rank."""

    grad_norm: float
    """Global L2 norm before clipping, without loss scale; inf if it was not finite."""
    applied: bool
    """Whether weights were updated."""
    overflow: bool = False
    """fp16: the step was skipped and the loss scale will give way, so that this is no fault."""


def choose_driver(config: Config) -> Driver:
    """Who runs forward and backward: DeepSpeed where its hooks are needed, else Megatron-core's schedule."""
    training = config.training
    needs_hooks = training.zero_stage >= 2 or training.fp16 or training.optimizer_cpu_offload
    return "engine" if needs_hooks else "schedule"


def build_engine(model: nn.Module, config: Config) -> Engine:
    """Wrap the model and its optimizer.

    The caller owns gradient accumulation (`managed_gradient_accumulation` false): any number of backward passes, then
    `apply_step`. Weights are broadcast from data-parallel rank 0.

    Raises:
        ValueError: DeepSpeed settings that contradict the flags, or something that this machine does not have.
    """
    training = config.training
    if training.fp16 and not get_accelerator().is_fp16_supported():
        raise ValueError(f"fp16=True, but {device().type} has no fp16 arithmetic here (CPUs: AVX512-FP16): use --bf16")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # skipped steps are reported by the loop
    if not torch.cuda.is_available():
        # A shared-memory all-reduce that DeepSpeed would compile at start, for minutes; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            config=deepspeed_settings(config, torch.cuda.is_available()),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        # It made the optimizer's state by a step on zero gradients: without effect at rate 0, but Adam counted it.
        engine.basic_optimizer.state.clear()
        optimizer.mpu = None  # its own norm, which nothing reads, would take collectives a parameter group
    if is_sharded(optimizer):
        optimizer.clipping = ShardedClipping(optimizer)
    else:
        engine.enable_backward_allreduce = False  # apply_step reduces, to see the norm before it is clipped
    if training.bf16 or training.fp16:
        _sum_in_fp32(engine)
    if training.fp16:
        optimizer.loss_scaler.raise_error_at_min_scale = False  # the loop counts and reports skipped steps
    if choose_driver(config) == "engine" and config.parallel.sequence_parallel:
        _reduce_over_sequence_shares(model)
    return engine


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's bare `print` reports of memory and internals out of the log; errors pass."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def loss_scale(engine: Engine) -> float:
    """The factor on every loss of the next backward pass: 1 but for fp16."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def apply_step(engine: Engine, lr: float, clip_grad: float, sections: Sections = UNTIMED) -> StepOutcome:
    """Reduce, clip and update; collective over all ranks. A norm that is not finite updates nothing on any rank.

    Args:
        lr: learning rate of this step.
        clip_grad: largest global norm, 0 for no clipping.
        sections: where the time of reduction and update is added up.
    """
    with sections("optimizer"):
        return _apply_step(engine, lr, clip_grad, sections)


def _apply_step(engine: Engine, lr: float, clip_grad: float, sections: Sections) -> StepOutcome:
    set_learning_rate(engine.optimizer.param_groups, lr)
    if is_sharded(engine.optimizer):
        scale = loss_scale(engine)
        engine.optimizer.clipping.limit = clip_grad
        engine.step()
        applied = engine.was_step_applied()
        norm = float(engine.get_global_grad_norm()) if applied else math.inf
        if not applied:
            discard_gradients(engine)  # DeepSpeed forgets them everywhere but in the shares of an offloaded optimizer
        can_give_way = engine.fp16_enabled() and scale > engine.optimizer.loss_scaler.min_scale
        return StepOutcome(norm, applied, overflow=not applied and can_give_way)
    if parallel_state.get_data_parallel_world_size() > 1:  # alone, DeepSpeed would copy every gradient twice
        with sections("all-grads-sync"):
            engine.buffered_allreduce_fallback()
    gradients = whole_gradients(engine)
    norm = global_norm(gradients)
    if not math.isfinite(norm):
        discard_gradients(engine)
        return StepOutcome(math.inf, False)
    clip(gradients, norm, clip_grad)
    engine.step()
    return StepOutcome(norm, engine.was_step_applied())


def _sum_in_fp32(engine: Engine) -> None:
    """Cast every contribution before it is added, over recursions as well as over micro-batches.

    A sum of Nr x micro-batches terms in 16 bits loses the small ones.
    """
    for parameter in engine.module.parameters():
        parameter.grad_dtype = torch.float32
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        # ZeRO 2 would round to the parameters' type what a backward pass leaves before it is reduced.
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


def _reduce_over_sequence_shares(model: nn.Module) -> None:
    """Sum gradients of weights that each tensor-parallel rank applied to its share of the sequence.

    A hook, because DeepSpeed reduces over data-parallel ranks as soon as a gradient is accumulated.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def reduce(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(reduce)
