"""The element-wise parts of a layer with hand-written backwards: RMSNorm, SwiGLU, rotation of q and k.

Autograd's composites of these spend as much memory traffic as the matrix products on a CPU and keep intermediates;
written out, each keeps its input only and makes the fewest passes. Formulas: docs/mor.md, sec. 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.recursion.dispatch import AddRows


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight over the last dim; statistics in fp32, cast back before the weight (as LLaMA does)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(width).add_(eps).rsqrt_()  # [.., 1] fp32
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        product = (grad.float() * x).view(-1, width)  # [n, H] fp32
        flat_rstd = rstd.view(-1, 1)
        grad_weight = (flat_rstd.t() @ product).view(-1).to(weight.dtype)
        along = torch.mv(product, weight.float()).view_as(rstd) * rstd.pow(3).div_(width)
        grad_x = (grad * weight).float().mul_(rstd)
        grad_x.addcmul_(x, along, value=-1)
        return grad_x.to(x.dtype), grad_weight, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up of [.., 2F] = (gate, up); keeps only its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        scratch = grad * up
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=scratch)
        torch.mul(grad, scratch, out=grad_up)
        return grad_x


class SplitRotateFunction(torch.autograd.Function):
    """Mixed qkv -> rotated q, rotated k, v (RoPE in the rotate-half layout).

    mixed [R, C, G, n + 2, D]: for each of G key/value groups its n query heads, then k, then v (Megatron-LM's order);
    cos, sin [R, C or 1, 1, 1, D/2]. Gives q [R, C, G*n, D], k and v [R, C, G, D], contiguous.
    """

    @staticmethod
    def forward(ctx, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rows, columns, groups, heads, width = mixed.shape
        q = mixed.new_empty(rows, columns, groups, heads - 2, width)
        k = mixed.new_empty(rows, columns, groups, 1, width)
        _rotate(mixed[..., :-2, :], cos, sin, q)
        _rotate(mixed[..., -2:-1, :], cos, sin, k)
        v = mixed[..., -1, :].contiguous()
        return q.view(rows, columns, -1, width), k.squeeze(3), v

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        cos, sin = ctx.saved_tensors
        rows, columns, groups, width = grad_k.shape
        grad_q = grad_q.reshape(rows, columns, groups, -1, width)
        grad = grad_q.new_empty(rows, columns, groups, grad_q.shape[3] + 2, width)
        # The inverse of a rotation is the rotation by the negative angle.
        _rotate(grad_q, cos, -sin, grad[..., :-2, :])
        _rotate(grad_k.unsqueeze(3), cos, -sin, grad[..., -2:-1, :])
        grad[..., -1, :] = grad_v
        return grad, None, None


class RotateFunction(torch.autograd.Function):
    """RoPE on x [R, C, N, D] alone; cos, sin [R, C or 1, 1, D/2]."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, torch.empty_like(grad, memory_format=torch.contiguous_format)), None, None


class PrefixesFunction(torch.autograd.Function):
    """x[:n] for several n. Backward adds all gradients into one buffer, where slicing would fill one for each."""

    @staticmethod
    def forward(ctx, x: Tensor, *lengths: int) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return tuple(x[:length] for length in lengths)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].new_zeros(ctx.shape)
        for grad in grads:
            total[: len(grad)].add_(grad)
        return total, *(None for _ in grads)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """out = (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of the last dim."""
    x1, x2 = x.chunk(2, dim=-1)
    out1, out2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    return out


def add_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, or x, and its norm."""
    total = x if update is None else x + update
    return total, RMSNormFunction.apply(total, weight, eps)


rms_norm = RMSNormFunction.apply
swiglu = SwiGLUFunction.apply
rotate = RotateFunction.apply
split_rotate = SplitRotateFunction.apply
add_rows = AddRows.apply
