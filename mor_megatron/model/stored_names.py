"""Names of weights: those that others ask for, and those in checkpoints and seeds that differ from the model's.

There, a router's matrices are `weights.0` and `weights.1`, whatever its layers are called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""A tied head has a copy of the embedding under its own name where a pipeline parts them."""


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
