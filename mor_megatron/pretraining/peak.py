"""What utilisation is measured against: the peak of one rank's device."""

from __future__ import annotations

import time

import torch

from mor_megatron.config.schema import Config
from mor_megatron.distributed.cpu import device

# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets; the first name found in the device's name counts.
_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 150.0,
    "A10": 125.0,
    "L4": 121.0,
}


def device_peak(config: Config) -> tuple[float, str]:
    """Peak TFLOP/s of this rank's device in the run's precision, and where the number is from.

    `--peak-tflops` if given; for bf16 on a known GPU its data sheet; else the best of a few matrix products now.
    """
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops, "--peak-tflops"
    if config.training.bf16 and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, tflops in _BF16_TFLOPS.items():
            if known in name:
                return tflops, f"data sheet of {known}"
    size = 8192 if torch.cuda.is_available() else 1024
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    name = f"measured {size}^3 {str(dtype).removeprefix('torch.')} product, {torch.get_num_threads()} threads"
    return measure_gemm(size, dtype), name


def measure_gemm(size: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """Best TFLOP/s of a square matrix product over `rounds`, after one that warms up."""
    a = torch.full((size, size), 0.5, dtype=dtype, device=device())  # constants: random numbers would move the seed
    out = torch.empty_like(a)
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        out[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:]) / 1e12
