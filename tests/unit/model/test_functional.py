"""The hand-written backward passes equal autograd of the plain formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mor_megatron.model.functional import RMSNormFunction, RotateFunction, SplitRotateFunction, SwiGLUFunction

FP32_TOL = 2e-6  # one layer, other order of the same fp32 operations


def _compare(function, plain, *inputs):
    for f in (function, plain):
        assert all(x.grad is None for x in inputs)
        out = f(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in out).backward()
        grads = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        if f is function:
            ours, our_grads = out, grads
    for a, b in zip((*ours, *our_grads), (*out, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=FP32_TOL, atol=FP32_TOL)


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def test_rms_norm():
    def plain(x, weight):
        return F.rms_norm(x, (16,), weight, 1e-5)

    _compare(lambda x, weight: RMSNormFunction.apply(x, weight, 1e-5), plain, _random(5, 3, 16), _random(16))


def test_swiglu():
    def plain(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    _compare(SwiGLUFunction.apply, plain, _random(5, 3, 16))


def _plain_rotate(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def test_rotate():
    angle = _random(5, 1, 1, 4).detach()
    cos, sin = angle.cos(), angle.sin()
    _compare(lambda x: RotateFunction.apply(x, cos, sin), lambda x: _plain_rotate(x, cos, sin), _random(5, 3, 2, 8))


def test_split_rotate():
    angle = _random(5, 3, 1, 1, 4).detach()
    cos, sin = angle.cos(), angle.sin()

    def plain(mixed):
        rotated = _plain_rotate(mixed[..., :-1, :], cos, sin)
        return rotated[..., :-1, :].reshape(5, 3, -1, 8), rotated[..., -1, :], mixed[..., -1, :]

    _compare(lambda mixed: SplitRotateFunction.apply(mixed, cos, sin), plain, _random(5, 3, 2, 4, 8))


def test_rms_norm_in_bf16_keeps_fp32_statistics():
    x = _random(64, 512).detach().bfloat16()
    weight = torch.ones(512, dtype=torch.bfloat16)
    expected = F.rms_norm(x.float(), (512,), eps=1e-5)
    # One bf16 rounding of the result: half a unit in the last of 8 bits.
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5).float(), expected, rtol=2**-8, atol=0)
