"""The state of the global random generators as JSON.

All ranks are seeded alike and there is no dropout, so one state, rank 0's, is every rank's. Nothing in training draws
from it (weights and the order of samples are functions of the seed); it is kept for code of users that
does, such as a routing method with noise.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Of python, numpy and torch."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned, before or after a trip through JSON.

    Raises:
        ValueError: it is no such state.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(torch.tensor(list(base64.b64decode(state["torch"], validate=True)), dtype=torch.uint8))
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the random state cannot be restored ({error})") from error
