"""The DeepSpeed engine: its configuration, and the three things a step does with it.

DeepSpeed does ZeRO, fp32 master weights and the reduction over data-parallel ranks. What is added here makes every mode
keep the same promises: fp32 gradient sums, reduced as fp32; the global norm before clipping, summed in fp64, because
fp32 norms of the same gradient differ by 1e-6 between modes; no update from anything that is not finite.

| run  | ZeRO | DeepSpeed's optimizer  | gradients accumulate in             | norm and clipping |
|------|------|------------------------|-------------------------------------|-------------------|
| fp32 | 0    | none: torch's own      | `.grad`                             | here              |
| fp32 | 1    | DeepSpeedZeroOptimizer | `.grad`                             | DeepSpeed, sharded |
| bf16 | 0    | FP16_UnfusedOptimizer  | `.grad`, fp32 by `Tensor.grad_dtype` | here              |
| bf16 | 1    | BF16_Optimizer         | its flat fp32 buffers, by hooks     | here              |
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.parallel.mpu import ModelParallelUnit
from mor_megatron.training.optimizer import build_optimizer, set_learning_rate

Engine = deepspeed.DeepSpeedEngine

_RUN = 1024


def build_engine(model: nn.Module, config: Config) -> Engine:
    """Wrap the model and its optimizer.

    The caller owns gradient accumulation (`managed_gradient_accumulation` false): any number of backward passes, then
    `apply_step`. Weights are broadcast from data-parallel rank 0.

    Raises:
        ValueError: a ZeRO stage that the model's parameters cannot be trained under.
    """
    training = config.training
    if training.zero_stage > 1:
        raise ValueError(f"zero-stage={training.zero_stage} is not supported: use 0 or 1")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # A shared-memory all-reduce that DeepSpeed would compile at start, for minutes; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            config=deepspeed_config(config),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # It made the optimizer's state by a step on zero gradients: without effect at rate 0, but Adam counted it.
        engine.basic_optimizer.state.clear()
    if not _sharded_gradients(engine):
        engine.enable_backward_allreduce = False  # apply_step reduces, to see the norm before it is clipped
    if training.bf16:
        # Every contribution is cast before it is added, over recursions as well as over micro-batches: a bf16 sum of
        # Nr x micro-batches terms loses the small ones.
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
    return engine


def deepspeed_config(config: Config) -> dict:
    """The DeepSpeed configuration of a run; its batch sizes only satisfy DeepSpeed, accumulation is ours."""
    training = config.training
    settings = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if training.bf16 or training.zero_stage == 0 else config.optimizer.clip_grad,
        "zero_optimization": {"stage": training.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed would send the fp32 sums of a bf16 run as bf16.
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    if training.bf16:
        settings["bf16"] = {"enabled": True, "immediate_grad_update": training.zero_stage > 0}
        if training.zero_stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}  # selects BF16_Optimizer
    return settings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's bare `print` reports of memory and internals out of the log; errors pass."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def accumulated_gradients(engine: Engine) -> list[Tensor]:
    """This rank's gradients of the iteration so far, before any reduction, fp32."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        return engine.optimizer.get_grads_for_reduction()[0]
    return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]


def gradients_are_finite(engine: Engine) -> bool:
    """Whether every accumulated gradient of this rank is finite."""
    # A sum runs at memory speed, and is finite if its terms are (or so close to overflow that it matters as little).
    return all(torch.stack([gradient.sum() for gradient in accumulated_gradients(engine)]).isfinite().tolist())


def discard_gradients(engine: Engine) -> None:
    """Forget the accumulated gradients; weights and optimizer state stay as they are."""
    engine.optimizer.zero_grad()


def apply_step(engine: Engine, lr: float, clip_grad: float) -> tuple[float, bool]:
    """Reduce, clip and update; collective over data-parallel ranks.

    Args:
        lr: learning rate of this step.
        clip_grad: largest global norm, 0 for no clipping.
    Returns:
        The global L2 norm before clipping (inf if it is not finite), and whether weights were updated: a non-finite
        norm, for instance of a sum that overflows, updates nothing on any rank.
    """
    set_learning_rate(engine.optimizer.param_groups, lr)
    if _sharded_gradients(engine):
        engine.step()
        return float(engine.get_global_grad_norm()), engine.was_step_applied()
    if parallel_state.get_data_parallel_world_size() > 1:  # alone, DeepSpeed would copy every gradient twice
        engine.buffered_allreduce_fallback()
    gradients = accumulated_gradients(engine)
    norm = global_norm(gradients)
    if not math.isfinite(norm):
        discard_gradients(engine)
        return math.inf, False
    if 0.0 < clip_grad < norm:
        torch._foreach_mul_(gradients, clip_grad / norm)
    engine.step()
    return norm, engine.was_step_applied()


def global_norm(tensors: list[Tensor]) -> float:
    """L2 norm of all fp32 tensors as one vector, to 1e-9: fp32 over runs of 1024 elements, fp64 over the runs.

    An fp64 norm of every element would take five times as long on a CPU.
    """
    squares = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // _RUN * _RUN
        for rows in (flat[:whole].view(-1, _RUN), flat[whole:].view(1, -1)):
            squares.append(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    return float(torch.stack(squares).sum().sqrt())


def _sharded_gradients(engine: Engine) -> bool:
    """Whether only DeepSpeed ever sees a whole reduced gradient, so that it has to compute the norm and clip."""
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer)
