"""Bytes that one rank holds and sends, measured on the real tensors and process groups.

Bytes held are those of unique storages, so a tied weight counts once, and a view of a buffer does not count again.
Bytes sent are counted in the methods of `ProcessGroup`, which every function of torch.distributed calls.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def weights(module: nn.Module) -> list[Tensor]:
    """A rank's own part of each parameter; under ZeRO-3 that is its partition."""
    return [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]


def gradients(engine) -> list[Tensor]:
    """All gradients of this iteration that a DeepSpeed engine holds, just before the update."""
    optimizer = engine.optimizer
    found = [parameter.grad for parameter in engine.module.parameters()]
    found += [parameter.grad for parameter in _updated(engine)]
    for partition in getattr(optimizer, "averaged_gradients", {}).values():  # ZeRO 1 and 2
        found += partition or []
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))  # ZeRO 3
    return [gradient for gradient in found if gradient is not None]


def optimizer_state(engine) -> list[Tensor]:
    """The moments, and the optimizer's copy of the weights if it does not update the weights themselves."""
    held = {weight.untyped_storage().data_ptr() for weight in weights(engine.module)}
    moments = [value for state in _torch_optimizer(engine).state.values() for value in state.values()]
    copies = [p for p in _updated(engine) if p.untyped_storage().data_ptr() not in held]
    return [tensor for tensor in [*moments, *copies] if isinstance(tensor, Tensor)]


def _torch_optimizer(engine):
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _updated(engine) -> list[nn.Parameter]:
    return [parameter for group in _torch_optimizer(engine).param_groups for parameter in group["params"]]


# What a rank sends in a group of n, in the ring algorithms: (n, arguments of the method) -> bytes.
_SENT: dict[str, Callable[[int, tuple], float]] = {
    "send": lambda n, a: nbytes_of(a[0]),
    "broadcast": lambda n, a: nbytes_of(a[0]) * (n - 1) / n,  # the mean over the group
    "reduce": lambda n, a: nbytes_of(a[0]) * (n - 1) / n,
    "allreduce": lambda n, a: 2 * nbytes_of(a[0]) * (n - 1) / n,
    "allreduce_coalesced": lambda n, a: 2 * nbytes_of(a[0]) * (n - 1) / n,
    "allgather": lambda n, a: nbytes_of(a[1]) * (n - 1),
    "all_gather_single": lambda n, a: nbytes_of(a[1]) * (n - 1),
    "all_gather_single_coalesced": lambda n, a: nbytes_of(a[1]) * (n - 1),
    "reduce_scatter": lambda n, a: nbytes_of(a[1]) * (n - 1) / n,
    "reduce_scatter_single": lambda n, a: nbytes_of(a[1]) * (n - 1) / n,
    "reduce_scatter_single_coalesced": lambda n, a: nbytes_of(a[1]) * (n - 1) / n,
    "all_to_all_single": lambda n, a: nbytes_of(a[1]) * (n - 1) / n,
    "alltoall": lambda n, a: nbytes_of(a[1]) * (n - 1) / n,
}
_KINDS = {"TENSOR": "tensor", "DATA": "data", "EMBEDDING": "embedding", "MODEL": "model", "PIPELINE": "pipeline"}


def nbytes_of(value) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else sum(map(nbytes_of, value))


class Traffic:
    """While installed, counts the bytes that this process sends, by purpose.

    A message from rank to rank is `p2p`. A collective is named after Megatron-core's group (`tensor`, `data`,
    `embedding`, `pipeline`, ...), or else `other`; inside `named(...)` it has that name.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._name: str | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[Traffic]:
        """Replace the methods of `ProcessGroup` for the duration of the block."""
        # From the class's dictionary: read as attributes, they would not bind to a group.
        originals = {name: vars(dist.ProcessGroup)[name] for name in _SENT}
        for name in _SENT:
            setattr(dist.ProcessGroup, name, self._counting(name, getattr(dist.ProcessGroup, name)))
        try:
            yield self
        finally:
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, original)

    @contextlib.contextmanager
    def named(self, purpose: str) -> Iterator[None]:
        """Count the collectives of the block under this name."""
        before, self._name = self._name, purpose
        try:
            yield
        finally:
            self._name = before

    def _counting(self, method: str, original: Callable) -> Callable:
        def call(group, *args, **kwargs):
            if group.size() > 1:
                self.sent[self._purpose(method, group)] += int(_SENT[method](group.size(), args))
            return original(group, *args, **kwargs)

        return call

    def _purpose(self, method: str, group: dist.ProcessGroup) -> str:
        if method == "send":
            return "p2p"
        return self._name or _KINDS.get(group.group_desc.split("_")[0], "other")


def resident_peak() -> int:
    """VmHWM in bytes; getrusage's value would include the memory of the parent when it started this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
