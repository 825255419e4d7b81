"""The element-wise parts of a layer and of a recursion: what each computes, and what computes it on which device.

The definitions here are plain PyTorch. `functional` computes the same with hand-written backward passes, on the CPU;
`fused` with one Triton kernel each way, on CUDA. All are equal but for rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.distributed.gpu import LIBRARIES, check_gpu
from mor_megatron.model import functional

Result = TypeVar("Result")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim; statistics in fp32, rounded before the weight, as LLaMA does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, x.shape[-1:], None, eps).to(x.dtype) * weight


def add_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A step of the residual stream and what the next part of the layer reads: x + update, or x, and its `rms_norm`."""
    total = x if update is None else x + update
    return total, rms_norm(total, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of [.., 2F] = (gate, up)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the rotate-half layout: x [R, C, N, D]; cos, sin [R, C or 1, 1, D/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def split_rotate(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed qkv -> rotated q, rotated k, v.

    Args:
        mixed: [R, C, G, n + 2, D]: for each of G key/value groups its n query heads, then k, then v (Megatron-LM's
            order).
        cos, sin: [R, C or 1, 1, 1, D/2].
    Returns:
        q [R, C, G*n, D], k and v [R, C, G, D].
    """
    rotated = rotate(mixed[..., :-1, :], cos, sin)
    return rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], mixed[..., -1, :]


def add_rows(base: Tensor, update: Tensor, gate: Tensor | None, index: Tensor | None) -> Tensor:
    """base with gate * update added at `index`: how the rows of a recursion come back into the residual stream.

    Args:
        base: [n, H].
        update: [m, H].
        gate: [m, 1]; None: 1.
        index: [m], each place at most once; None: all n.
    """
    change = update if gate is None else gate * update
    return base + change if index is None else base.index_add(0, index, change)


class Elementwise(NamedTuple):
    """One implementation of all of them."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    split_rotate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    add_rows: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


PLAIN = Elementwise(rms_norm, add_norm, swiglu, rotate, split_rotate, add_rows)
HAND_WRITTEN = Elementwise(*(getattr(functional, name) for name in Elementwise._fields))


@cache
def implementation(device_type: str) -> Elementwise:
    """What a device of this type runs: Triton's kernels on CUDA where they work, else the hand-written passes."""
    if device_type != "cuda":
        return HAND_WRITTEN

    def load() -> Elementwise:
        from mor_megatron.model import fused

        fused.swiglu(torch.ones(1, 2, device=device_type))  # a compiler may be missing
        return Elementwise(*(getattr(fused, name) for name in Elementwise._fields))

    return tried(load, "element-wise work is not fused") or HAND_WRITTEN


def tried(load: Callable[[], Result], otherwise: str) -> Result | None:
    """What `load` gives, which runs a kernel; or None, and a warning of what follows and why.

    Raises:
        ValueError: the kernel has crashed the GPU.
    """
    result = None
    try:
        result = load()
    except Exception as error:  # a library, a compiler, a driver: each has its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logging.getLogger(__name__).warning("%s: %s", otherwise, reason)
    check_gpu(f"the kernel without which {otherwise}", LIBRARIES)
    return result
