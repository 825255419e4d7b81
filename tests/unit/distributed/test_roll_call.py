"""Whatever happens to a rank, the others exit and name it. Real processes over gloo."""

from __future__ import annotations

import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from forked_ranks import LIMIT, Ranks, running

from mor_megatron.distributed import initialize as distributed


def ranks(count: int, fate: str, victim: int, directory: Path):
    """Workers without a launcher, which would end the others itself; none survives the block."""
    words = [fate, str(victim), str(directory)]
    return running(words, count, directory / "logs", program="tests/unit/distributed/lost_rank_worker.py")


def errors(ranks: Ranks, victim: int) -> list[str]:
    """Wait for all but the victim, which must fail; the lines that they report."""
    reports = []
    for rank, process in enumerate(ranks.processes):
        if rank != victim:
            process.join(LIMIT)
            text = ranks.output(rank)
            assert process.exitcode == 1, f"rank {rank}: {text}"
            assert "Traceback" not in text
            reports += [line for line in text.splitlines() if line.startswith("error: ")]
    return reports


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_the_lost_rank_is_named_once(tmp_path, fate):
    """With its place in the layout and the iteration; the others leave their stacks."""
    with ranks(4, fate, 2, tmp_path) as workers:
        (report,) = errors(workers, victim=2)
        pid = workers.processes[2].pid
    place = "pipeline stage 1 of 2, data-parallel rank 0 of 2"
    assert re.match(rf"error: lost rank 2 \(\S+, process {pid}, {place}\) of 4 in iteration 7; rank [013]: ", report)
    assert report.endswith(f"; stacks of the ranks that answered are in {tmp_path / 'stacks'}")
    stacks = {path.name: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert sorted(stacks) == [f"rank_{rank:05d}.txt" for rank in (0, 1, 3)]
    assert all("MainThread\n" in stack and "lost_rank_worker.py" in stack for stack in stacks.values())
    if fate == "stopped":
        # The second is what a rank sees of another that was faster to time out, and to leave.
        assert re.search(r"Timed out|Connection (closed|reset) by peer", report)


def test_the_host_of_the_store_is_named(tmp_path):
    with ranks(2, "killed", 0, tmp_path) as workers:
        (report,) = errors(workers, victim=0)
    assert report.startswith("error: lost rank 0, which hosts the rendezvous store; rank 1: ")


def test_a_rank_that_lives_and_does_not_come_is_not_called_lost(tmp_path):
    """Its stack says where it hangs."""
    with ranks(2, "sleeps", 1, tmp_path) as workers:
        (report,) = errors(workers, victim=1)
        assert workers.join() == [1, 1], "it ends with the others"
    assert report.startswith("error: an exchange failed although all 2 ranks are alive: ")
    assert "iteration 7" in report
    assert "in suffer" in (tmp_path / "stacks" / "rank_00001.txt").read_text()


def test_without_a_loss_nothing_is_said(tmp_path):
    with ranks(2, "nothing", 0, tmp_path) as workers:
        assert workers.join() == [0, 0]
        assert "TCPStore" not in workers.output(0) + workers.output(1)


def test_ranks_that_do_not_meet_in_time_end_whatever_the_library_does(monkeypatch, capsys):
    """gloo tries five times, each until it times out, to connect."""
    ended = threading.Event()
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(distributed.os, "_exit", lambda status: ended.set() if status == 1 else None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with distributed._time_limit(timedelta(minutes=1e-4)):
        assert ended.wait(60)
    message = "error: rank 1 did not meet all 2 ranks at head:29500 within 0.0001 minutes (it still waits): "
    assert capsys.readouterr().err.startswith(message)
