"""Activation recomputation: bit-identical results, less memory, the same routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import RECURSIONS, RELAXED, random_ids, small_config, training_batch
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.routers import Router

MODES = {
    "selective": {"recompute_granularity": "selective"},
    "layer": {"recompute_granularity": "full", "recompute_unit": "layer"},
    "recursion": {"recompute_granularity": "full", "recompute_unit": "recursion"},
}


def _config(name: str, mode: str | None, bf16: bool = False) -> Config:
    config = small_config(name)
    return replace(config, training=replace(config.training, bf16=bf16, **(MODES[mode] if mode else {})))


class Saved:
    """Bytes that autograd keeps for the backward pass, each storage once; weights and what they share left out."""

    def __init__(self, model: MoRModel):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def _run(config: Config) -> tuple[dict[str, Tensor], int, int]:
    """Losses, metrics and gradients; bytes kept for the backward pass; uses of a router, backward pass included."""
    model = build_model(config)
    uses = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *_: uses.append(1))
    context, saved = RoutingContext(trace={}), Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        losses = model(training_batch(random_ids()), context)
    losses.mean().backward()
    seen = {"losses": losses.detach()} | context.metrics | context.trace
    return seen | {name: p.grad for name, p in model.named_parameters()}, sum(saved.kept.values()), len(uses)


def _same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert torch.equal(got[name], value), f"{name} differs by {(got[name] - value).abs().max():.3g}"


@pytest.fixture(scope="module")
def plain(process_group):
    """The run of a model without recomputation, made once."""
    runs = {}

    def run(name: str, bf16: bool = False):
        if (name, bf16) not in runs:
            runs[name, bf16] = _run(_config(name, None, bf16))
        return runs[name, bf16]

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*RECURSIONS, *RELAXED])
def test_same_bits_less_memory_same_routing(plain, name, mode):
    expected, bytes_kept, router_uses = plain(name)
    got, fewer, again = _run(_config(name, mode))
    _same_bits(got, expected)
    assert fewer < bytes_kept
    assert again == router_uses, "a router ran again in the backward pass"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["expert_sharing", "token"])
def test_bf16(plain, name, mode):
    expected, bytes_kept, _ = plain(name, bf16=True)
    got, fewer, _ = _run(_config(name, mode, bf16=True))
    _same_bits(got, expected)
    assert fewer < bytes_kept


@pytest.mark.parametrize("name", ["recursive", "expert", "expert_sharing"])
def test_the_larger_the_unit_the_less_is_kept(plain, name):
    kept = [plain(name)[1], *(_run(_config(name, mode))[1] for mode in ("selective", "layer", "recursion"))]
    assert kept == sorted(set(kept), reverse=True), kept


def test_nothing_is_recomputed_without_gradients(process_group, monkeypatch):
    """Evaluation keeps nothing, so that there is nothing to forget."""
    monkeypatch.setattr("mor_megatron.model.recompute.checkpoint", None)
    model = build_model(_config("expert", "layer"))
    with torch.no_grad():
        assert model(training_batch(random_ids())).isfinite().all()
