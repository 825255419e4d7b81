"""Which parts have adapters at which recursions, their products, and the settings that are refused."""

from __future__ import annotations

import pytest
import torch

from mor_megatron.recursion.plan import build_plan
from mor_megatron.recursion.relaxation import (
    Adapters,
    RecursionEmbedding,
    RelaxationSettings,
    adapted,
    resolve_relaxation,
)

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
LATER = {"lora_targets": "attention", "lora_recursions": "all_but_first"}


def settings(**changes) -> RelaxationSettings:
    return resolve_relaxation(
        RelaxationSettings(**({"relaxation": "lora", "lora_rank": 3} | changes)), build_plan(8, 3)
    )


@pytest.mark.parametrize(
    ("changes", "kv_mode", "expected"),
    [
        ({"relaxation": "none"}, "caching", {}),
        ({}, "caching", dict.fromkeys((*ATTENTION, *MLP), range(3))),
        ({}, "sharing_update", dict.fromkeys((*ATTENTION, *MLP), range(3))),
        ({"lora_targets": "mlp"}, "sharing", dict.fromkeys(MLP, range(3))),
        ({"lora_targets": "attention"}, "sharing", {"q": range(3), "k": range(1), "v": range(1), "o": range(3)}),
        (
            {"lora_targets": "attention", "lora_recursions": "all_but_first"},
            "sharing",
            dict.fromkeys("qo", range(1, 3)),
        ),
    ],
    ids=["none", "all", "sharing_update", "mlp", "sharing", "sharing_all_but_first"],
)
def test_adapted(changes, kv_mode, expected):
    assert adapted(settings(**changes), build_plan(8, 3, kv_mode=kv_mode)) == expected


def adapters(**changes) -> Adapters:
    """Of q, wider than k, which has none at the last recursion; with random factors."""
    torch.manual_seed(0)
    found = Adapters(settings(**changes), {"q": range(1, 4), "k": range(1, 3), "o": range(4)}, 8, {"q": 12, "k": 6})
    for factor in found.parameters():
        torch.nn.init.normal_(factor)
    return found


def test_an_update_is_the_product_of_its_factors():
    module, rows = adapters(lora_alpha=1.5), torch.randn(5, 2, 8)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "q_a": (3, 3, 8),
        "q_b": (3, 3, 12),
        "k_a": (2, 3, 8),
        "k_b": (2, 3, 6),
    }
    updates = module(rows, 2)
    for part in ("q", "k"):
        a, b = (factor[1] for factor in module.factors(part))  # recursion 2 is the second that has them
        torch.testing.assert_close(updates[part], rows @ (0.5 * b.t() @ a).t())
    assert [tuple(module(rows, r)) for r in range(4)] == [(), ("q", "k"), ("q", "k"), ("q",)]
    assert module(rows, None) == {}


def test_rows_of_several_recursions_take_one_product_with_the_same_result():
    module, rows = adapters(), torch.randn(9, 8)
    recursion = torch.arange(9) % 4
    updates = module(rows, recursion)
    for r in range(4):
        alone = module(rows[recursion == r], r)
        for part, update in updates.items():
            own = alone.get(part, torch.zeros_like(update[recursion == r]))
            torch.testing.assert_close(update[recursion == r], own)


def test_the_gradient_of_a_recursion_is_its_own():
    module, rows = adapters(), torch.randn(5, 8)
    module(rows, 1)["q"].square().sum().backward()
    for factor in module.factors("q"):
        assert [bool(gradient.any()) for gradient in factor.grad] == [True, False, False]
    assert module.k_a.grad is None or not module.k_a.grad.any()


def test_a_recursion_opens_with_its_vector():
    embedding, rows = RecursionEmbedding(3, 4), torch.randn(6, 4)
    assert torch.equal(embedding(rows, 1), rows)
    torch.nn.init.normal_(embedding.weight)
    each = torch.tensor([0, 1, 2, 2, 1, 0])
    assert torch.equal(embedding(rows, 1), rows + embedding.weight[1])
    assert torch.equal(embedding(rows, each), rows + torch.stack([embedding.weight[r] for r in each]))


def test_alpha_is_the_rank_unless_it_is_given():
    assert settings().lora_alpha == 3.0
    assert settings(lora_alpha=1.5).lora_alpha == 1.5
    assert settings(relaxation="none").lora_alpha is None


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({"relaxation": "lora"}, build_plan(8, 1), "relaxation=lora .* give --num-recursions 2"),
        ({"recursion_norms": True}, build_plan(8, 1), "recursion-norms=True .* give --num-recursions 2"),
        ({"recursion_embedding": True}, build_plan(8, 1), "recursion-embedding=True .* give --num-recursions 2"),
        ({"recursion_embedding": True}, build_plan(8, 3, "middle_sequence"), "use cycle or middle_cycle"),
    ],
    ids=["lora", "norms", "embedding", "sequence"],
)
def test_refused(changes, plan, message):
    with pytest.raises(ValueError, match=message):
        resolve_relaxation(RelaxationSettings(**changes), plan)
