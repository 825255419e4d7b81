"""The routing methods there are. A new one registers itself here (docs/extending.md)."""

from __future__ import annotations

from mor_megatron.recursion.expert_choice import ExpertChoice
from mor_megatron.recursion.no_routing import NoRouting
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.token_choice import TokenChoice

METHODS: dict[str, type[RoutingMethod]] = {}
"""Every routing method, by the name that users write."""


def routing_method(method: type[RoutingMethod]) -> type[RoutingMethod]:
    """Register a routing method under its name."""
    METHODS[method.name] = method
    return method


for _method in (NoRouting, ExpertChoice, TokenChoice):
    routing_method(_method)


def method_of(name: str) -> type[RoutingMethod]:
    """The routing method of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"routing={name} is unknown: use one of {known}, or load the extension that defines it")
    return METHODS[name]
