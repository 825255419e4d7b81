"""One event loop for all of gloo's process groups in a process.

Each group would have a loop of its own, a thread that wakes a hundred times a second. Megatron-core makes eighteen
groups, and a run of the tests has seven processes with them, which mostly wait for each other.
"""

from __future__ import annotations


def share_event_loop() -> None:
    """Give the process groups that this process makes from now on the same event loop."""
    from torch.distributed import distributed_c10d

    Gloo = distributed_c10d.ProcessGroupGloo
    device = Gloo.create_default_device()

    class SharedLoop(Gloo):
        def __init__(self, store, rank, size, timeout):
            options = Gloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedLoop
