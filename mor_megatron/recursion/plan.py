"""The recursion plan: which physical layer runs at each virtual position, at which recursion, for how many tokens.

Model, parameter count, FLOPs count, pipeline split and export read this one frozen object; none of them works it out
again. `pretrain_mor.py --dry-run` prints a run's plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

SharingStrategy = Callable[[int, int], list[tuple[int, int | None]]]
"""(depth, Nr) -> for each virtual layer, in the order of execution, its physical layer and its recursion, 0 to Nr-1.

Physical layers are numbered from 0 in the order of first use. A unique layer has recursion None, and comes before or
after all shared ones. The list is empty if the depth does not fit. `build_plan` refuses what breaks a rule."""

STRATEGIES: dict[str, SharingStrategy] = {}
"""Every sharing strategy, by the name that users write."""

KV_MODES = ("caching", "sharing", "sharing_update")


def sharing_strategy(function: SharingStrategy) -> SharingStrategy:
    """Register a sharing strategy under the function's name."""
    STRATEGIES[function.__name__] = function
    return function


@sharing_strategy
def cycle(depth: int, num_recursions: int) -> list[tuple[int, int | None]]:
    """The block is repeated: A B C, A B C (MoR paper, table 1)."""
    block, rest = divmod(depth, num_recursions)
    return [] if rest else [(slot, r) for r in range(num_recursions) for slot in range(block)]


@sharing_strategy
def sequence(depth: int, num_recursions: int) -> list[tuple[int, int | None]]:
    """Each layer is repeated: A A, B B, C C (MoR paper, table 1)."""
    block, rest = divmod(depth, num_recursions)
    return [] if rest else [(slot, r) for slot in range(block) for r in range(num_recursions)]


@sharing_strategy
def middle_cycle(depth: int, num_recursions: int) -> list[tuple[int, int | None]]:
    """`cycle` between a unique first and a unique last layer."""
    return _between_unique_layers(cycle, depth, num_recursions)


@sharing_strategy
def middle_sequence(depth: int, num_recursions: int) -> list[tuple[int, int | None]]:
    """`sequence` between a unique first and a unique last layer."""
    return _between_unique_layers(sequence, depth, num_recursions)


def _between_unique_layers(inner: SharingStrategy, depth: int, num_recursions: int) -> list[tuple[int, int | None]]:
    if num_recursions == 1:  # nothing is shared, and every layer is unique
        return inner(depth, 1)
    shared = inner(max(depth - 2, 0), num_recursions)
    if not shared:
        return []
    last = 2 + max(slot for slot, _ in shared)
    return [(0, None), *((1 + slot, r) for slot, r in shared), (last, None)]


@dataclass(frozen=True)
class VirtualLayer:
    """One position of the unrolled network."""

    index: int
    """Virtual position, 0..L-1; also the layer number in the order of execution."""
    physical: int
    """Unique layer that runs here, numbered in the order of first use."""
    recursion: int | None
    """Recursion it belongs to; None for a unique layer before or after the shared ones."""
    kv_source: int
    """Virtual layer whose keys and values are attended to; itself unless kv_mode shares those of recursion 0."""


@dataclass(frozen=True)
class RecursionPlan:
    """The whole unrolled network; build it with `build_plan`."""

    strategy: str
    num_recursions: int
    kv_mode: str
    capacities: tuple[float, ...]
    """Fraction of tokens at each recursion, non-increasing; all 1 unless the routing method sets capacities."""
    layers: tuple[VirtualLayer, ...]

    @property
    def num_layers(self) -> int:
        """Unrolled depth L."""
        return len(self.layers)

    @cached_property
    def num_physical_layers(self) -> int:
        """Unique layers."""
        return 1 + max(layer.physical for layer in self.layers)

    @cached_property
    def block_size(self) -> int:
        """K: unique layers inside the shared block."""
        return len({layer.physical for layer in self.shared})

    @cached_property
    def shared(self) -> tuple[VirtualLayer, ...]:
        """Virtual layers of the shared part, in the order of execution."""
        return tuple(layer for layer in self.layers if layer.recursion is not None)

    @cached_property
    def first(self) -> tuple[VirtualLayer, ...]:
        """Unique layers before the shared part: one for middle_*, none for cycle and sequence."""
        return self.layers[: self.shared[0].index]

    @cached_property
    def last(self) -> tuple[VirtualLayer, ...]:
        """Unique layers after the shared part: one for middle_*, none for cycle and sequence."""
        return self.layers[self.shared[-1].index + 1 :]

    @cached_property
    def is_cyclic(self) -> bool:
        """Whether each recursion runs the same layers as the one before, and ends before the next one begins.

        Only then can tokens be routed to a recursion, and the pipeline be a ring."""
        passes = [[layer.physical for layer in self.pass_layers(r)] for r in range(self.num_recursions)]
        order = [layer.recursion for layer in self.shared]
        return order == sorted(order) and all(layers == passes[0] for layers in passes)

    @cached_property
    def fits_pipeline(self) -> bool:
        """Whether ranks that hold consecutive physical layers can run a pass one after the other: no layer of it runs
        after one of a higher number. A pass is a recursion if the plan is cyclic, otherwise the whole shared part."""
        passes = self._passes if self.is_cyclic else (self.shared,)
        return all(a.physical <= b.physical for layers in passes for a, b in pairwise(layers))

    def pass_layers(self, recursion: int) -> tuple[VirtualLayer, ...]:
        """Virtual layers of one recursion, in the order of execution."""
        return self._passes[recursion]

    @cached_property
    def _passes(self) -> tuple[tuple[VirtualLayer, ...], ...]:
        return tuple(tuple(x for x in self.layers if x.recursion == r) for r in range(self.num_recursions))

    @cached_property
    def openings(self) -> frozenset[VirtualLayer]:
        """The first layer of each recursion."""
        return frozenset(layers[0] for layers in self._passes)

    def capacity(self, layer: VirtualLayer) -> float:
        """Fraction of tokens that a virtual layer processes."""
        return 1.0 if layer.recursion is None else self.capacities[layer.recursion]

    def table(self) -> str:
        """The plan as text: one line a virtual layer."""
        rows = [("virtual", "physical", "recursion", "capacity", "keys/values of")]
        for layer in self.layers:
            source = "itself" if layer.kv_source == layer.index else f"virtual {layer.kv_source}"
            if layer.kv_source != layer.index and self.kv_mode == "sharing_update":
                source += ", active rows replaced"
            recursion = "-" if layer.recursion is None else str(layer.recursion)
            rows.append((str(layer.index), str(layer.physical), recursion, f"{self.capacity(layer):.4g}", source))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        head = (
            f"{self.strategy}, Nr={self.num_recursions}: {self.num_layers} virtual layers on "
            f"{self.num_physical_layers} unique ones (block of {self.block_size})"
        )
        return "\n".join([head, *lines])


def effective_depth(num_layers: int, num_recursions: int, strategy: str, rounding: str = "error") -> int:
    """Unrolled depth that the sharing strategy can divide among the recursions.

    Args:
        num_layers: wanted unrolled depth L.
        num_recursions: Nr.
        strategy: name of a sharing strategy; middle_* leaves two layers out of the division.
        rounding: `error`, `down` (what the authors' code builds) or `up` (what their FLOP budgets assume for Nr=4).
    Returns:
        The depth to build.
    Raises:
        ValueError: the strategy is unknown, too few layers are left, or the depth does not fit and rounding is `error`.
    """
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise ValueError(
            f"sharing-strategy={strategy} is unknown: use one of {known}, or load the extension that defines it"
        )
    if num_recursions < 1:
        raise ValueError(f"num-recursions={num_recursions} must be at least 1")
    share = STRATEGIES[strategy]
    if share(num_layers, num_recursions):
        return num_layers
    down = next((depth for depth in range(num_layers, 0, -1) if share(depth, num_recursions)), None)
    up = next(
        depth
        for depth in range(max(num_layers, 1), 2 * (num_layers + num_recursions) + 64)
        if share(depth, num_recursions)
    )
    if down is None:
        raise ValueError(
            f"num-layers={num_layers} is too few for {strategy} with num-recursions={num_recursions}: use at least {up}"
        )
    if rounding == "error":
        raise ValueError(
            f"num-layers={num_layers} does not fit num-recursions={num_recursions} with sharing-strategy={strategy}: "
            f"use {down} or {up}, or --depth-rounding down or up"
        )
    return down if rounding == "down" else up


def default_capacities(num_recursions: int) -> tuple[float, ...]:
    """Fractions (Nr-r)/Nr of the paper: 1, 2/3, 1/3 for Nr=3."""
    return tuple((num_recursions - r) / num_recursions for r in range(num_recursions))


def build_plan(
    num_layers: int,
    num_recursions: int,
    strategy: str = "middle_cycle",
    kv_mode: str = "caching",
    capacities: tuple[float, ...] | None = None,
) -> RecursionPlan:
    """Lay out the virtual layers.

    Args:
        num_layers: unrolled depth L, one that fits the strategy.
        num_recursions: Nr >= 1.
        strategy: name of a sharing strategy.
        kv_mode: with `sharing` and `sharing_update`, later uses of a layer read the first use's keys and values.
        capacities: fraction of tokens per recursion; default all 1.
    Raises:
        ValueError: depth and Nr do not fit, there is not one capacity per recursion, or the sharing strategy breaks a
            rule of `SharingStrategy`.
    """
    effective_depth(num_layers, num_recursions, strategy)
    capacities = capacities or (1.0,) * num_recursions
    if len(capacities) != num_recursions:
        raise ValueError(
            f"capacity={list(capacities)} has {len(capacities)} values: give num-recursions={num_recursions}"
        )
    layers: list[VirtualLayer] = []
    first_use: dict[int, int] = {}
    for index, (physical, recursion) in enumerate(STRATEGIES[strategy](num_layers, num_recursions)):
        source = first_use.setdefault(physical, index)
        layers.append(VirtualLayer(index, physical, recursion, index if kv_mode == "caching" else source))
    plan = RecursionPlan(strategy, num_recursions, kv_mode, tuple(capacities), tuple(layers))
    broken = _broken_rule(plan, num_layers)
    if broken:
        raise ValueError(f"sharing-strategy={strategy} {broken} (num-layers={num_layers}, Nr={num_recursions})")
    return plan


def _broken_rule(plan: RecursionPlan, num_layers: int) -> str | None:
    """What a strategy got wrong, and the remedy. A plan that breaks a rule would run, and compute something else."""
    if plan.num_layers != num_layers:
        return f"lays out {plan.num_layers} layers: return as many as the depth, or none"
    if list(dict.fromkeys(layer.physical for layer in plan.layers)) != list(range(plan.num_physical_layers)):
        return "skips a number: number physical layers from 0 in the order of first use"
    if {layer.recursion for layer in plan.shared} != set(range(plan.num_recursions)):
        return f"leaves a recursion out: give shared layers the recursions 0 to {plan.num_recursions - 1}"
    unique = (*plan.first, *plan.last)
    if len(unique) + len(plan.shared) != num_layers:
        return "has a unique layer among shared ones: put unique layers before or after them"
    uses = Counter(layer.physical for layer in plan.layers)
    if any(uses[layer.physical] > 1 for layer in unique):
        return "uses a unique layer twice: give it a recursion"
    if plan.kv_mode != "caching" and any((x.recursion == 0) != (x.kv_source == x.index) for x in plan.shared):
        return f"has shared layers that recursion 0 does not run exactly once: use kv-mode=caching, not {plan.kv_mode}"
    return None
