"""The compiled attention of single rows on a CPU: built on first use, where there is a C++ compiler.

PyTorch alone would call its attention once a sequence, on a copy of the sequence's keys.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("paged_attention.cpp")
COMPILE = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fPIC", "-c")
# Linked without -ffast-math, which would make the whole process flush denormal numbers.
LINK = ("-shared",)

Kernel = Callable[[Tensor, Tensor, Tensor, np.ndarray, int, np.ndarray, np.ndarray, np.ndarray, Tensor], None]
"""Attention of some queries to a table each: queries [Q, N, D], keys and values [rows, G, D], tables [tables, pages],
rows of a page, which queries [n], their tables [n], how many rows they see [n], and the output [Q, N, D]."""

Choice = Literal["auto", "native", "torch"]


def choose(choice: Choice, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel to use; None: PyTorch alone.

    Args:
        choice: auto takes the compiled kernel if it can be had.
    Raises:
        ValueError: native was asked for and cannot be had.
    """
    if choice == "torch":
        return None
    try:
        if dtype != torch.float32 or device.type != "cpu":
            raise ValueError(f"computes in fp32 on a CPU, and the model is {str(dtype)[6:]} on {device.type}")
        return _load()
    except ValueError as error:
        if choice == "native":
            raise ValueError(f"attention=native {error}: use attention=torch") from None
        logger.info(f"attention by PyTorch alone: the compiled kernel {error}")
        return None


@cache
def _load() -> Kernel:
    """Build the kernel, or find it built.

    Raises:
        ValueError: there is no compiler, or it fails.
    """
    function = ctypes.CDLL(str(_build())).paged_attention
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, pointer, pointer, pointer, number, number, *[pointer] * 4, *[number] * 4]
    function.restype = None

    def attend(query, keys, values, table, size, which, tables, seen, out) -> None:
        query = query.contiguous()
        heads, width = query.shape[1:]
        arrays = (x.ctypes.data for x in (which, tables, seen))
        function(
            query.data_ptr(), query.stride(0), keys.data_ptr(), values.data_ptr(), table.ctypes.data, table.shape[1],
            size, *arrays, out.data_ptr(), len(which), heads, keys.shape[1], width,
        )  # fmt: skip

    return attend


def _build() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ValueError("needs a C++ compiler, and there is none (c++, g++, clang++, or CXX)")
    # A directory of the user may be shared by machines of different kinds.
    kind = "|".join([SOURCE.read_text(), compiler, *COMPILE, *LINK, platform.machine(), _processor()])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mor-megatron"
    library = base / f"paged_attention-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as work:
            compiled, linked = Path(work, "kernel.o"), Path(work, "kernel.so")
            for command in (*COMPILE, str(SOURCE), "-o", str(compiled)), (*LINK, str(compiled), "-o", str(linked)):
                subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
            linked.replace(library)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"did not compile with {compiler}: {error.stderr.strip().splitlines()[-1:]}") from None
    except OSError as error:
        raise ValueError(f"could not be built: {error}") from None
    return library


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "|".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
