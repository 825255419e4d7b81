"""Copies of the state on a device that does its work later, as a GPU does: here a plain model of CUDA's streams."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from mor_megatron.checkpointing.host_copy import HostCopy


class FakeCuda:
    """Two devices. Each stream is a list of work, done when someone waits for it; threads begin on device 0."""

    def __init__(self):
        self.local = threading.local()
        self.main = [FakeStream(self, index) for index in range(2)]
        self.used: set[int] = set()
        """Devices that a thread worked with."""

    def set_device(self, device: torch.device | int) -> None:
        self.local.stream = self.main[device.index if isinstance(device, torch.device) else device]

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        current = getattr(self.local, "stream", self.main[0])
        if device is not None and current.device != device:
            current = self.main[device.index]  # a tensor's device counts, whatever the current one is
        self.used.add(current.device.index)
        return current

    def synchronize(self) -> None:
        self.current_stream().synchronize()


class FakeStream:
    def __init__(self, cuda: FakeCuda, index: int):
        self.cuda, self.device, self.work = cuda, torch.device("cuda", index), []

    def record_event(self) -> Callable[[], None]:
        count = len(self.work)
        return lambda: self.run(count)

    def wait_event(self, event: Callable[[], None]) -> None:
        self.work.append(event)

    def synchronize(self) -> None:
        self.run(len(self.work))

    def run(self, count: int) -> None:
        for position in range(count):
            work, self.work[position] = self.work[position], lambda: None
            work()

    def __enter__(self) -> None:
        self.outer = self.cuda.current_stream()
        self.cuda.local.stream = self

    def __exit__(self, *error: object) -> None:
        self.cuda.local.stream = self.outer


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()

    class OnDevice(torch.Tensor):
        """A tensor on device 1; copies of it are enqueued."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.is_cuda.__get__:
                return True
            if function is torch.Tensor.copy_:
                work = fake.current_stream(torch.device("cuda", 1)).work
                work.append(lambda: args[0].data.copy_(args[1].as_subclass(torch.Tensor)))
                return args[0]
            return super().__torch_function__(function, types, args, kwargs or {})

    fake.tensor = lambda values: torch.tensor(values).as_subclass(OnDevice)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory: empty(*size))  # there is nothing to pin for
    for name in ("set_device", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(fake, device.index))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return fake


def in_thread(work: Callable[[], object]) -> object:
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_copy_is_complete_and_of_the_state_that_was_marked(cuda):
    """On a rank's second device, by a thread, twice: the buffers of the save before must not pass for the new state."""
    device = torch.device("cuda", 1)
    cuda.set_device(device)
    state, done, compute = cuda.tensor([0.0, 0.0]), [], cuda.main[1].work
    copies = HostCopy(device)
    for step in (1.0, 2.0):
        compute.append(lambda step=step: state.data.fill_(step))  # the update before the save
        copies.mark()
        compute.append(lambda step=step: done.append(step))  # forward and backward after it
        ((key, copy),) = in_thread(lambda: copies.copy([("weight", state)]))
        assert (key, copy.tolist()) == ("weight", [step, step])
        assert step not in done, "the copy waited for the work after it"
    assert cuda.used == {1}, "another rank's device was touched"
