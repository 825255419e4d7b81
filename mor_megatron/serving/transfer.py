"""Whole numbers between host and accelerator: one copy each way, however many arrays there are.

A copy from memory that is not pinned makes the host wait, and every copy costs about as much as a small kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from torch import Tensor


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of whole numbers as int64 tensors. Nobody waits for the copy, and the arrays may change at once."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [array.size + array.size % 2 for array in arrays]  # whole 16 bytes: a kernel is compiled for an alignment
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    for part, array in zip(host.split(sizes), arrays, strict=True):
        part.numpy()[: array.size] = array.ravel()
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def fetch(values: Tensor) -> np.ndarray:
    """Values of the device; the host waits for them."""
    if not values.is_cuda:
        return values.cpu().numpy()
    copy = values.to("cpu", non_blocking=True)  # into pinned memory
    torch.cuda.current_stream(values.device).synchronize()
    return copy.numpy()


class Numbers:
    """Whole numbers in one buffer that stays where it is, for functions of static shapes.

    Args:
        device: where the buffer is.
        shapes: of its parts.
    """

    def __init__(self, device: torch.device, **shapes: tuple[int, ...]):
        sizes = [math.prod(shape) + math.prod(shape) % 2 for shape in shapes.values()]  # whole 16 bytes

        def parts(buffer: Tensor) -> dict[str, Tensor]:
            pairs = zip(shapes.items(), buffer.split(sizes), strict=True)
            return {name: part[: math.prod(shape)].view(shape) for (name, shape), part in pairs}

        self.there = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.parts = parts(self.there)
        """On the device."""
        # One is filled while the other is copied.
        hosts = [torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=self.there.is_cuda) for _ in range(2)]
        copied = [torch.cuda.Event() if self.there.is_cuda else None for _ in hosts]
        arrays = [{name: part.numpy() for name, part in parts(host).items()} for host in hosts]
        self._buffers = cycle(zip(hosts, arrays, copied, strict=True))

    def send(self, **arrays: tuple[np.ndarray, int]) -> None:
        """Fill the parts, each with an array that has no more rows, and a number beyond them."""
        host, parts, copied = next(self._buffers)
        if copied is not None and not copied.query():  # never, unless the host is two calls ahead
            copied.synchronize()
        for name, (array, rest) in arrays.items():
            part = parts[name]
            part[: len(array)] = array
            part[len(array) :] = rest
        self.there.copy_(host, non_blocking=True)
        if copied is not None:
            copied.record()
