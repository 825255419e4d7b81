"""Traces and byte counts of the parallel benchmark; its runs are tested in tests/end_to_end."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import draw_schedule
import pytest
import torch
import torch.distributed as dist
from footprint import _SENT, Traffic, nbytes, nbytes_of
from schedule_clock import BACKWARD, FORWARD, Event, idle_shares, iterations, overruns
from torch import nn


def perfect_pipeline(stages: int, micro_batches: int) -> list[Event]:
    """Forward one second, backward two: all forwards, then all backwards, each as early as it can be."""
    events = []
    for rank in range(stages):
        for m in range(micro_batches):
            start = float(rank + m)
            events.append(Event(rank, FORWARD, m, 0, start, start + 1, 0.5, (4, 2)))
            start = micro_batches + stages - 1 + 2.0 * (stages - 1 - rank + m)
            events.append(Event(rank, BACKWARD, m, 0, start, start + 2, 0.5, None))
    return events


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (4, 8), (3, 1)])
def test_a_perfect_pipeline_idles_as_the_formula_says(stages, micro_batches):
    shares = idle_shares(perfect_pipeline(stages, micro_batches))
    formula = (stages - 1) / (micro_batches + stages - 1)
    assert shares == pytest.approx({rank: formula for rank in range(stages)})


def test_a_late_rank_makes_all_wait_longer():
    events = perfect_pipeline(2, 4)
    late = [replace(e, start=e.start + 3, end=e.end + 3) if e.rank == 1 else e for e in events]
    before, after = idle_shares(events), idle_shares(late)
    assert all(after[rank] > before[rank] for rank in before)


def test_iterations_are_told_apart_by_what_comes_again():
    once = [event for event in perfect_pipeline(2, 3) if event.rank == 0]
    again = [replace(event, start=event.start + 100, end=event.end + 100) for event in once]
    assert iterations(once + again) == [once, again]


def test_overruns_are_chunks_with_more_work_than_time():
    events = perfect_pipeline(2, 3)
    assert overruns(events, 0.5, 0.5) == 0
    assert overruns(events, 0.4, 0.5) == 6
    assert overruns(events, 0.4, 0.4) == 12


def test_bytes_count_a_storage_once():
    whole = torch.zeros(10)
    assert nbytes([whole, whole[:5], whole.view(2, 5), torch.zeros(3)]) == 52
    layer = nn.Linear(4, 4, bias=False)
    tied = nn.ModuleList([layer, layer])
    tied[1].copy = layer.weight
    assert nbytes(tied.parameters()) == 64
    assert nbytes_of([[whole[:5], whole[5:]], torch.zeros(2, dtype=torch.bfloat16)]) == 44


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("send", ([torch.zeros(6)], 1, 0), 24),
        ("allreduce", ([torch.zeros(8)],), 2 * 32 * 3 / 4),
        ("allgather", ([[torch.zeros(8)] * 4], [torch.zeros(8)]), 3 * 32),
        ("reduce_scatter", ([torch.zeros(2)], [[torch.zeros(2)] * 4]), 32 * 3 / 4),
        ("all_gather_single", (torch.zeros(32), torch.zeros(8)), 3 * 32),
        ("reduce_scatter_single", (torch.zeros(2), torch.zeros(8)), 32 * 3 / 4),
        ("all_to_all_single", (torch.zeros(8), torch.zeros(8)), 32 * 3 / 4),
    ],
)
def test_bytes_that_a_rank_of_four_sends(method, arguments, expected):
    assert _SENT[method](4, arguments) == expected


def test_counting_counts_groups_of_several_only_and_leaves_no_trace(process_group):
    before = {name: vars(dist.ProcessGroup)[name] for name in _SENT}
    ones = torch.ones(3)
    traffic = Traffic()
    with traffic.installed():
        assert all(vars(dist.ProcessGroup)[name] is not method for name, method in before.items())
        dist.all_reduce(ones)
    assert not traffic.sent
    assert all(vars(dist.ProcessGroup)[name] is method for name, method in before.items())
    dist.all_reduce(ones)
    assert ones.tolist() == [1.0, 1.0, 1.0]


def test_the_picture_has_a_box_for_every_chunk(tmp_path, monkeypatch):
    drawn = []

    def count(axes, *args):
        draw_run(axes, *args)
        drawn.append(len(axes.patches))

    draw_run = draw_schedule.draw_run
    monkeypatch.setattr(draw_schedule, "draw_run", count)
    events = perfect_pipeline(4, 8)
    message = {"recursion": 0, "sender": 0, "receiver": 1, "tokens": 8, "rows": 12, "limit": 16}
    footprint = {"layout": draw_schedule.RING, "sent": [{"p2p": 5}]}
    results = {
        "traces": {name: [asdict(event) for event in events] for name in (draw_schedule.RING, draw_schedule.TIED)},
        "messages": [message],
        "footprints": [footprint],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    draw_schedule.main([str(tmp_path / "results.json"), "--output", str(tmp_path)])
    assert drawn == [len(events)] * 2
    for name in ("schedule.png", "messages.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
