"""The compiled kernel, the padded calls of an accelerator and plain PyTorch agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mor_megatron.serving import kernel
from mor_megatron.serving.attention import Reads
from mor_megatron.serving.pages import Pages

CPU = torch.device("cpu")


@pytest.fixture(params=[(2, 2, 64), (4, 1, 32), (6, 2, 128), (4, 2, 20)], ids=str)
def case(request):
    """Queries of five tables, one of them with three queries, and one of nobody."""
    heads, groups, width = request.param
    torch.manual_seed(0)
    pages = Pages({0}, 5, 200, 90, 7, torch.empty(groups, width))
    pages.keys[0].normal_()
    pages.values[0].normal_()
    for table, rows in enumerate((1, 7, 64, 150, 20)):
        pages.grow(table, rows)
    table = np.array([0, 1, 2, 3, 4, 4, 4, 5])
    seen = np.array([1, 7, 64, 150, 3, 9, 20, 0])
    return pages, table, seen, 3.0 * torch.randn(len(table), heads, width)


def attend(case, native) -> torch.Tensor:
    pages, table, seen, query = case
    return Reads(pages, table, seen, native, CPU).attend(query, pages.keys[0], pages.values[0])


def test_all_ways_agree(case, monkeypatch):
    plain = attend(case, None)
    native = kernel.choose("auto", torch.float32, CPU)
    if native is not None:
        torch.testing.assert_close(attend(case, native), plain, atol=1e-5, rtol=0)
    monkeypatch.setattr(Reads, "_side_by_side", True)
    torch.testing.assert_close(attend(case, None), plain, atol=1e-5, rtol=0)


def test_plain_attention_is_attention(case):
    pages, table, seen, query = case
    out = attend(case, None)
    for i in range(7):
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
    kernel._load.cache_clear()
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
    kernel._load.cache_clear()
