"""The attention benchmark in small: what runs here is right, what does not says why, and it stops in time."""

from __future__ import annotations

import attention as benchmark
import pytest

SHORT = benchmark.Size(heads=4, groups=2, width=16, length=48, batch=2)


def test_each_kind_of_rows_is_compared_with_fp32(monkeypatch):
    monkeypatch.setitem(benchmark.SIZES, "tiny", SHORT)
    rows = list(benchmark.measure(60.0, ["tiny"], "cpu"))
    right = {row["rows"] for row in rows if "refused" not in row}
    assert right == {name for name, *_ in benchmark.rows_of(SHORT, "cpu")}
    for row in rows:
        if "refused" in row:
            assert row["kernel"] in ("varlen", "ranges", "efficient") or "cuDNN" in row["kernel"]
            assert "\n" not in row["refused"]
        else:
            assert max(row["error"], row["gradient_error"]) < 1e-5, row  # fp32 in another order of summation


def test_nothing_begins_after_the_budget():
    assert not list(benchmark.measure(-1.0, ["tiny"], "cpu"))


def test_a_row_is_one_line(capsys: pytest.CaptureFixture):
    benchmark.show({"size": "1.7b", "rows": "all", "kernel": "cuDNN", "refused": "RuntimeError: no"})
    times = {"first_s": 0.1, "forward_ms": 1.0, "both_ms": 3.0, "error": 1e-3, "gradient_error": 2e-3}
    benchmark.show({"size": "1.7b", "rows": "all", "kernel": "flash"} | times)
    assert len(capsys.readouterr().out.splitlines()) == 2
