"""An accelerator that is none: its memory is the processor's, and each wait of the host for it is noted.

Tensors on it are wrappers with a device of their own. `Accelerator`, a dispatch mode, computes with what they wrap, and
refuses what a real one would: operands on two devices, except 0-d tensors of the CPU, which are numbers. What makes the
host wait on CUDA does so here. PyTorch knows one such device a process, before its first backward pass: use it in a
process of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
OURS = f"{Path(__file__).parents[1]}/mor_megatron/"
aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operators whose result, or its size, comes to the host."""


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class OnDevice(Tensor):
    """A tensor on the accelerator; `memory` has its values."""

    @staticmethod
    def __new__(cls, memory: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            memory.stride(),
            memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, memory: Tensor):
        self.memory = memory

    def __repr__(self):
        return f"OnDevice({self.memory})"

    def __setitem__(self, key, value):
        # A number that goes to indexes is copied from the CPU first; under a mask or in a slice it is filled in.
        keys = key if isinstance(key, tuple) else (key,)
        if isinstance(value, int | float) and any(isinstance(x, Tensor) and x.dtype == torch.int64 for x in keys):
            value = torch.tensor(value, dtype=self.dtype).to(self.device)
        super().__setitem__(key, value)

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of `with Accelerator()`")


class Accelerator(TorchDispatchMode):
    """While it is entered, there is `device`."""

    def __init__(self):
        super().__init__()
        if torch._C._get_privateuse1_backend_name() != NAME:
            _setup_privateuseone_for_python_backend(NAME, _Backend())
        self.device = torch.device(NAME, 0)
        self.waits: list[str] = []
        self.lifted: list[bool] = []

    def __enter__(self):
        self.lifted.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # then the copy inside torch.tensor(.., device=) is seen
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(self.lifted.pop())
        return super().__exit__(*exception)

    def put(self, x: Any) -> Any:
        """A tensor, or the tensors of a dataclass, on the device."""
        if isinstance(x, Tensor):
            return OnDevice(x.detach())
        values = {field.name: getattr(x, field.name) for field in fields(x)}
        return replace(x, **{name: self.put(value) for name, value in values.items() if isinstance(value, Tensor)})

    def move(self, module: nn.Module) -> None:
        """Parameters and buffers to the device, with their attributes; what is tied stays tied."""
        moved: dict[int, nn.Parameter] = {}
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None and id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(self.put(parameter), parameter.requires_grad)
                    moved[id(parameter)].__dict__.update(parameter.__dict__)
                each._parameters[name] = moved.get(id(parameter))
            for name, buffer in each._buffers.items():
                each._buffers[name] = None if buffer is None else self.put(buffer)

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """The waits inside the block: the operator, and the line of ours that called it."""
        before, self.waits = self.waits, []
        try:
            yield self.waits
        finally:
            self.waits = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode, nobody has taken it apart yet
                return function.decompose(*args, **kwargs)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, OnDevice) for x in tensors)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == NAME
            kwargs["device"] = torch.device("cpu")
        if function is aten._to_copy.default:
            self._note_copy(function, tensors[0], there, kwargs.get("non_blocking", False))
        elif function is aten.copy_.default:
            there = isinstance(tensors[0], OnDevice)
            self._note_copy(function, tensors[1], there, len(args) > 2 and args[2])
        elif there and function.namespace == "aten":
            if any(not isinstance(x, OnDevice) and x.ndim > 0 for x in tensors):
                raise RuntimeError(f"{function} has operands on the CPU and on {self.device}")
            if function in READS or _reads(function, args, kwargs):
                self._note(function)
        result = function(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        if not there or function is aten._local_scalar_dense.default:
            return result
        changed = {id(x.memory): x for x in tensors if isinstance(x, OnDevice)}  # in place
        wrap = lambda x: changed[id(x)] if id(x) in changed else OnDevice(x)  # noqa: E731
        return tree_map(lambda x: wrap(x) if isinstance(x, Tensor) else x, result)

    def _note_copy(self, function, source: Tensor, there: bool, non_blocking: bool) -> None:
        """A copy to the device that may be under way is staged at once; a copy from it is waited for."""
        crosses = isinstance(source, OnDevice) != there
        is_number = source.ndim == 0 and function is aten.copy_.default
        if crosses and not (there and (non_blocking or is_number)):
            self._note(function)

    def _note(self, function) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(OURS)]
        where = f"{ours[-1].filename.removeprefix(OURS)}:{ours[-1].lineno}" if ours else "elsewhere"
        self.waits.append(f"{where} {function.name()}")


def _reads(function, args, kwargs) -> bool:
    """Whether these arguments make the host wait."""
    if function is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    by_mask = len(args) > 1 and any(x is not None and x.dtype == torch.bool for x in _indexes(function, args))
    return by_mask and (function is aten.index.Tensor or args[2].ndim > 0)


def _indexes(function, args):
    return args[1] if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()


def _memory(x):
    return x.memory if isinstance(x, OnDevice) else x
