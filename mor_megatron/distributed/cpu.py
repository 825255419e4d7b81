"""Megatron-core on machines without CUDA.

Megatron-core writes `device="cuda"` and `torch.cuda.current_device()` into its schedules, its messages between stages
and its tensor-parallel exchanges. Where there is no CUDA, the modules listed here get a stand-in for their global
`torch` that sends those two to the CPU; everything else, and every module of ours, keeps the real one. With CUDA
nothing is touched.
"""

from __future__ import annotations

import importlib
import types

import torch

# Only modules that create tensors on a literal "cuda", and are used here.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",  # token count
    "megatron.core.pipeline_parallel.p2p_communication",  # what a stage receives
    "megatron.core.tensor_parallel.mappings",  # what a gather or scatter over the sequence receives
    "megatron.core.tensor_parallel.layers",  # the same inside a linear layer's forward and backward
    "megatron.core.timers",  # what they gather, and the device they wait for
    "megatron.core.utils",  # GlobalMemoryBuffer, in which a linear layer gathers its input
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full")


def _on(device: torch.device, factory):
    def create(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = device
        return factory(*args, **kwargs)

    return create


class _Delegate(types.ModuleType):
    """A module that answers with its own attributes first and the original's otherwise."""

    def __init__(self, original: types.ModuleType, **overrides):
        super().__init__(original.__name__)
        self.__dict__.update(overrides)
        self.__dict__["_original"] = original

    def __getattr__(self, name):
        return getattr(self._original, name)


def support_cpu() -> None:
    """Let Megatron-core's schedules and exchanges run on the CPU. Idempotent; does nothing when CUDA is available."""
    modules = map(importlib.import_module, () if torch.cuda.is_available() else _MODULES_WITH_CUDA_LITERALS)
    if any(not isinstance(module.torch, _Delegate) for module in modules):
        stand_in(torch.device("cpu"))


def stand_in(device: torch.device) -> None:
    """Let Megatron-core put on `device` what it creates on a literal "cuda"."""
    cuda = _Delegate(torch.cuda, current_device=lambda: device, synchronize=lambda *_: None)
    substitute = _Delegate(torch, cuda=cuda, **{name: _on(device, getattr(torch, name)) for name in _FACTORIES})
    for name in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(name).torch = substitute


def device() -> torch.device:
    """The device of this process: its current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
