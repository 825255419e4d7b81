"""Simulates a full disk."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def room_for(size: int):
    """Files cannot grow beyond `size` bytes: write(2) fails as on a full disk, with another number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
