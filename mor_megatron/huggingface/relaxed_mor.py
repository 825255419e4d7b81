"""What of a shared layer may differ between recursions. This file travels with an exported model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_megatron.recursion.relaxation import Adapters

from .configuration_mor import MoRConfig

Recursions = int | Tensor | None
"""Of rows: one for all, or that of each, [T] int64; None: they are outside the recursions."""

ADAPTERS = {"o": "o_adapters", "down": "down_adapters"}
ADAPTERS |= dict.fromkeys(("q", "k", "v"), "qkv_adapters") | dict.fromkeys(("gate", "up"), "gate_up_adapters")
"""Linear map -> the module of its adapters, and of those of the maps that read the same rows."""


class MoRRMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32, rounded before the weight, as LLaMA does.

    Args:
        recursions: how many of them have a weight of their own; None: there is one for all.
    """

    def __init__(self, config: MoRConfig, recursions: int | None = None):
        super().__init__()
        shape = (config.hidden_size,) if recursions is None else (recursions, config.hidden_size)
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, recursion: Recursions = None) -> Tensor:
        """[.., H] -> [.., H]."""
        weight, width = self.weight if self.weight.ndim == 1 else self.weight[recursion], x.shape[-1:]
        if x.dtype == weight.dtype == torch.float32 and weight.ndim == 1:  # one pass; nothing is rounded in between
            return F.rms_norm(x, width, weight, self.eps)
        return F.rms_norm(x.float(), width, None, self.eps).to(x.dtype) * weight


class Relaxed(nn.Module):
    """A module with linear maps (`q_proj`), and adapters beside them.

    The maps themselves are those of a model without adapters: what replaces them, to quantise them or to add to them,
    need not know of adapters.
    """

    def add_adapters(self, config: MoRConfig, recursions: Mapping[str, range], *parts: str) -> None:
        """Of maps that read the same rows, as far as they have any.

        Args:
            recursions: by part, those with an adapter (`relaxation.adapted`).
        """
        if not recursions.keys().isdisjoint(parts):
            maps = {part: self.get_submodule(f"{part}_proj") for part in parts}
            outputs = {part: linear.out_features for part, linear in maps.items()}
            adapters = Adapters(config.relaxation_settings, recursions, maps[parts[0]].in_features, outputs)
            self.add_module(ADAPTERS[parts[0]], adapters)

    def project(self, x: Tensor, recursion: Recursions, *parts: str) -> list[Tensor]:
        """Some maps of the same rows, [T, inputs] -> [T, outputs] each."""
        outputs = [self._modules[f"{part}_proj"](x) for part in parts]
        adapters = self._modules.get(ADAPTERS[parts[0]])
        if adapters is None:
            return outputs
        updates = adapters(x, recursion, parts)
        return [out + updates[part] if part in updates else out for part, out in zip(parts, outputs, strict=True)]


__all__ = ["ADAPTERS", "MoRRMSNorm", "Recursions", "Relaxed"]
