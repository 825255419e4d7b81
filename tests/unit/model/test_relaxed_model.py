"""A relaxed model is the unrelaxed one at first, and the unrolled one with the sums W + s B A always."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import RELAXED, random_ids, small_config, small_model, training_batch, weights_in_their_modules
from torch import Tensor

from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.huggingface.weights import fuse
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.planning.accounting import dense_equivalent
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.engine import build_engine
from mor_megatron.training.optimizer import parameter_groups

pytestmark = pytest.mark.usefixtures("process_group")

GROUPS = {"group_query_attention": True, "num_query_groups": 2, "add_qkv_bias": True}
PARTS = {"linear_qkv": "qkv", "linear_proj": "o", "linear_fc1": ("gate", "up"), "linear_fc2": ("down",)}


def relaxed_model(name: str, bf16: bool = False, **model) -> MoRModel:
    """With what starts at 0 or 1 at random values."""
    config, generator = small_config(name, **model), torch.Generator().manual_seed(1)
    relaxed = build_model(replace(config, training=replace(config.training, bf16=bf16)))
    for parameter in relaxed.parameters():
        if getattr(parameter, "keeps_initial", False):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return relaxed


def unrelaxed(model: MoRModel) -> MoRModel:
    recursion = replace(
        model.run_config.recursion, relaxation="none", recursion_norms=False, recursion_embedding=False, lora_alpha=None
    )
    return build_model(validate(replace(model.run_config, recursion=recursion)))


@pytest.mark.parametrize("name", RELAXED)
def test_at_first_it_is_the_unrelaxed_model(name):
    relaxed, batch = small_model(name), training_batch(random_ids())
    plain = unrelaxed(relaxed)
    assert torch.equal(relaxed(batch, RoutingContext()), plain(batch, RoutingContext()))
    parameters = dict(relaxed.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in plain.named_parameters() if value.ndim > 1)
    factors = {key: value for key, value in parameters.items() if key.endswith("_a")}
    assert factors
    assert all(value.std() > 0.05 for value in factors.values())
    assert len({value.flatten()[0].item() for value in factors.values()}) == len(factors), "seeds are by name"


@pytest.mark.parametrize("name", RELAXED)
def test_every_factor_is_used_through_its_module(name):
    model, ids = relaxed_model(name, untie_embeddings_and_output_weights=True), random_ids()
    with torch.no_grad():
        expected = model(Batch(ids), RoutingContext())
        with weights_in_their_modules(model):
            assert torch.equal(model(Batch(ids), RoutingContext()), expected)


def unrolled(model: MoRModel) -> dict[str, Tensor]:
    """Weights of a model of as many layers as there are uses, each with the sum that its use multiplies by."""
    known, shape = dict(model.named_parameters()), model.run_config.model
    weights = {name: value for name, value in known.items() if not name.startswith("layers.")}
    for use in model.plan.layers:
        prefix = f"layers.{use.physical}."
        for name in [name for name in known if name.startswith(prefix) and ".adapters." not in name]:
            weight = known[name]
            module, _, kind = name.rpartition(".")
            if "layernorm" in name and weight.ndim == 2:
                weight = weight[use.recursion]
            adapters = model.get_submodule(module).adapters if ".linear_" in name and kind == "weight" else None
            if adapters is not None:
                parts = PARTS[module.rpartition(".")[2]]
                updates = [_update(adapters, part, use.recursion, weight) for part in parts]
                widths = [shape.num_attention_heads, shape.key_value_heads, shape.key_value_heads]
                for i, update in enumerate(updates):
                    if update is None:
                        updates[i] = weight.new_zeros(widths[i] * shape.kv_channels, weight.shape[1])
                weight = weight + fuse(name, updates, shape)
            weights[f"layers.{use.index}.{name.removeprefix(prefix)}"] = weight
    return weights


def _update(adapters, part: str, recursion: int, weight: Tensor) -> Tensor | None:
    used = adapters.recursions[part]
    if recursion not in used:
        return None
    a, b = (factor[recursion - used.start] for factor in adapters.factors(part))
    return adapters.scale * b.t() @ a


@pytest.mark.parametrize("shape", [{}, GROUPS], ids=["heads", "groups"])
@pytest.mark.parametrize("name", ["recursive_relaxed", "sequence_relaxed"])
def test_it_computes_as_the_unrolled_model_does(name, shape):
    """Losses, and the gradient of every weight and factor, by the chain rule through the sums."""
    model, batch = relaxed_model(name, **shape), training_batch(random_ids())
    dense = build_model(validate(dense_equivalent(model.run_config)))
    if model.plan.kv_mode == "sharing":
        _share_keys(dense, model)
    expected = torch.func.functional_call(dense, unrolled(model), (batch,))
    gradients = dict(zip(_names(model), torch.autograd.grad(expected.mean(), [*model.parameters()]), strict=True))
    losses = model(batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    for key, parameter in model.named_parameters():
        scale = gradients[key].abs().max()
        assert scale > 0, key
        torch.testing.assert_close(parameter.grad / scale, gradients[key] / scale, rtol=0, atol=2e-5, msg=key)


def _names(model: MoRModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _share_keys(dense: MoRModel, model: MoRModel) -> None:
    """Let the layers of the dense model attend to the keys that the plan of the other one names."""
    dense.plan = replace(dense.plan, layers=tuple(replace(use, physical=use.index) for use in model.plan.layers))
    dense.plan = replace(dense.plan, kv_mode="sharing", num_recursions=model.plan.num_recursions)
    dense.router.plan = dense.plan


def test_a_recursion_opens_with_its_vector():
    model = small_model("expert_relaxed")
    plain, vectors = unrelaxed(model), model.recursion_embedding.weight
    torch.nn.init.normal_(vectors)
    opened = iter(vectors)
    plain.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] + next(opened), *args[1:]))
    batch = training_batch(random_ids())
    assert torch.equal(model(batch, RoutingContext()), plain(batch, RoutingContext()))


def test_norms_are_not_decayed():
    undecayed = [group for group in parameter_groups(small_model("expert_relaxed"), 0.1) if not group["weight_decay"]]
    shapes = sorted(tuple(parameter.shape) for group in undecayed for parameter in group["params"])
    assert shapes == sorted([(3, 32)] * 4 + [(32,)] * 5)


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_bf16_gradients_are_summed_in_fp32(zero):
    """Over micro-batches; a recursion has its own place in the sum."""
    model, plain = relaxed_model("recursive_relaxed", bf16=True), relaxed_model("recursive_relaxed", bf16=True)
    config = replace(model.run_config, training=replace(model.run_config.training, zero_stage=zero))
    engine, batches = build_engine(model, validate(config)), [training_batch(random_ids(seed=i)) for i in range(6)]
    for batch in batches:
        engine.module(batch).mean().backward()
    own = dict(engine.gradients())
    parts = [torch.autograd.grad(plain(batch).mean(), [*plain.parameters()]) for batch in batches]
    for (name, parameter), *each in zip(model.named_parameters(), *parts, strict=True):
        if ".adapters." in name:
            got, exact = own[parameter].view_as(parameter), torch.stack(each).double().sum(0)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item(), msg=name)
