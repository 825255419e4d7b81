"""The state of a DeepSpeed engine in every one of its modes, seen as runs of elements of named parameters.

Saving reads these runs and loading writes them, in place. What a mode keeps where is in the table of
`training/engine.py`; that DeepSpeed lays state out in flat partitions is known in this file only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.checkpointing.pieces import STEP, WEIGHT, is_copy
from mor_megatron.distributed.cpu import device
from mor_megatron.training.gradients import Engine, sum_of_squares


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a parameter that this rank updates."""

    name: str
    parameter: nn.Parameter
    offset: int
    """First element, in this rank's tensor-parallel share, flattened."""
    length: int
    updated: Tensor
    """What the optimizer updates: fp32, the parameter itself or a partition with other parameters."""
    begin: int
    """Where the run begins in it, flattened."""

    def within(self, tensor: Tensor) -> Tensor:
        """The run in a tensor that is laid out like `updated`, a view [length]."""
        return tensor.detach().view(-1).narrow(0, self.begin, self.length)

    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Kind -> the run's weights and optimizer states, views; `step` as [1]. Empty states were never updated."""
        found = {WEIGHT: self.within(self.updated)}
        for kind, value in optimizer.state.get(self.updated, {}).items():
            if kind == STEP:
                found[kind] = torch.as_tensor(value, dtype=torch.float32).reshape(1)
            elif torch.is_tensor(value) and value.numel() == self.updated.numel():
                found[kind] = self.within(value)
        return found


def torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed's wraps, which has the moments."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def updated_runs(engine: Engine) -> list[Run]:
    """All runs that this rank updates; together with the other data-parallel ranks, every element at least once."""
    optimizer = engine.optimizer
    named = list(engine.module.named_parameters())
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_stage3_runs(optimizer, {id(parameter): name for name, parameter in named}))
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        return list(_partition_runs(optimizer, named))
    masters = {id(parameter): parameter for _, parameter in named}
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameters, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
    return [Run(name, parameter, 0, parameter.numel(), masters[id(parameter)], 0) for name, parameter in named]


def saved_runs(engine: Engine) -> Iterator[Run]:
    """The runs that this rank writes: over all ranks, every element exactly once."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    sharded = isinstance(engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer)
    for run in updated_runs(engine):
        if is_copy(run.parameter) or not (first or getattr(run.parameter, "tensor_model_parallel", False)):
            continue
        if sharded:
            yield run
            continue
        begin, end = run.length * rank // size, run.length * (rank + 1) // size  # replicas divide the writing
        if begin < end:
            yield Run(run.name, run.parameter, begin, end - begin, run.updated, begin)


def weights_norm(engine: Engine) -> float:
    """L2 norm of the whole model's weights in fp32, each counted once; collective over all ranks."""
    total = sum_of_squares([run.within(run.updated) for run in saved_runs(engine)]).to(device())
    dist.all_reduce(total)
    return math.sqrt(float(total))


def prepare_state(engine: Engine, runs: list[Run], kinds: dict[str, set[str]]) -> None:
    """Give the optimizer empty states of the kinds that a checkpoint has for its parameters, and no others.

    Args:
        runs: from `updated_runs`.
        kinds: name of a parameter -> kinds of its states, none if it is not there; `step` begins at 0.
    """
    optimizer = torch_optimizer(engine)
    counts_on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for run in runs:
        optimizer.state.pop(run.updated, None)
    for run in runs:
        for kind in kinds.get(run.name, set()) - {WEIGHT}:
            state = optimizer.state[run.updated]
            if kind == STEP:
                place = run.updated.device if counts_on_device else torch.device("cpu")  # as torch would
                state.setdefault(kind, torch.zeros((), dtype=torch.float32, device=place))
            elif kind not in state:
                state[kind] = torch.zeros_like(run.updated, requires_grad=False)


@torch.no_grad()
def refresh_weights(engine: Engine) -> None:
    """Make the model's weights those that the optimizer updates; collective over data-parallel ranks."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameters, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(engine: Engine) -> dict[str, float] | None:
    """What fp16's loss scale depends on; None without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or not isinstance(scaler, DynamicLossScaler):
        return None
    return {name: getattr(scaler, name) for name in _SCALER}


def set_loss_scaler_state(engine: Engine, state: dict[str, float] | None) -> None:
    """Restore it; a run that has just turned to fp16, or away from it, has nothing to restore."""
    if state is None or loss_scaler_state(engine) is None:
        return
    for name in _SCALER:
        setattr(engine.optimizer.loss_scaler, name, state[name])


def _partition_runs(
    optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer, named: list[tuple[str, nn.Parameter]]
) -> Iterator[Run]:
    if isinstance(optimizer, BF16_Optimizer):
        partitions = optimizer.fp32_groups_flat_partition
    else:
        partitions = optimizer.single_partition_of_fp32_groups
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is None:  # wholly in other ranks' partitions
            continue
        share, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
        updated = partitions[mapping.param_group_index]
        yield Run(name, parameter, share.start, share.numel, updated, partition.start)


def _stage3_runs(optimizer: DeepSpeedZeroOptimizer_Stage3, names: dict[int, str]) -> Iterator[Run]:
    rank = parallel_state.get_data_parallel_rank()
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            group, begin, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = rank * length
            real = min(length, parameter.ds_numel - offset)  # partitions are of one size, the last ones padded
            if real > 0:
                updated = optimizer.fp32_partitioned_groups_flat[group]
                yield Run(names[id(parameter)], parameter, offset, real, updated, begin)
