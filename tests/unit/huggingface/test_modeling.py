"""The exported model computes what the training stack computes, in every kind of model."""

from __future__ import annotations

from dataclasses import make_dataclass

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from pairs import ALL, ROUTED, SEQ, TOLERANCE, VOCAB, exported, pair, random_ids, training_logits

from mor_megatron.data.batch import Batch
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.methods import METHODS
from mor_megatron.recursion.routing import RoutingMethod

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_routing(name: str, implementation: str):
    model, _ = pair(name)
    export = exported(model)  # its own: the pair is other tests' as well
    export.set_attn_implementation(implementation)
    ids = random_ids()
    expected, depths = training_logits(model, ids)
    with torch.no_grad():
        output = export(ids)
    torch.testing.assert_close(output.logits, expected, atol=TOLERANCE, rtol=0)
    if depths is not None:
        assert len(depths.unique()) > 1, "the routers of this case decide nothing"
        assert torch.equal(output.depths.long(), depths.long())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["recursive", "sequence_sharing", "expert", "token"])
def test_fixed_depth(name: str, depth: int):
    model, export = pair(name)
    ids = random_ids()
    expected, _ = training_logits(model, ids, fixed_depth=depth)
    with torch.no_grad():
        output = export(ids, depth=depth)
    torch.testing.assert_close(output.logits, expected, atol=TOLERANCE, rtol=0)
    assert output.depths.unique().tolist() == [depth]


@pytest.mark.parametrize("name", ROUTED)
def test_training_with_labels(name: str):
    """Selection by capacity, cross entropy and router losses, and the gradient of all of it.

    One sequence begins with a run of one token, among which position decides.
    """
    model, export = pair(name)
    ids = random_ids()
    ids[0, : 3 * SEQ // 4] = ids[0, 0]
    model.zero_grad()
    export.zero_grad()
    losses = model.train()(Batch(ids[:, :-1], labels=ids[:, 1:]), RoutingContext())
    losses.mean().backward()  # the router losses have joined the graph
    output = export.train()(ids[:, :-1], labels=ids[:, :-1])
    model.eval(), export.eval()
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(cross_entropy, losses.detach().flatten(), atol=TOLERANCE, rtol=0)
    total = cross_entropy.mean()
    if name != "token_loss_free":
        total = total + output.router_loss
    total.backward()
    mine, theirs = model.embedding.word_embeddings.weight.grad[:VOCAB], export.model.embed_tokens.weight.grad
    torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)
    ours = [p.grad for n, p in model.named_parameters() if n.startswith("router.")]
    for (n, parameter), gradient in zip(export.model.router.named_parameters(), ours, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=TOLERANCE, rtol=1e-4, msg=n)


def test_router_losses_are_a_switch():
    _, export = pair("expert")
    ids = random_ids()
    export.train()
    with_losses = export(ids, labels=ids)
    export.config.router_losses = False
    without = export(ids, labels=ids)
    export.config.router_losses = True
    export.eval()
    assert without.router_loss is None
    torch.testing.assert_close(with_losses.loss, without.loss + with_losses.router_loss)


def test_threshold_trades_depth():
    _, export = pair("expert")
    ids = random_ids()
    with torch.no_grad():
        depths = [export(ids, router_threshold=t).depths.float().mean().item() for t in (0.0, 0.3, 0.7, 1.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 3.0
    assert depths[-1] == 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("expert", {"depth": 4}, "depth=4"),
        ("expert", {"router_threshold": 1.5}, "router_threshold=1.5"),
        ("token", {"router_threshold": 0.4}, "selects by threshold"),
        ("expert", {"position_ids": torch.zeros(1)}, "position_ids is"),
        ("expert", {"output_attentions": True}, "output_attentions is not known"),
        ("expert", {"attention_mask": torch.ones(3, 1, 8, 8)}, "attention_mask is"),
        ("expert", {"attention_mask": torch.zeros(3, 32)}, "no real token"),
    ],
)
def test_nothing_is_silently_ignored(name: str, arguments: dict, message: str):
    _, export = pair(name)
    with pytest.raises(ValueError, match=message):
        export(random_ids(), **arguments)


def test_capacity_is_refused_where_only_a_part_of_the_sequence_is_seen():
    _, export = pair("expert")
    ids = random_ids()
    with torch.no_grad():
        cache = export(ids[:, :20], use_cache=True, selection="capacity").cache
        with pytest.raises(ValueError, match="selection=capacity compares"):
            export(ids[:, 20:], cache=cache, selection="capacity")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_recursions": 3, "num_hidden_layers": 9}, "does not fit"),
        ({"kv_mode": "none"}, "kv_mode=none"),
        ({"routing": "expert_choice"}, "needs num_recursions above 1"),
        ({"routing": "expert_choice", "num_recursions": 3, "router_temperature": 0}, "router_temperature=0 is out of"),
        ({"routing": "token_choice", "num_recursions": 3, "router_gating": "added"}, "router_gating=added is unknown"),
    ],
)
def test_configuration_is_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MoRConfig(**settings)


def test_a_setting_of_a_routing_method_hides_no_other(monkeypatch):
    settings = make_dataclass("Settings", [("depth", int, 1)], frozen=True)
    monkeypatch.setitem(METHODS, "mine", type("Mine", (RoutingMethod,), {"name": "mine", "Settings": settings}))
    with pytest.raises(ValueError, match="routing=mine defines the setting depth, which exists"):
        MoRConfig(routing="mine", num_recursions=3)


def test_every_shared_weight_is_one_parameter():
    _, export = pair("expert")
    names = [name for name, _ in export.named_parameters()]
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    assert len(layers) == 4  # eight positions: two ends and a block of two
    assert isinstance(export, MoRForCausalLM)
    assert export.lm_head.weight is export.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["vanilla", "expert"])
def test_a_device_map_keeps_the_layers_on_one_device(name: str):
    """Also where the first device has room for half of them. Planned for devices that need not be there."""
    _, model = pair(name)
    size = sum(parameter.nbytes for parameter in model.parameters())
    room = {0: size // 2, 1: 3 * size, "cpu": 3 * size}
    plan = infer_auto_device_map(model, max_memory=room, no_split_module_classes=list(model._no_split_modules))
    assert {device for part, device in plan.items() if part in ("", "model") or part.startswith("model.")} == {1}
