"""The recursion plan: which physical layer runs at each virtual position, at which recursion, for how many tokens.

Model, parameter count, FLOPs count and pipeline split read this one frozen object; none of them works it out again.
Sharing strategies are those of the paper's table 1 (arXiv 2507.10524). `pretrain_mor.py --dry-run` prints a run's plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_megatron.config.schema import Config, KVMode, SharingStrategy


@dataclass(frozen=True)
class VirtualLayer:
    """One position of the unrolled network."""

    index: int
    """Virtual position, 0..L-1; also the layer number in the order of execution."""
    physical: int
    """Unique layer that runs here, numbered in the order of first use."""
    recursion: int | None
    """Recursion it belongs to; None for the unique first and last layer."""
    kv_source: int
    """Virtual layer whose keys and values are attended to; itself unless kv_mode shares those of recursion 0."""


@dataclass(frozen=True)
class RecursionPlan:
    """The whole unrolled network; build it with `build_plan` or `plan_from_config`."""

    strategy: SharingStrategy
    num_recursions: int
    kv_mode: KVMode
    capacities: tuple[float, ...]
    """Fraction of tokens at each recursion, non-increasing; all 1 without expert-choice routing."""
    layers: tuple[VirtualLayer, ...]

    @property
    def num_layers(self) -> int:
        """Unrolled depth L."""
        return len(self.layers)

    @property
    def num_physical_layers(self) -> int:
        """Unique layers."""
        return 1 + max(layer.physical for layer in self.layers)

    @property
    def block_size(self) -> int:
        """K: unique layers inside the shared block."""
        return len({layer.physical for layer in self.shared})

    @property
    def shared(self) -> tuple[VirtualLayer, ...]:
        """Virtual layers of the shared part, in the order of execution."""
        return tuple(layer for layer in self.layers if layer.recursion is not None)

    @property
    def first(self) -> tuple[VirtualLayer, ...]:
        """The unique layer before the shared part: one for middle_*, none otherwise."""
        return tuple(layer for layer in self.layers[:1] if layer.recursion is None)

    @property
    def last(self) -> tuple[VirtualLayer, ...]:
        """The unique layer after the shared part: one for middle_*, none otherwise."""
        return tuple(layer for layer in self.layers[-1:] if layer.recursion is None)

    def pass_layers(self, recursion: int) -> tuple[VirtualLayer, ...]:
        """Virtual layers of one recursion, in the order of execution."""
        return tuple(layer for layer in self.layers if layer.recursion == recursion)

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


def num_unique_ends(strategy: SharingStrategy, num_recursions: int) -> int:
    """Layers outside the shared part: 2 for middle_cycle and middle_sequence, else 0. With Nr=1 nothing is shared."""
    return 2 if strategy.startswith("middle") and num_recursions > 1 else 0


def effective_depth(num_layers: int, num_recursions: int, strategy: SharingStrategy, rounding: str = "error") -> int:
    """Unrolled depth at which Nr divides the shared part.

    Args:
        num_layers: wanted unrolled depth L.
        num_recursions: Nr.
        strategy: sharing strategy; middle_* leaves two layers out of the division.
        rounding: `error`, `down` (what the authors' code builds) or `up` (what their FLOP budgets assume for Nr=4).
    Returns:
        The depth to build.
    Raises:
        ValueError: Nr does not divide the shared part and rounding is `error`, or too few layers are left.
    """
    ends = num_unique_ends(strategy, num_recursions)
    if num_recursions < 1:
        raise ValueError(f"num-recursions={num_recursions} must be at least 1")
    if num_layers < ends + num_recursions:
        raise ValueError(
            f"num-layers={num_layers} is too few for {strategy} with num-recursions={num_recursions}: "
            f"use at least {ends + num_recursions}"
        )
    rest = (num_layers - ends) % num_recursions
    if rest == 0:
        return num_layers
    down, up = num_layers - rest, num_layers - rest + num_recursions
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
    strategy: SharingStrategy = "middle_cycle",
    kv_mode: KVMode = "caching",
    capacities: tuple[float, ...] | None = None,
) -> RecursionPlan:
    """Lay out the virtual layers (MoR paper, table 1).

    Args:
        num_layers: unrolled depth L; Nr must divide its shared part.
        num_recursions: Nr >= 1.
        strategy: cycle repeats the block, sequence repeats each layer; middle_* keeps the two ends unique.
        kv_mode: with `sharing` and `sharing_update`, later uses of a layer read the first use's keys and values.
        capacities: fraction of tokens per recursion; default all 1.
    Raises:
        ValueError: depth and Nr do not fit, or there is not one capacity per recursion.
    """
    effective_depth(num_layers, num_recursions, strategy)
    ends = num_unique_ends(strategy, num_recursions)
    lead = ends // 2
    shared_depth = num_layers - ends
    block = shared_depth // num_recursions
    capacities = capacities or (1.0,) * num_recursions
    if len(capacities) != num_recursions:
        raise ValueError(
            f"capacity={list(capacities)} has {len(capacities)} values: give num-recursions={num_recursions}"
        )

    layers = [VirtualLayer(0, 0, None, 0)] if lead else []
    first_use: dict[int, int] = {}
    for position in range(shared_depth):
        index = lead + position
        if strategy in ("cycle", "middle_cycle"):
            recursion, slot = divmod(position, block)
        else:
            slot, recursion = divmod(position, num_recursions)
        physical = lead + slot
        source = first_use.setdefault(physical, index)
        layers.append(VirtualLayer(index, physical, recursion, index if kv_mode == "caching" else source))
    if lead:
        layers.append(VirtualLayer(num_layers - 1, lead + block, None, num_layers - 1))
    return RecursionPlan(strategy, num_recursions, kv_mode, tuple(capacities), tuple(layers))


def plan_from_config(config: Config) -> RecursionPlan:
    """The plan of a run; capacities apply to expert-choice routing only.

    Raises:
        ValueError: see `effective_depth` and `build_plan`.
    """
    recursion = config.recursion
    capacities = None
    if recursion.routing == "expert_choice":
        capacities = recursion.capacity or default_capacities(recursion.num_recursions)
    depth = effective_depth(
        config.model.num_layers, recursion.num_recursions, recursion.sharing_strategy, recursion.depth_rounding
    )
    return build_plan(depth, recursion.num_recursions, recursion.sharing_strategy, recursion.kv_mode, capacities)
