"""fp32 gradients of a bf16 run lie in memory once, during the backward pass and the reduction as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from test_train_step import cut, global_batch, make_config, make_engine

from mor_megatron.config.validate import validate
from mor_megatron.model.products import add_product
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.modes import uses

pytestmark = pytest.mark.usefixtures("process_group")

LEAST = 64 * 64
"""Elements of the smallest matrix of the model; no fp32 activation has as many."""


def gradients() -> LiveBytes:
    """Counts fp32 tensors of gradient size."""
    return LiveBytes(only=lambda tensor: tensor.dtype == torch.float32 and tensor.numel() >= LEAST)


def bf16_engine(zero: int):
    config = make_config((True, zero), micro_batch_size=1)
    model = replace(config.model, hidden_size=64, kv_channels=32, ffn_hidden_size=96)
    return make_engine(validate(replace(config, model=model)))


@pytest.mark.parametrize("zero", [0, 1])
def test_a_tied_block_has_one_buffer_of_gradients(zero):
    """A sum over recursions would be a second one. Where the buffer is there before the first contribution, those of
    linear layers are added as they are, and only the embedding's is cast before."""
    engine = bf16_engine(zero)
    with gradients() as live:
        for batch in cut(global_batch(), 1):
            engine.module(batch, RoutingContext()).sum().backward()
    sizes = [4 * weight.numel() for weight in engine.module.parameters() if weight.numel() >= LEAST]
    beside = 4 * engine.module.embedding.word_embeddings.weight.numel() if zero == 1 else max(sizes)
    assert sum(sizes) <= live.peak <= 1.01 * (sum(sizes) + beside)


def test_gradients_are_reduced_where_they_are():
    engine = bf16_engine(zero=1)
    flat = engine.flat_gradients()[0]
    with gradients() as live:
        engine.reduce()
    assert live.peak == flat.untyped_storage().nbytes()


def test_products_that_add_to_the_sums_give_the_same(monkeypatch):
    """As on CUDA; on a CPU, a product is rounded to bf16 and added, which is what autograd does with it."""
    added = []

    def add(total, a, b):
        added.append(total.shape)
        add_product(total, a, b)

    monkeypatch.setattr(uses, "add_product", add)
    found = []
    for products_add in (False, True):
        monkeypatch.setattr(uses, "_products_add", lambda products_add=products_add: products_add)
        engine = bf16_engine(zero=1)
        for batch in cut(global_batch(), 1):
            engine.module(batch, RoutingContext()).sum().backward()
        found.append([gradient.clone() for gradient in engine.flat_gradients()])
        assert bool(added) == products_add
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
