"""Which kernels an engine runs, and those for a CPU: built on first use, where there is a C++ compiler.

Attention of single rows: PyTorch alone would call its attention once a sequence, on a copy of the sequence's keys.
Products with packed weights: see `packed.py`.
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
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.huggingface.attention_mor import Pair, rotate

logger = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("paged_attention.cpp", "packed_linear.cpp")]
COMPILE = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fPIC", "-c")
# Linked without -ffast-math, which would make the whole process flush denormal numbers.
LINK = ("-shared",)

Kernel = Callable[[Tensor, Tensor, Tensor, np.ndarray, int, np.ndarray, np.ndarray, np.ndarray, Tensor], None]
"""Attention of some queries to a table each: queries [Q, N, D], keys and values [rows, G, D], tables [tables, pages],
rows of a page, which queries [n], their tables [n], how many rows they see [n], and the output [Q, N, D]."""


class DeviceKernels(NamedTuple):
    """What runs on an accelerator."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
    """As `attend_padded`."""
    store: Callable[[Tensor, Tensor, Tensor, Pair, Tensor, Tensor, Tensor], Tensor]
    """As `store_rows`."""


TILE = 16
"""Rows that a tile of scores has in any case: some queries of a table, with all query heads of a key head."""

Choice = Literal["auto", "native", "torch"]


def choose(choice: Choice, dtype: torch.dtype, device: torch.device) -> Kernel | DeviceKernels | None:
    """The kernel to use; None: PyTorch alone.

    Args:
        choice: auto takes the compiled kernel if it can be had.
    Raises:
        ValueError: native was asked for and cannot be had.
    """
    fallback = None if device.type == "cpu" else PLAIN
    if choice == "torch":
        return fallback
    try:
        if device.type == "cuda":
            return _load_triton()
        if dtype != torch.float32 or device.type != "cpu":
            raise ValueError(f"computes in fp32 on a CPU, and the model is {str(dtype)[6:]} on {device.type}")
        return _attention()
    except ValueError as error:
        if choice == "native":
            raise ValueError(f"attention=native {error}: use attention=torch") from None
        logger.info(f"attention by PyTorch alone: the compiled kernel {error}")
        return fallback


def attend_padded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    table: Tensor,
    seen: Tensor,
    begin: Tensor,
    size: int,
    most: int,
) -> Tensor:
    """Attention of queries to tables, [Q, N, D], in plain PyTorch: over padded copies of the keys of every query.

    Args:
        query: [Q, N, D].
        keys, values: [rows, G, D].
        tables: numbers of pages, [t, pages].
        table: which of them each query reads, [Q].
        seen: how many rows of it the query sees, [Q]; 0: the query is nobody's.
        begin: first queries of parts that belong to one table, [parts + 1].
        size: rows of a page.
        most: queries of a part.
    """
    offset = torch.arange(size, device=query.device)
    places = (tables[table].unsqueeze(2) * size + offset).flatten(1)  # [Q, K]
    mask = torch.arange(places.shape[1], device=query.device) < seen.clamp(min=1).unsqueeze(1)
    k, v = (x[places].transpose(1, 2) for x in (keys, values))  # [Q, G, K, D]
    grouped = query.shape[1] != k.shape[1]
    q, mask = query.unsqueeze(2), mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped).squeeze(2)


def store_rows(
    query: Tensor, key: Tensor, value: Tensor, rotation: Pair, places: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Store the keys and values of rows, and give their queries; queries and keys are rotated.

    Args:
        query: [T, N, D].
        key, value: [T, G, D].
        rotation: cos and sin at the rows' positions, [T, 1, D].
        places: where the rows are stored, [T].
        keys, values: buffers [rows, G, D].
    """
    keys.index_copy_(0, places, rotate(key, rotation))
    values.index_copy_(0, places, value)
    return rotate(query, rotation)


PLAIN = DeviceKernels(attend_padded, store_rows)


def _load_triton() -> DeviceKernels:
    """The kernels of a GPU.

    Raises:
        ValueError: Triton is not installed.
    """
    try:
        from mor_megatron.serving.paged_attention import paged_attention, store_rows
    except ImportError as error:
        raise ValueError(f"needs Triton ({error}: pip install triton)") from None
    return DeviceKernels(paged_attention, store_rows)


@cache
def library() -> ctypes.CDLL:
    """Build the library, or find it built.

    Raises:
        ValueError: there is no compiler, or it fails.
    """
    compiled = ctypes.CDLL(str(_build()))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        (
            "paged_attention",
            None,
            [pointer, number, pointer, pointer, pointer, number, number, *[pointer] * 4, *[number] * 4],
        ),
        ("packed_size", number, [number, number]),
        ("pack", None, [pointer, number, number, pointer]),
        ("packed_linear", None, [pointer, number, pointer, number, number, pointer]),
    ):
        function = getattr(compiled, name)
        function.restype, function.argtypes = result, arguments
    return compiled


def _attention() -> Kernel:
    function = library().paged_attention

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
    texts = [source.read_text() for source in SOURCES]
    kind = "|".join([*texts, compiler, *COMPILE, *LINK, platform.machine(), _processor()])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mor-megatron"
    result = base / f"serving-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"
    if result.exists():
        return result
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as work:
            compiled = {source: Path(work, source.stem).with_suffix(".o") for source in SOURCES}
            linked = Path(work, "serving.so")
            commands = [(*COMPILE, str(source), "-o", str(part)) for source, part in compiled.items()]
            for command in (*commands, (*LINK, *map(str, compiled.values()), "-o", str(linked))):
                subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
            linked.replace(result)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"did not compile with {compiler}: {error.stderr.strip().splitlines()[-1:]}") from None
    except OSError as error:
        raise ValueError(f"could not be built: {error}") from None
    return result


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "|".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
