"""From a model without sharing to one that shares: which of its layers a shared layer begins with.

The paper's five initialisations (arXiv 2507.10524, sec. 4; docs/mor.md): `average` takes the mean of the layers that
become one; the others pick one layer for each: `stepwise` evenly spaced ones, `lower` the first, `upper` the last,
`random` any, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mor_megatron.recursion.plan import RecursionPlan

if TYPE_CHECKING:
    from torch import Tensor

INITIALIZATIONS = ("average", "stepwise", "lower", "upper", "random")
ADAPTER_STARTS = ("svd", "zero")
"""How adapters of recursions begin: close to what sharing takes (`low_rank.py`), or with B = 0, which adds nothing."""


def source_layers(
    plan: RecursionPlan, num_layers: int, initialization: str, seed: int = 0
) -> dict[int, tuple[int, ...]]:
    """Stored layer of the new model -> layers of the old one whose mean it begins with.

    Args:
        plan: of the new model.
        num_layers: of the old one. If the new one's depth is another, evenly spaced layers stand for its positions.
        initialization: one of INITIALIZATIONS; without sharing they are all the same.
        seed: of `random`.
    Raises:
        ValueError: unknown initialisation, or fewer layers than the plan has unique ones, and one to share.
    """
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"initialization={initialization} is unknown: use one of {', '.join(INITIALIZATIONS)}")
    positions, shared = layers_of_positions(plan, num_layers), plan.shared
    sources = {layer.physical: (positions[layer.index],) for layer in (*plan.first, *plan.last)}
    inner = [positions[layer.index] for layer in shared]
    physical = sorted({layer.physical for layer in shared})
    if initialization == "average":
        for layer, source in zip(shared, inner, strict=True):
            sources[layer.physical] = (*sources.get(layer.physical, ()), source)
        return sources
    count = len(physical)
    if initialization == "stepwise":
        chosen = [inner[i] for i in _spaced(0, len(inner) - 1, count)]
    elif initialization == "random":
        drawn = np.random.default_rng(seed).choice(len(inner), count, replace=False)
        chosen = [inner[i] for i in sorted(drawn.tolist())]
    else:
        chosen = inner[:count] if initialization == "lower" else inner[-count:]
    return sources | {layer: (source,) for layer, source in zip(physical, chosen, strict=True)}


def layers_of_positions(plan: RecursionPlan, num_layers: int) -> tuple[int, ...]:
    """The old layer that stands at each position of the new model.

    Args:
        plan: of the new model.
        num_layers: of the old one; if it is another depth, shared positions take evenly spaced layers.
    Raises:
        ValueError: fewer layers than the plan has unique ones, and one to share.
    """
    before, after = len(plan.first), len(plan.last)
    if num_layers <= before + after:
        raise ValueError(f"a model of {num_layers} layers is too shallow for sharing-strategy={plan.strategy}")
    inner = _spaced(before, num_layers - 1 - after, len(plan.shared))
    return (*range(before), *inner, *range(num_layers - after, num_layers))


def initial_weights(
    sources: dict[int, tuple[int, ...]], layer: Callable[[int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Weights of the new model's layers, by our names.

    Args:
        sources: of `source_layers`.
        layer: number of an old layer -> its weights, by their names within a layer (`mlp.linear_fc1.weight`).
    """
    weights = {}
    for physical, chosen in sources.items():
        parts = [layer(source) for source in chosen]
        for name, first in parts[0].items():
            mean = sum(part[name].float() for part in parts) / len(parts)
            weights[f"layers.{physical}.{name}"] = first if len(parts) == 1 else mean
    return weights


def _spaced(first: int, last: int, count: int) -> list[int]:
    """`count` evenly spaced whole numbers, both ends included."""
    return [round(x) for x in np.linspace(first, last, count).tolist()]
