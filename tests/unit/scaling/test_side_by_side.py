"""Processes side by side: how many at a time, what becomes of their output and status, and of signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mor_megatron.pretraining.stopping import EXIT_STOPPED
from mor_megatron.scaling.side_by_side import SideBySide, worst

NAMES = ("a", "b", "c")


def group(code: str, directory: Path) -> SideBySide:
    """Processes that run `code` with their name as `name`, in `directory`."""
    for name in NAMES:
        (directory / name).mkdir()
    start = f"import os, sys, time; os.chdir({str(directory)!r}); name = sys.argv[1]\n"
    return SideBySide([sys.executable, "-c", start + code], directory)


def test_two_at_a_time_each_with_its_log_and_status(tmp_path):
    """`a` ends when `b` has begun, `b` when `c` has; fewer at a time would not end, and more would show in the log."""
    code = """
open(name + "/begun", "w").close()
while name != "c" and not os.path.exists(chr(ord(name) + 1) + "/begun"):
    time.sleep(0.01)
print("this is", name, "beside", sorted(other for other in "abc" if os.path.exists(other + "/begun")))
sys.exit(7 * (name == "b"))
"""
    assert group(code, tmp_path).train(NAMES, jobs=2) == [0, 7, 0]
    logs = [(tmp_path / name / "train.log").read_text() for name in NAMES]
    assert logs[0] == "this is a beside ['a', 'b']\n", "the third waited for one of the others"
    assert [log.split(" beside")[0] for log in logs] == [f"this is {name}" for name in NAMES]


def test_a_failure_is_worse_than_a_stop():
    assert [worst(statuses) for statuses in ([0, 0], [0, EXIT_STOPPED], [EXIT_STOPPED, -9, 0], [2, 1])] == [
        0,
        85,
        -9,
        2,
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_stops_those_that_run_and_starts_no_other(tmp_path, number):
    code = f"""
import signal
if name == "a":  # b is not ready for a signal yet
    signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_STOPPED}))
open(name + "/begun", "w").close()
time.sleep(60)
"""

    def terminate() -> None:
        while not all((tmp_path / name / "begun").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=terminate).start()
    assert group(code, tmp_path).train(NAMES, jobs=2) == [EXIT_STOPPED] * 3
    assert not (tmp_path / "c" / "begun").exists()
    assert signal.getsignal(number) == handler
