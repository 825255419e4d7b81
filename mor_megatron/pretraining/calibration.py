"""What this machine's device and links reach, measured, as a file for the planner."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mor_megatron.distributed.cpu import device
from mor_megatron.files import write_whole
from mor_megatron.planning.machines import GB

SHAPES = ((2048, 2048, 2048), (4096, 2048, 8192), (4096, 8192, 2048))
"""Products on a GPU: rows, inner width, columns; a quarter of each on a CPU."""


def calibrate(output: Path) -> None:
    """Measure products, attention, copies and, in a launched run of several ranks, an all-reduce; write a YAML file.

    Under torchrun every rank calls it; rank 0 writes.
    """
    is_cuda = torch.cuda.is_available()
    values: dict[str, object] = {"base": "H100" if is_cuda else "CPU", "name": _device_name(), "product-share": 1.0}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rates = [_product(dtype, *(size if is_cuda else size // 4 for size in shape)) for shape in SHAPES]
        values[f"{name}-tflops"] = round(sum(rates) / len(rates) / 1e12, 4)
        print(f"{name} products, TFLOP/s: " + ", ".join(f"{rate / 1e12:.4g}" for rate in rates))
    values["attention-share"] = round(
        _attention(is_cuda) / (values["bf16-tflops" if is_cuda else "fp32-tflops"] * 1e12), 3
    )
    values["copy-gbs"], values["copy-share"] = round(_copy(is_cuda) / GB, 2), 1.0
    values["operator-us"] = round(1e6 * _operator(), 2)
    if is_cuda:
        values["memory-gb"] = round(torch.cuda.get_device_properties(device()).total_memory / GB, 1)
    else:
        values["memory-gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB, 1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        values["link-gbs"], values["link-share"] = round(_all_reduce() / GB, 3), 1.0
        values["node-size"] = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_whole(output, "".join(f"{name}: {value}\n" for name, value in values.items()))
        print(f"wrote {output}: " + ", ".join(f"{name} {value}" for name, value in values.items()))


def _seconds(work: Callable[[], object], least: float = 0.2) -> float:
    """Of one call: the fastest of calls that take `least` seconds together, at least five, after two to warm up."""
    times: list[float] = []
    for _ in range(2):
        work()
    while len(times) < 5 or sum(times) < least:
        _wait()
        start = _clock()
        work()
        _wait()
        times.append(_clock() - start)
    return min(times)


def _clock() -> float:
    # A CPU may be shared with other programs: count what this process used of it.
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _product(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """FLOP/s of a linear layer, forward and backward: its three products."""
    x, weight, grad = (
        torch.randn(shape, device=device()).to(dtype) for shape in ((rows, inner), (columns, inner), (rows, columns))
    )
    return 3 * 2 * rows * inner * columns / _seconds(lambda: (x @ weight.t(), grad @ weight, grad.t() @ x))


def _attention(is_cuda: bool) -> float:
    """FLOP/s of causal attention, forward and backward; pairs counted once, three times the forward pass in all."""
    batch, heads, length, width = (4, 16, 2048, 64) if is_cuda else (1, 8, 1024, 64)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    inputs = [torch.randn(batch, heads, length, width, device=device(), dtype=dtype, requires_grad=True) for _ in "qkv"]

    def both() -> None:
        F.scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()

    return 3 * batch * heads * length * length * width * 2 / _seconds(both)


def _copy(is_cuda: bool) -> float:
    """Bytes a second read and written, of a tensor that no cache holds."""
    source = torch.zeros(2**28 if is_cuda else 2**25, device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _operator() -> float:
    one = torch.zeros(1, device=device())
    return _seconds(lambda: [one.add_(1) for _ in range(1000)]) / 1000


def _all_reduce() -> float:
    """Bytes a second that a rank sends."""
    count = dist.get_world_size()
    data = torch.zeros(2**26 if torch.cuda.is_available() else 2**22, device=device())
    start = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(data)
    _wait()
    return 5 * 2 * data.nbytes * (count - 1) / count / (time.perf_counter() - start)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
