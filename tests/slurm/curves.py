"""Runs that were interrupted, compared with one that was not."""

from __future__ import annotations

from pathlib import Path

from small_runs import assert_same_checkpoint, read_metrics


def assert_same_curve(save: Path, whole: Path, iterations: int) -> None:
    """Every number of every iteration, and the state at the end, bit for bit."""
    metrics = read_metrics(save)
    assert [record["iteration"] for record in metrics] == list(range(1, iterations + 1))
    assert metrics == read_metrics(whole)[:iterations]
    assert_same_checkpoint(save, whole, iterations)
