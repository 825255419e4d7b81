"""What this machine's device and links reach, measured, as a file for the planner."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mor_megatron.config.schema import Config
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.distributed.launch import launched_world_size
from mor_megatron.files import write_whole
from mor_megatron.planning.machines import GB, MACHINES

SHAPES = ((2048, 2048, 2048), (4096, 2048, 8192), (4096, 8192, 2048))
"""Products on a GPU: rows, inner width, columns; a quarter of each on a CPU."""


def calibrate(output: Path) -> None:
    """Measure products, attention, copies and, in a launched run of several ranks, an all-reduce; write a YAML file.

    Of a known GPU, the peak stays that of its data sheet, so that utilisation keeps its meaning. Under torchrun every
    rank calls it; rank 0 writes.
    """
    is_distributed = (launched_world_size() or 1) > 1
    if is_distributed:
        initialize_distributed(Config())
    values = {"name": _device_name(), **(_gpu() if torch.cuda.is_available() else _cpu())}
    values |= {"copy-gbs": round(_copy() / GB, 2), "copy-share": 1.0, "operator-us": round(1e6 * _operator(), 2)}
    if is_distributed:
        values |= {"link-gbs": round(_all_reduce() / GB, 3), "link-share": 1.0}
        values["node-size"] = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if not is_distributed or dist.get_rank() == 0:
        text = "".join(f"{name}: {value}\n" for name, value in values.items())
        write_whole(output, text)
        print(f"{output}:\n{text}", end="")
    if is_distributed:
        dist.destroy_process_group()


def _gpu() -> dict[str, object]:
    known = next((machine for name, machine in MACHINES.items() if name in _device_name()), MACHINES["H100"])
    peak = known.bf16_tflops * 1e12
    return {
        "base": known.name,
        "memory-gb": round(torch.cuda.get_device_properties(device()).total_memory / GB, 1),
        "product-share": round(_products(torch.bfloat16) / peak, 3),
        "attention-share": round(_attention((4, 16, 2048, 64), torch.bfloat16) / peak, 3),
    }


def _cpu() -> dict[str, object]:
    fp32 = _products(torch.float32)
    return {
        "base": "CPU",
        "memory-gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB, 1),
        "bf16-tflops": round(_products(torch.bfloat16) / 1e12, 4),
        "fp32-tflops": round(fp32 / 1e12, 4),
        "product-share": 1.0,
        "attention-share": round(_attention((1, 8, 1024, 64), torch.float32) / fp32, 3),
    }


def _seconds(work: Callable[[], object], least: float = 0.3) -> float:
    """Of one call: the median of calls that take `least` seconds together, at least five, after two to warm up."""
    times: list[float] = []
    for _ in range(2):
        work()
    while len(times) < 5 or sum(times) < least:
        _wait()
        start = _clock()
        work()
        _wait()
        times.append(_clock() - start)
    return statistics.median(times)


def _clock() -> float:
    # A CPU may be shared with other programs: count what this process used of it.
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _products(dtype: torch.dtype) -> float:
    """FLOP/s of linear layers of several shapes, forward and backward: three products each. The mean."""
    rates = []
    for shape in SHAPES:
        rows, inner, columns = (size if torch.cuda.is_available() else size // 4 for size in shape)
        sizes = ((rows, inner), (columns, inner), (rows, columns))
        x, weight, grad = (torch.randn(size, device=device()).to(dtype) for size in sizes)
        seconds = _seconds(lambda x=x, weight=weight, grad=grad: (x @ weight.t(), grad @ weight, grad.t() @ x))
        rates.append(3 * 2 * rows * inner * columns / seconds)
    return sum(rates) / len(rates)


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> float:
    """FLOP/s of causal attention [B, heads, S, D], forward and backward; counted as `planning.accounting` does."""
    batch, heads, length, width = shape
    inputs = [torch.randn(shape, device=device(), dtype=dtype, requires_grad=True) for _ in "qkv"]

    def both() -> None:
        F.scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()

    return 3 * 2 * batch * heads * length * length * width / _seconds(both)


def _copy() -> float:
    """Bytes a second read and written, of a tensor that no cache holds."""
    source = torch.zeros(2**28 if torch.cuda.is_available() else 2**25, device=device())
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
