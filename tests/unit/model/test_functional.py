"""The hand-written backward passes equal autograd of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mor_megatron.model.elementwise import HAND_WRITTEN, PLAIN
from mor_megatron.model.functional import RMSNormFunction

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


def _angles(*shape):
    angle = _random(*shape).detach()
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    ("name", "inputs", "constants"),
    [
        ("rms_norm", (_random(5, 3, 16), _random(16)), (1e-5,)),
        ("add_norm", (_random(5, 3, 16), _random(5, 3, 16), _random(16)), (1e-5,)),
        ("swiglu", (_random(5, 3, 16),), ()),
        ("rotate", (_random(5, 3, 2, 8),), _angles(5, 1, 1, 4)),
        ("split_rotate", (_random(5, 3, 2, 4, 8),), _angles(5, 3, 1, 1, 4)),
        ("add_rows", (_random(7, 16), _random(2, 16), _random(2, 1)), (torch.tensor([5, 2]),)),
        ("add_rows", (_random(7, 16), _random(2, 16)), (None, torch.tensor([5, 2]))),
        ("add_rows", (_random(7, 16), _random(7, 16), _random(7, 1)), (None,)),
    ],
)
def test_equals_its_definition(name, inputs, constants):
    function, plain = getattr(HAND_WRITTEN, name), getattr(PLAIN, name)
    _compare(lambda *x: function(*x, *constants), lambda *x: plain(*x, *constants), *inputs)


def test_rms_norm_in_bf16_keeps_fp32_statistics():
    x = _random(64, 512).detach().bfloat16()
    weight = torch.ones(512, dtype=torch.bfloat16)
    expected = F.rms_norm(x.float(), (512,), eps=1e-5)
    # One bf16 rounding of the result: half a unit in the last of 8 bits.
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5).float(), expected, rtol=2**-8, atol=0)
