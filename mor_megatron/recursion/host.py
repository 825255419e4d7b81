"""Numbers between host and accelerator, without a wait of the host where there need be none."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class OnHost:
    """Values of a tensor, asked for now and read later.

    The copy starts at once. Whoever reads waits for what was queued before it, and not for what was queued since.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor):
        self._copied = None
        if values.is_cuda:
            self._copy = values.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.current_stream(values.device).record_event()
        else:
            self._copy = values

    @cached_property
    def values(self) -> Any:
        """As nested lists."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()


def on_device(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; the copy is queued, and nobody waits for it."""
    return torch.tensor(values).to(device, non_blocking=True)
