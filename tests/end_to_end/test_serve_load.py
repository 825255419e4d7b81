"""Two servers under load, of which one is killed: `benchmarks/serve_load.py`, checked."""

from __future__ import annotations

import os

import pytest
from serve_load import parse, print_report, run

MOST_GROWTH = 40_000
"""Bytes of resident memory for each request. The heap still grows by half of it towards its level of about a thousand
requests; a tensor that is kept exceeds it. Requests that are remembered are found by `unit/serving/test_load.py`."""
THREADS = min(32, os.cpu_count() + 4)
"""Of asyncio's pool, which grows when several prompts arrive at once."""


@pytest.mark.slow
def test_a_thousand_requests_and_a_killed_server():
    report = run(parse([]))
    print_report(report)
    for visit, answer in zip(report.visits, report.answers, strict=True):
        wanted = "malformed" if visit.fault else "answered" if visit.leaves_after is None else "left"
        assert answer.outcome in (wanted, "answered", "overloaded"), answer  # a short stream ends before its client
    assert sum(answer.lost > 0 for answer in report.answers) > 0
    assert report.outcomes()["answered"] > len(report.visits) / 2
    assert [number for number, _ in report.differing] == report.by_rounding
    assert len(report.by_rounding) <= len(report.visits) / 100
    for first, last in zip(report.first, report.last, strict=True):
        assert last.requests == 0
        assert last.metrics["mor_kv_use"] == 0
        assert last.threads <= first.threads + THREADS
        assert last.metrics["process_open_fds"] <= first.metrics["process_open_fds"]
    assert report.last[0].metrics["mor_preemptions_total"] > 0
    assert report.growth(0) < MOST_GROWTH
    assert report.exits == [0, 0]
