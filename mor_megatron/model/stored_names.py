"""Names of weights in checkpoints and in seeds, where they differ from those in the model.

A router's matrices are `weights.0` and `weights.1` there, whatever its layers are called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


def stored_name(name: str, names: Collection[str]) -> str:
    """The stored name of a parameter or buffer.

    Args:
        name: in the model.
        names: of all parameters.
    """
    module, _, layer = name.removesuffix(".weight").rpartition(".")
    if not (name.startswith("router.") and name.endswith(".weight") and layer in ("inner", "out")):
        return name
    return f"{module}.weights.{int(layer == 'out' and f'{module}.inner.weight' in names)}"


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` under stored names."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        yield stored_name(name, parameters), parameter
