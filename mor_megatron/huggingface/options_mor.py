"""Checks of the arguments of a call. This file travels with an exported model."""

from __future__ import annotations

from .configuration_mor import MoRConfig


def routing_options(
    config: MoRConfig, depth: int | None, threshold: float | None, selection: str = "threshold"
) -> tuple[int | None, float]:
    """Fixed depth and threshold of one call: its own, or where it gives none the configuration's.

    Raises:
        ValueError: a value is out of range, or means nothing to this kind of model or beside the others.
    """
    count, given = config.num_recursions, threshold is not None
    depth = config.depth if depth is None else depth
    threshold = config.router_threshold if threshold is None else threshold
    if depth is not None and not 1 <= depth <= count:
        raise ValueError(f"depth={depth} must be between 1 and num_recursions={count}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"router_threshold={threshold} must be between 0 and 1")
    if threshold != 0.5 and not config.routing_method.looks_ahead:
        raise ValueError(
            f"router_threshold={threshold} needs a model that selects by threshold, and this one has "
            f"routing={config.routing}: leave it out"
        )
    if given and depth is not None:
        raise ValueError(f"router_threshold={threshold} decides nothing where depth={depth} does: leave one out")
    if selection not in ("threshold", "capacity"):
        raise ValueError(f"selection={selection} is unknown: use threshold or capacity")
    return depth, threshold


def refuse_unknown(kwargs: dict) -> None:
    """Refuse unknown arguments, rather than ignore them.

    Raises:
        ValueError: an argument that is not known has a value.
    """
    for name, value in kwargs.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not known to MoR models: leave it out")


__all__ = ["refuse_unknown", "routing_options"]
