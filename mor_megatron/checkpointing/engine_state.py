"""An engine's state in the terms of a checkpoint: kinds of state, as views of the engine's own tensors."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.checkpointing.shards import BUFFER, STEP, WEIGHT, ShardEntry, Sharding
from mor_megatron.distributed.collectives import from_all_ranks
from mor_megatron.distributed.replicated import is_tied_copy
from mor_megatron.model.stored_names import EMBEDDING, HEAD, stored_parameters
from mor_megatron.training.engine import Engine
from mor_megatron.training.modes.slices import ParameterSlice


def local_entries(engine: Engine) -> list[tuple[str, Tensor]]:
    """What this rank writes: names of shard entries and fp32 views [n] of the engine's own state.

    Frozen weights of a 16-bit run are copied instead."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    entries: list[tuple[str, Tensor]] = []
    for part in engine.distinct_slices():
        shard = rank if getattr(part.parameter, "tensor_model_parallel", False) else 0
        for kind, value in slice_states(engine.optimizer, part).items():
            if kind != STEP:
                entries.append((str(ShardEntry(kind, part.name, shard, part.offset)), value.float()))
            elif shard == 0 and part.offset == 0:
                entries.append((str(ShardEntry(kind, part.name, 0, 0)), value))
    if parallel_state.get_data_parallel_rank() == 0 and rank == 0:
        for name, buffer in persistent_buffers(engine):
            entries.append((str(ShardEntry(BUFFER, name, 0, 0)), buffer.detach().float().reshape(-1)))
    return entries


def all_shardings(engine: Engine) -> dict[str, Sharding]:
    """How the whole model's parameters and buffers are divided, tied copies left out; collective over all ranks."""
    named = stored_parameters(engine.module)
    mine = {name: sharding_of(name, parameter, engine) for name, parameter in named if not is_tied_copy(parameter)}
    mine |= {name: Sharding(tuple(buffer.shape)) for name, buffer in persistent_buffers(engine)}
    return {name: sharding for part in from_all_ranks(mine) for name, sharding in part.items()}


def sharding_of(name: str, parameter: nn.Parameter, engine: Engine) -> Sharding:
    """How this run divides a parameter of this rank's part of the model."""
    shape = list(engine.shard_shape(parameter))
    rows = engine.module.vocab_size if name in (EMBEDDING, HEAD) else None
    if not getattr(parameter, "tensor_model_parallel", False):
        return Sharding(tuple(shape), rows=rows)
    size = parallel_state.get_tensor_model_parallel_world_size()
    shape[parameter.partition_dim] *= size
    return Sharding(tuple(shape), parameter.partition_dim, parameter.partition_stride, size, rows)


def slice_states(optimizer: torch.optim.Optimizer, part: ParameterSlice) -> dict[str, Tensor]:
    """Kind -> a slice's weights and optimizer states, views; `step` as [1]. A parameter never updated has no states."""
    found = {WEIGHT: part.within(part.updated)}
    for kind, value in optimizer.state.get(part.updated, {}).items():
        if kind == STEP:
            found[kind] = torch.as_tensor(value, dtype=torch.float32).reshape(1)
        elif torch.is_tensor(value) and value.numel() == part.updated.numel():
            found[kind] = part.within(value)
    return found


def prepare_states(optimizer: torch.optim.Optimizer, slices: list[ParameterSlice], kinds: dict[str, set[str]]) -> None:
    """Give the optimizer empty states of the kinds that a checkpoint has for its parameters, and no others.

    Args:
        slices: all that this rank updates.
        kinds: name of a parameter -> kinds of its states, none if it is not there; `step` begins at 0.
    """
    counts_on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for part in slices:
        optimizer.state.pop(part.updated, None)
    for part in slices:
        for kind in sorted(kinds.get(part.name, set()) - {WEIGHT}):
            state = optimizer.state[part.updated]
            if kind == STEP:
                place = part.updated.device if counts_on_device else torch.device("cpu")  # as torch would
                state.setdefault(kind, torch.zeros((), dtype=torch.float32, device=place))
            elif kind not in state:
                state[kind] = torch.zeros_like(part.updated, requires_grad=False)


def persistent_buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    """Buffers that are state: the balancing bias of token-choice."""
    kept = engine.module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in kept]
