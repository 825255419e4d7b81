"""Which versions of transformers run a MoR model, and what they call its cache. Travels with an exported model."""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers.utils import logging

OLDEST, NEWEST = "5.0", "5.24"
"""Tried, both included."""

logger = logging.get_logger(__name__)


def cache_name(version: str) -> str:
    """What `generate` calls the cache: `cache` since 5.24, `past_key_values` before.

    Args:
        version: of transformers. One after `NEWEST` is taken, and told.
    Raises:
        ImportError: it is before `OLDEST`.
    """
    tried = f"MoR models run with transformers {OLDEST} to {NEWEST}, and this is {version}"
    if Version(version) < Version(OLDEST):
        raise ImportError(f"{tried}: pip install transformers=={NEWEST}.*")
    if Version(version).release[:2] > Version(NEWEST).release[:2]:
        logger.warning_once(f"{tried}, which nobody has tried: should it fail, pip install transformers=={NEWEST}.*")
    return "cache" if Version(version).release[:2] >= (5, 24) else "past_key_values"


CACHE = cache_name(transformers.__version__)

__all__ = ["CACHE", "cache_name"]
