"""What a MoR model cannot be put into, and what does work. This file travels with an exported model."""

from __future__ import annotations

import torch

INSTEAD = (
    "use generate() with a padded batch, or a model without routing that `tools/export_hf.py --as llama` has written"
)


class NotServed:
    """Refuses, in one line each, what would fail deep inside or give other numbers."""

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Asked by vLLM and SGLang before they put their attention into a model.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"vLLM and SGLang keep equally many keys for every layer; a {cls.__name__} has ragged ones: {INSTEAD}"
        )

    def init_continuous_batching(self, *arguments, **options):
        """What `generate_batch` begins with.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"generate_batch pages equally many keys for every layer; MoR models have ragged ones: {INSTEAD}"
        )


def refuse_graphs() -> None:
    """Called by the forward of a model that routes.

    Raises:
        ValueError: a graph of operations is being recorded, in which the routes of one input would stay for all.
    """
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    if recorded:
        raise ValueError(f"ONNX, torch.export and torch.jit would record the routes of one input for all: {INSTEAD}")


__all__ = ["NotServed", "refuse_graphs"]
