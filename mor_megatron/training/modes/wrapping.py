"""Starting DeepSpeed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from mor_megatron.config.deepspeed_settings import deepspeed_settings
from mor_megatron.config.schema import Config
from mor_megatron.distributed.cpu import device
from mor_megatron.training.modes.mpu import ModelParallelUnit


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around a model and its optimizer, as `config` has it.

    The caller owns gradient accumulation (`managed_gradient_accumulation` false). Weights are broadcast from
    data-parallel rank 0.

    Raises:
        ValueError: DeepSpeed settings that contradict the flags, or fp16 on a machine that has no such arithmetic.
    """
    if config.training.fp16 and not get_accelerator().is_fp16_supported():
        raise ValueError(f"fp16=True, but {device().type} has no fp16 arithmetic here (CPUs: AVX512-FP16): use --bf16")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # skipped steps are reported by the loop
    if not torch.cuda.is_available():
        # A shared-memory all-reduce that DeepSpeed would compile at start, for minutes; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet(), _names_of_all(model, optimizer):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_settings(config, torch.cuda.is_available()),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
    return engine


@contextlib.contextmanager
def _names_of_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let DeepSpeed find in the model what it steps: the one weight of an optimizer that has none of the model's."""
    own = set(model.parameters())
    (first, *_) = (weight for group in optimizer.param_groups for weight in group["params"])
    if first in own:
        yield
        return
    model.register_parameter("nothing", first)
    yield
    del model.nothing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's bare `print` reports of memory and internals out of the log; errors pass."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
