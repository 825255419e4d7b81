"""Sections on a GPU, which is pretended: their times are the device's, and nobody waits for it until they are read."""

from __future__ import annotations

import pytest
import torch

from mor_megatron.training.device_timers import DeviceTimers
from mor_megatron.training.sections import Sections

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def device(monkeypatch):
    """Its clock, in ms, and how often the host has waited."""
    state = {"clock": 0.0, "waits": 0}

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = state["clock"]

        def synchronize(self) -> None:
            state["waits"] += 1

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def synchronize(*device: object) -> None:
        state["waits"] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return state


def test_sections_are_timed_without_a_wait(device):
    timers = DeviceTimers(log_level=2, log_option="minmax")
    sections = Sections(timers)
    for _ in range(2):
        with sections("forward-backward"):
            device["clock"] += 30.0
            with sections("batch-generator"):  # interrupts it
                device["clock"] += 5.0
            device["clock"] += 10.0
    assert device["waits"] == 0
    assert timers("forward-backward").active_time() == pytest.approx(0.080)
    assert timers("batch-generator").active_time() == pytest.approx(0.010)
    assert device["waits"] == 2, "one for each timer that is read"

    with sections("batch-generator"):
        device["clock"] += 7.0
    text = timers.get_all_timers_string(["forward-backward", "batch-generator"], normalizer=1.0)
    assert "forward-backward" in text
    assert "80.00" in text
    assert "17.00" in text
    assert timers("batch-generator").active_time() == pytest.approx(0.017)
    assert timers("batch-generator").elapsed() == 0.0, "what was printed is not printed again"
