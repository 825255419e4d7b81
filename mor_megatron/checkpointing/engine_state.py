"""An engine's state in the terms of a checkpoint: kinds of state, as views of the engine's own tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mor_megatron.checkpointing.pieces import STEP, WEIGHT
from mor_megatron.training.engine import Engine
from mor_megatron.training.modes.slices import ParameterSlice


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
        for kind in kinds.get(part.name, set()) - {WEIGHT}:
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
