"""Names under which seeds and checkpoints know weights, where these are not the names in the model.

A router's matrices are `weights.0` and `weights.1` there, whatever its layers are called.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def stored_name(name: str, names: Iterable[str]) -> str:
    """The stored name of a parameter.

    Args:
        name: in the model, or in an export without its prefix.
        names: of all parameters.
    """
    module, _, layer = name.removesuffix(".weight").rpartition(".")
    if not name.startswith("router.") or layer not in ("inner", "out"):
        return name
    return f"{module}.weights.{int(layer == 'out' and f'{module}.inner.weight' in names)}"


def stored_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter in the model -> its stored name."""
    names = {name for name, _ in model.named_parameters()}
    return {name: stored_name(name, names) for name in names}
