"""The executed FLOPs that we count are those that PyTorch counts in real training steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import RECURSIONS, RELAXED, VOCAB, random_ids, small_config, training_batch
from torch.utils.flop_counter import FlopCounterMode

from mor_megatron.config.schema import Config
from mor_megatron.model.distillation import Distillation, Mixture
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.accounting import (
    active_fraction,
    adapted_maps,
    dense_equivalent,
    executed_flops_per_token,
    is_reached,
    measured_fractions,
    planned_fractions,
    router_flops_per_token,
    training_flops_per_token,
)
from mor_megatron.planning.teacher import beside
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.trained import choose_trained

MODEL = {"group_query_attention": True, "num_query_groups": 2, "make_vocab_size_divisible_by": VOCAB}
"""No vocabulary padding, which is multiplied and not counted."""


def config_of(name: str, granularity: str | None, freeze: str = "none") -> Config:
    config = small_config(name, **MODEL)
    training = replace(config.training, recompute_granularity=granularity)
    return replace(config, training=training, optimizer=replace(config.optimizer, freeze=freeze))


def norm_products(config: Config, fractions: tuple[float, ...] | None) -> float:
    """FLOPs a token of the gradients of norm weights, which are products with a vector of ones, and not counted.

    They are computed together with those of the norms' inputs, also if the weights are frozen.
    """
    layers = [layer for layer in config.plan.layers if is_reached(config, layer)]
    passes = sum(active_fraction(layer, fractions or planned_fractions(config)) for layer in layers)
    return 2 * config.model.hidden_size * (2 * passes + 1)


def not_repeated(config: Config, fractions: tuple[float, ...] | None) -> float:
    """FLOPs a token of the last product of each layer, if it is an adapter's: recomputation ends once all that the
    backward pass needs is there, and that includes the product's factors but not the product."""
    if config.training.recompute_granularity is None:
        return 0.0
    fractions = fractions or planned_fractions(config)
    last = [use for use in config.plan.shared if "down" in adapted_maps(config, use)]
    return 2 * config.recursion.lora_rank * config.model.hidden_size * sum(fractions[use.recursion] for use in last)


def products_of(counter: FlopCounterMode) -> int:
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def check(config: Config, unneeded: float = 0.0) -> None:
    """Compare a training step's products with those counted.

    Args:
        unneeded: FLOPs a token that are counted and not computed.
    """
    ids, context, model = random_ids(), RoutingContext(), build_model(config)
    choose_trained(model, config)
    with FlopCounterMode(display=False) as counter:
        model(training_batch(ids), context).mean().backward()

    fractions = measured_fractions({k: float(v) for k, v in context.metrics.items()}, config.recursion.num_recursions)
    products = replace(config, data=replace(config.data, seq_length=0))  # kernels of attention are no plain products
    expected = training_flops_per_token(products, fractions).hardware + norm_products(config, fractions)
    expected -= not_repeated(config, fractions) + unneeded
    if config.recursion.router_objective == "aux_router":  # half of the routers send no gradient to their input
        expected -= router_flops_per_token(config, fractions) / 2
    assert products_of(counter) == pytest.approx(ids.numel() * expected, rel=1e-6)


QUICK = ("vanilla", "recursive_sharing", "expert", "expert_sharing_update", "expert_aux_router", "token")
QUICK += ("sequence_relaxed", "token_relaxed")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*RECURSIONS, *RELAXED)]


@pytest.mark.parametrize("granularity", [None, "full"])
@pytest.mark.parametrize("name", NAMES)
def test_matrix_products_of_a_training_step(name: str, granularity: str | None, process_group):
    check(config_of(name, granularity))


FROZEN = [
    ("expert_relaxed", "base", 1),
    ("token_relaxed", "base", 3),
    ("sequence_relaxed", "base", 0),
    ("expert_sharing", "all-but-routers", 1),
]
"""Names, what is frozen, and logits of a token before recursion 0."""


@pytest.mark.parametrize("granularity", [None, pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "freeze", "logits"), FROZEN)
def test_frozen_weights_multiply_less(name: str, freeze: str, logits: int, granularity: str | None, process_group):
    config = config_of(name, granularity, freeze)
    check(config, unneeded=2 * config.model.hidden_size * logits)  # no gradient goes back beyond the first routers
    unrolled = dense_equivalent(config)
    assert training_flops_per_token(unrolled).model == 3 * executed_flops_per_token(unrolled), "trained as a whole"


def test_a_teacher_multiplies_once(process_group):
    """Nothing of it is recomputed."""
    config, ids = config_of("vanilla", "full"), random_ids()
    config = replace(config, training=replace(config.training, loss_chunk_rows=ids.numel() // 2))  # with and without
    model, teacher = build_model(config), small_config("recursive", hidden_size=24, make_vocab_size_divisible_by=VOCAB)
    counts = []
    for model.distillation in (None, Distillation(build_model(teacher).eval(), Mixture(1.0, 0.5))):
        with FlopCounterMode(display=False) as counter:
            model(training_batch(ids)).mean().backward()
        counts.append(products_of(counter))
    products = replace(config, data=replace(config.data, seq_length=0))
    alone, taught = (training_flops_per_token(products, teacher=x) for x in (None, beside(products, teacher)))
    assert counts[1] - counts[0] == ids.numel() * (taught.model - alone.model)
    assert taught.hardware - alone.hardware == taught.model - alone.model > 0
