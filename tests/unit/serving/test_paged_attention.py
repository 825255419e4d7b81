"""Attention over pages: the compiled kernel, the Triton kernel, padded calls and plain PyTorch agree."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mor_megatron.serving import kernel
from mor_megatron.serving.attention import DeviceReads, Reads
from mor_megatron.serving.pages import Pages

CPU = torch.device("cpu")
KERNELS = Path(kernel.__file__).parent
INTERPRETER = Path(__file__).parents[1] / "model" / "interpreted.py"
SHAPES = [(2, 2, 64), (4, 1, 32), (6, 2, 128), (4, 2, 20)]
"""Query heads, key heads, their width."""
HALF_TOLERANCE = 4e-3  # 11 bits, and weights are rounded before they are multiplied; the interpreter's bf16 is wrong
Case = tuple[Pages, np.ndarray, np.ndarray, torch.Tensor]


def case_of(shape: tuple[int, int, int]) -> Case:
    """Queries of six tables, two of them with several queries, and two of nobody."""
    heads, groups, width = shape
    torch.manual_seed(0)
    pages = Pages({0}, 6, 200, 120, 7, torch.empty(groups, width))
    pages.keys[0].normal_()
    pages.values[0].normal_()
    for table, rows in enumerate((1, 7, 40, 90, 20, 75)):
        pages.grow(table, pages.needed(rows))
    table = np.array([0, 1, 2, 3, 4, 4, 4, *[5] * 19, 6, 6])
    seen = np.array([1, 7, 40, 90, 3, 9, 20, *range(57, 76), 0, 0])
    return pages, table, seen, 3.0 * torch.randn(len(table), heads, width)


@pytest.fixture(params=SHAPES, ids=str)
def case(request) -> Case:
    return case_of(request.param)


def attend(case: Case, native) -> torch.Tensor:
    pages, table, seen, query = case
    return Reads(pages, table, seen, native).attend(query, pages.keys[0], pages.values[0])


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple:
    """Of a `DeviceKernel`."""
    pages, table, seen, query = case
    kernels = kernel.DeviceKernels(lambda *arguments: arguments, kernel.store_rows)
    reads = DeviceReads(pages, table, seen, kernels, query.shape[1] // pages.keys[0].shape[1])
    reads.receive([torch.from_numpy(array).long() for array in reads.arrays])
    return reads.attend(*(x.to(dtype) for x in (query, pages.keys[0], pages.values[0])))


def test_all_ways_agree(case):
    plain = attend(case, None)
    native = kernel.choose("auto", torch.float32, CPU)
    if native is not None:
        torch.testing.assert_close(attend(case, native), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(kernel.attend_padded(*arguments(case)), plain, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[tuple, list[torch.Tensor] | str]:
    """What the Triton kernel gives."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (requirements-dev.txt)")
    cases, results = (tmp_path_factory.mktemp("paged") / name for name in ("cases", "results"))
    each = {(shape, dtype): arguments(case_of(shape), dtype) for shape in SHAPES for dtype in (torch.float32,)}
    each[SHAPES[2], torch.float16] = arguments(case_of(SHAPES[2]), torch.float16)
    # A single part of one table: its keys are divided among several programs.
    query, keys, values, tables, table, seen, _, *sizes = each[SHAPES[1], torch.float32]
    each["one part"] = (query[20:21], keys, values, tables, table[20:21], seen[20:21], torch.tensor([0, 1]), *sizes)
    saved = {key: ("paged_attention", inputs, False) for key, inputs in each.items()}
    saved |= {shape: ("stored", rows_of(shape), False) for shape in SHAPES}
    torch.save(saved, cases)
    subprocess.run(
        [sys.executable, INTERPRETER, cases, results, KERNELS / "paged_attention.py"], check=True, timeout=300
    )
    return torch.load(results, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_kernel_equals_plain_attention(interpreted, dtype):
    for shape in SHAPES if dtype == torch.float32 else SHAPES[2:3]:
        found, case = interpreted[shape, dtype], case_of(shape)
        assert not isinstance(found, str), found
        assert found[0].dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else HALF_TOLERANCE
        torch.testing.assert_close(found[0][:-2].float(), attend(case, None)[:-2], atol=tolerance, rtol=0)
        assert not found[0][-2:].any()


def test_keys_are_divided_where_programs_are_few(interpreted):
    found = interpreted["one part"]
    assert not isinstance(found, str), found
    torch.testing.assert_close(found[0], attend(case_of(SHAPES[1]), None)[20:21], atol=1e-5, rtol=0)


def rows_of(shape: tuple[int, int, int]) -> tuple:
    """Arguments of `store_rows`: five rows, as parts of one tensor, and a buffer of nine."""
    heads, groups, width = shape
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(5, heads + 2 * groups, width, generator=generator)
    angle = torch.randn(5, 1, width // 2, generator=generator)
    rotation = torch.cat([angle.cos()] * 2, 2), torch.cat([-angle.sin(), angle.sin()], 2)
    buffers = torch.randn(2, 9, groups, width, generator=generator).unbind()
    return (*mixed.split([heads, groups, groups], 1), rotation, torch.tensor([3, 0, 8, 1, 7]), *buffers)


def test_triton_kernel_stores_rows(interpreted):
    for shape in SHAPES:
        found, inputs = interpreted[shape], rows_of(shape)
        assert not isinstance(found, str), found
        query = kernel.store_rows(*inputs)
        for ours, exact in zip(found, (query, *inputs[-2:]), strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-6, rtol=0)


def test_plain_attention_is_attention(case):
    pages, table, seen, query = case
    out = attend(case, None)
    for i in range(len(table) - 2):
        places = pages.places(table[i], seen[i])
        k, v = (x[places].repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (pages.keys[0], pages.values[0]))
        weights = (torch.einsum("nd,tnd->nt", query[i], k) / query.shape[2] ** 0.5).softmax(1)
        torch.testing.assert_close(out[i], torch.einsum("nt,tnd->nd", weights, v), atol=1e-5, rtol=0)


def test_kernel_leaves_the_processor_as_it_is():
    """-ffast-math at the link would make the whole process flush denormal numbers."""
    kernel.choose("auto", torch.float32, CPU)
    assert torch.tensor(1e-40) / 2 > 0


def test_native_is_refused_in_words(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="attention=native computes in fp32 on a CPU, and the model is float64 on cpu"):
        kernel.choose("native", torch.float64, CPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.library.cache_clear()
    monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        ValueError, match=r"attention=native needs a C\+\+ compiler, and there is none .*attention=torch"
    ):
        kernel.choose("native", torch.float32, CPU)
    assert kernel.choose("auto", torch.float32, CPU) is None
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ValueError, match="did not compile with false"):
        kernel.choose("native", torch.float32, CPU)
    kernel.library.cache_clear()
