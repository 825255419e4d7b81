"""What recursions begin with when a dense model becomes a relaxed recursive one.

The adapter of a recursion starts as the best approximation of (its source - the shared weight) by a matrix of its rank,
a truncated singular value decomposition (Relaxed Recursive Transformers, arXiv 2410.20672). Norms that differ
between recursions start as those of the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.huggingface.weights import MAPS, RECURSION_EMBEDDING, split
from mor_megatron.planning.accounting import skips_keys
from mor_megatron.recursion.plan import VirtualLayer
from mor_megatron.recursion.relaxation import adapted


@dataclass(frozen=True)
class Residual:
    """What sharing takes from one use of a layer: the differences of its linear maps from the shared ones."""

    use: VirtualLayer
    energy: float
    """Sum of squares."""
    kept: float
    """The part of it that adapters have; the error has the rest."""

    @property
    def share(self) -> float:
        """Part of the energy that is kept; all of none."""
        return self.kept / self.energy if self.energy > 0 else 1.0


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, inputs] and B [R, outputs], fp32, whose product B^T A is the best approximation of rank R of a matrix.

    Args:
        matrix: [outputs, inputs].
        rank: R. Rows beyond the smaller side of the matrix are 0.
    """
    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    a, b = v[:rank], (u * s).t()[:rank]
    missing = (0, 0, 0, rank - len(a))
    return F.pad(a, missing), F.pad(b, missing)


def relaxed_weights(
    config: Config,
    positions: Sequence[int],
    layer: Callable[[int], dict[str, Tensor]],
    shared: dict[str, Tensor],
    adapters: str = "svd",
    seed: int = 0,
) -> tuple[dict[str, Tensor], list[Residual]]:
    """Weights that recursions do not share, by our names.

    Args:
        config: of the new model, validated.
        positions: old layer at each position (`uptraining.layers_of_positions`).
        layer: number of an old layer -> its weights, by their names within a layer.
        shared: weights of the new model's layers, by our names.
        adapters: one of `uptraining.ADAPTER_STARTS`.
        seed: of A where B is 0: with `zero`, and where a source is the shared weight.
    Returns:
        The weights, and what is lost by each use of the shared layers, in their order.
    """
    recursion, plan, model = config.recursion, config.plan, config.model
    recursions = adapted(recursion, plan)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, dict[int, Tensor]] = {}
    """Name of a tensor that has all recursions -> recursion -> its part."""
    residuals = []
    for use in plan.shared:
        ours, source = f"layers.{use.physical}", layer(positions[use.index])
        energy = kept = 0.0
        for linear, part, difference in _differences(config, use, source, shared):
            energy += difference.square().sum().item()
            if use.recursion not in recursions.get(part, ()):
                continue
            if adapters == "svd" and difference.any():
                a, b = truncated(difference, recursion.lora_rank)
                kept += b.square().sum().item()
            else:
                a = torch.randn(recursion.lora_rank, difference.shape[1], generator=generator) * model.init_method_std
                b = torch.zeros(recursion.lora_rank, len(difference))
            name = f"{ours}.{linear}.adapters.{part}"
            rows.setdefault(f"{name}_a", {})[use.recursion] = a
            rows.setdefault(f"{name}_b", {})[use.recursion] = b / recursion.lora_scale
        if recursion.recursion_norms:
            for name in ("input_layernorm.weight", "pre_mlp_layernorm.weight"):
                rows.setdefault(f"{ours}.{name}", {})[use.recursion] = source[name].float()
        residuals.append(Residual(use, energy, kept))
    weights = {name: torch.stack([own[r] for r in sorted(own)]) for name, own in rows.items()}
    if recursion.recursion_embedding:
        weights[RECURSION_EMBEDDING] = torch.zeros(plan.num_recursions, model.hidden_size)
    return weights, residuals


def _differences(
    config: Config, use: VirtualLayer, source: dict[str, Tensor], shared: dict[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """Of the linear maps that a use of a layer multiplies by: our layer, a part of it, (source - shared weight)."""
    for linear, (_, parts) in MAPS.items():
        name = f"{linear}.weight"
        weights = source[name], shared[f"layers.{use.physical}.{name}"]
        both = [split(name, weight.float(), len(parts), config.model) for weight in weights]
        for part, old, new in zip(parts, *both, strict=True):
            if not (part in ("k", "v") and skips_keys(config.plan, use)):
                yield linear, part, old - new


def table(residuals: list[Residual]) -> str:
    """The share of the energy that is kept: one line a shared layer, one column a recursion, and all of them."""
    layers = sorted({residual.use.physical for residual in residuals})
    recursions = sorted({residual.use.recursion for residual in residuals})
    lines = [
        "energy of (source - shared weight) that adapters keep, by recursion",
        "  ".join(["layer", *(f"{r:>5}" for r in recursions), "  all"]),
    ]
    for physical in layers:
        own = {residual.use.recursion: residual for residual in residuals if residual.use.physical == physical}
        shares = [own[r].share for r in recursions] + [_total(list(own.values()))]
        lines.append("  ".join([f"{physical:>5}", *(f"{share:>5.3f}" for share in shares)]))
    return "\n".join([*lines, f"all layers: {_total(residuals):.3f}"])


def _total(residuals: list[Residual]) -> float:
    energy = sum(residual.energy for residual in residuals)
    return sum(residual.kept for residual in residuals) / energy if energy > 0 else 1.0
