"""The processor that a benchmark runs on, as far as it explains times."""

from __future__ import annotations

import platform
import time
from functools import lru_cache
from pathlib import Path

import torch

VECTORS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
"""Flags of /proc/cpuinfo that decide how fast products are."""


@lru_cache(maxsize=1)
def processor() -> str:
    """Name, vector flags, which of them PyTorch uses, and the bandwidth of a copy (bytes read and written), such as
    `AMD EPYC (avx2 fma avx512f, PyTorch AVX2, copies 11.3 GB/s)`."""
    has = [flag for flag in VECTORS if flag in _cpuinfo("flags", "Features").split()]
    used = torch.backends.cpu.get_cpu_capability()
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    facts = [" ".join(has) or "no vector flags", f"PyTorch {used}", f"copies {copy_bandwidth() / 1e9:.1f} GB/s"]
    return f"{name} ({', '.join(facts)})"


def copy_bandwidth(size: int = 2**26, rounds: int = 5) -> float:
    """Bytes read and written a second while `size` bytes are copied, the best of some rounds."""
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds)


def _cpuinfo(*names: str) -> str:
    """The first line of one of these names in /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = [line for line in lines if line.split(":")[0].strip() in names]
    return found[0].split(":", 1)[1].strip() if found else ""
