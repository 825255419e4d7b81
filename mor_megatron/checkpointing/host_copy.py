"""A copy of a rank's state in CPU memory, made by another thread while the device computes."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Buffers for the state, which every save uses again, and on a GPU the stream that fills them.

    The state may not change between `mark` and the end of `copy`.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device):
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._marked: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Note that the state to be copied is what the work enqueued so far leaves; by the thread that computes."""
        if self._stream is not None:
            self._marked = torch.cuda.current_stream(self._stream.device).record_event()

    def copy(self, entries: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The entries [n] fp32 in memory of our own, complete when this returns; by any thread."""
        if self._stream is None:
            return self._fill(entries)
        torch.cuda.set_device(self._stream.device)  # a new thread begins on device 0
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._marked)
            copies = self._fill(entries)
        self._stream.synchronize()
        return copies

    def _fill(self, entries: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        copies = []
        for key, entry in entries:
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() != entry.numel():
                buffer = self._buffers[key] = torch.empty(entry.numel(), pin_memory=entry.is_cuda)
            buffer.copy_(entry, non_blocking=True)
            copies.append((key, buffer))
        return copies
