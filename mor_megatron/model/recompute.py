"""Activation recomputation: forget what a region computed, and compute it again in the backward pass.

Routing is decided outside of every region: a second top-k on recomputed logits could pick other tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recompute(region: Callable, *args):
    """region(*args), whose intermediate results are not kept.

    Non-reentrant: a block used several times and ZeRO 2 and 3 need it. There is no dropout, hence no random state to
    restore.
    """
    if not torch.is_grad_enabled():
        return region(*args)
    return checkpoint(region, *args, use_reentrant=False, preserve_rng_state=False)
