"""Tensors that a chunk keeps for a later chunk receive their gradient as if both were one graph."""

from __future__ import annotations

import torch

from mor_megatron.pipeline.carry import keep


def test_gradients_come_back_through_the_leaves():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def first(x):
        return x @ weight, (x @ weight).sin(), x * 2

    def second(received, one, two):
        return (received * one + two.square()).sum()

    whole = torch.autograd.grad(second(*first(x)), (x, weight))

    sent, *kept = first(x)
    sent, leaves = keep(sent, kept)
    received = sent.detach().requires_grad_()
    half = second(received, *leaves)
    half.backward()  # the later chunk goes first
    sent.backward(received.grad)
    for got, expected in zip((x.grad, weight.grad), whole, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(leaf.data_ptr() == tensor.data_ptr() for leaf, tensor in zip(leaves, kept, strict=True))


def test_what_is_never_used_gets_no_gradient():
    x = torch.ones(2, requires_grad=True)
    sent, (leaf,) = keep(x * 3, [x * 5])
    sent.backward(torch.ones(2))
    assert leaf.grad is None
    torch.testing.assert_close(x.grad, torch.full((2,), 3.0))


def test_without_gradients_nothing_is_tied():
    with torch.no_grad():
        x = torch.ones(2)
        sent, (leaf,) = keep(x, [x])
    assert sent is x
    assert not leaf.requires_grad
