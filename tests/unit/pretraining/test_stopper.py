"""Signal handlers are restored after a run, unless it was stopped."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mor_megatron.config.schema import FaultConfig
from mor_megatron.pretraining.stopping import SIGNALS, Stopper


@pytest.fixture
def handlers():
    """This process's own, which are put back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_late_does_not_end_a_run_that_has_stopped(process_group, handlers):
    with Stopper(FaultConfig()) as stopper:
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 10
        while stopper.reason(1) != "SIGUSR1":
            assert time.monotonic() < end
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
    os.kill(os.getpid(), signal.SIGUSR1)  # by default it would end this process


def test_nor_a_run_that_has_stopped_for_another_reason(process_group, handlers):
    with Stopper(FaultConfig(exit_interval=1)) as stopper:
        assert stopper.reason(1) == "exit-interval=1"
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)


def test_after_a_run_that_has_finished_handlers_are_as_before(process_group, handlers):
    with Stopper(FaultConfig()) as stopper:
        assert stopper.reason(1) is None
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
