"""Products of 16-bit matrices that add to an fp32 sum: gradients of weights over many uses, micro-batches or chunks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mor_megatron.model.elementwise import tried


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is fp32 and a and b may have 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and adds_in_fp32():
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(a @ b)


@cache
def adds_in_fp32() -> bool:
    """Whether CUDA's product of 16-bit matrices adds to an fp32 one: a pass less, and nothing is rounded."""

    def add() -> bool:
        a, total = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda"), torch.ones(16, 16, device="cuda")
        return bool((torch.ops.aten.addmm.dtype_out(total, a, a, total.dtype, out=total) == 17.0).all())

    return bool(tried(add, "gradients of weights are rounded to 16 bits before they are added"))
