"""Bytes of live tensors while a block runs, and their peak.

Counted are storages that operators return, each once, from when an operator returns it until it is freed; what exists
before is counted by `start`. That is what a GPU's allocator would hand out, without its rounding and fragments, and
without the workspace inside an operator. Resident memory would add the process, its libraries and what the allocator of
the C library keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside `with`, follows every storage. `live` are the bytes now, `peak` their largest sum so far.

    Args:
        start: tensors that exist already and belong to the count.
        only: which of those that operators return are counted; default all.
    """

    def __init__(self, start: Iterable[Tensor] = (), only: Callable[[Tensor], bool] = lambda tensor: True):
        super().__init__()
        self.only = only
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in start:
            self._add(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and self.only(leaf):
                self._add(leaf)
        return result

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        grown = size - self._sizes.get(key, 0)
        if grown == 0:
            return
        if key not in self._sizes:
            weakref.finalize(storage, self._free, key).atexit = False
        self._sizes[key] = size
        self.live += grown
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
