"""A stored layer of a MoR model, and its parts. This file travels with an exported model."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mor_megatron.recursion.plan import VirtualLayer
from mor_megatron.recursion.relaxation import adapted

from .attention_mor import MoRAttention, Pair, Visibility
from .configuration_mor import MoRConfig
from .relaxed_mor import MoRRMSNorm, Recursions, Relaxed


class MoRMLP(Relaxed):
    """SwiGLU."""

    def __init__(self, config: MoRConfig, recursions: Mapping[str, range]):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.add_adapters(config, recursions, "gate", "up")
        self.add_adapters(config, recursions, "down")

    def forward(self, x: Tensor, recursion: Recursions) -> Tensor:
        """[T, H] -> [T, H]."""
        gate, up = self.project(x, recursion, "gate", "up")
        return self.project(F.silu(gate) * up, recursion, "down")[0]


class MoRDecoderLayer(GradientCheckpointingLayer):
    """One stored layer.

    Args:
        is_shared: it is one of those that recursions run.
    """

    def __init__(self, config: MoRConfig, is_shared: bool):
        super().__init__()
        settings = config.relaxation_settings
        recursions = adapted(settings, config.plan) if is_shared else {}
        self.self_attn = MoRAttention(config, recursions)
        self.mlp = MoRMLP(config, recursions)
        norms = config.num_recursions if is_shared and settings.recursion_norms else None
        self.input_layernorm = MoRRMSNorm(config, norms)
        self.post_attention_layernorm = MoRRMSNorm(config, norms)

    def forward(
        self, hidden: Tensor, visibility: Visibility, use: VirtualLayer, source: Pair | None
    ) -> tuple[Tensor, Pair | None]:
        """[T, H] -> [T, H], and the rows' own keys and values if later recursions read them."""
        r = use.recursion
        update, own = self.self_attn(self.input_layernorm(hidden, r), visibility, use, source)
        hidden = hidden + update
        return hidden + self.mlp(self.post_attention_layernorm(hidden, r), r), own


__all__ = ["MoRDecoderLayer"]
