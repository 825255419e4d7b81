"""Who may write to a directory: one living process, or the successor of a dead one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mor_megatron.pretraining import lock
from mor_megatron.pretraining.lock import LOCK, Holder, Lock


def refuse(reason: str) -> None:
    raise AssertionError(reason)


def leave(directory: Path, holder: Holder | str, age: float) -> None:
    """What a process leaves behind whose last sign of life was `age` seconds ago."""
    path, new = directory / LOCK, directory / "new"
    new.write_text(holder if isinstance(holder, str) else json.dumps(asdict(holder)))
    then = lock._now(directory) - age
    os.utime(new, (then, then))
    new.replace(path)  # at once: a heartbeat may be reading


@pytest.fixture
def mine(tmp_path) -> Holder:
    with Lock(tmp_path, refuse):
        return Holder(**json.loads((tmp_path / LOCK).read_text()))


def test_it_is_held_and_released(tmp_path, mine):
    assert (mine.pid, mine.is_alive()) == (os.getpid(), True)
    with (
        Lock(tmp_path, refuse),
        pytest.raises(ValueError, match=rf"save={tmp_path} is in use by process {mine.pid} on"),
    ):
        Lock(tmp_path, refuse).__enter__()
    assert not list(tmp_path.iterdir())


def ended(mine: Holder) -> Holder:
    process = subprocess.Popen(["sleep", "600"])
    holder = replace(mine, pid=process.pid, began=lock._began(process.pid))
    assert holder.is_alive()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as where nobody reaps orphans
    return holder


GONE = {
    "ended": (lambda mine: ended(mine), 1, "has ended"),
    "number used again": (lambda mine: replace(mine, began="1"), 1, "has ended"),
    "elsewhere": (lambda mine: replace(mine, machine="another"), 70, r"has shown no sign of life for 7\d s"),
    "damaged": (lambda mine: "{", 70, r"an unknown process has shown no sign of life for 7\d s"),
}


@pytest.mark.parametrize("name", GONE)
def test_a_lock_without_a_living_holder_is_taken_over(tmp_path, mine, capsys, name):
    holder, age, reason = GONE[name]
    leave(tmp_path, holder(mine), age)
    with Lock(tmp_path, refuse):
        assert Holder(**json.loads((tmp_path / LOCK).read_text())) == mine
    assert re.search(rf"lock\.json: .*{reason}; this run takes the lock over", capsys.readouterr().out)


def test_a_holder_elsewhere_is_given_time_to_show_itself(tmp_path, mine, capsys, monkeypatch):
    now = lock._now(tmp_path)
    leave(tmp_path, replace(mine, machine="another"), 10)
    monkeypatch.setattr(lock, "_now", lambda directory: now)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(tmp_path / LOCK))
    with pytest.raises(ValueError, match="is in use by"):
        Lock(tmp_path, refuse).__enter__()
    assert "showed a sign of life 10 s ago; waiting for another one, for 50 s at most" in capsys.readouterr().out
    leave(tmp_path, replace(mine, machine="another"), 10)
    times = iter((now, now + 40, now + 51))
    monkeypatch.setattr(lock, "_now", lambda directory: next(times))
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    with Lock(tmp_path, refuse):
        assert "has shown no sign of life for 61 s; this run takes the lock over" in capsys.readouterr().out


def test_the_heartbeat_shows_and_sees_others(tmp_path, mine, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    lost, reasons = threading.Event(), []
    with Lock(tmp_path, lambda reason: (reasons.append(reason), lost.set())):
        os.utime(tmp_path / LOCK, (0, 0))
        while (tmp_path / LOCK).stat().st_mtime == 0:
            pass
        (tmp_path / LOCK).unlink()  # by hand: it is written again
        while not (tmp_path / LOCK).exists() or (tmp_path / LOCK).read_text() != json.dumps(asdict(mine)):
            pass
        leave(tmp_path, replace(mine, pid=1, host="other"), 0)
        assert lost.wait(60)
    assert reasons[0] == f"{tmp_path / LOCK} was taken over by process 1 on other"
    assert (tmp_path / LOCK).exists(), "it is the other's"
