"""A stored layer of a MoR model, and its parts. This file travels with an exported model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mor_megatron.recursion.plan import VirtualLayer

from .attention_mor import MoRAttention, Pair, Visibility
from .configuration_mor import MoRConfig


class MoRRMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32, rounded before the weight, as LLaMA does."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]."""
        if x.dtype == self.weight.dtype == torch.float32:  # one pass; nothing is rounded in between
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class MoRMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoRDecoderLayer(GradientCheckpointingLayer):
    """One stored layer."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.self_attn = MoRAttention(config)
        self.mlp = MoRMLP(config)
        self.input_layernorm = MoRRMSNorm(config)
        self.post_attention_layernorm = MoRRMSNorm(config)

    def forward(
        self, hidden: Tensor, visibility: Visibility, use: VirtualLayer, source: Pair | None
    ) -> tuple[Tensor, Pair | None]:
        """[T, H] -> [T, H], and the rows' own keys and values if later recursions read them."""
        update, own = self.self_attn(self.input_layernorm(hidden), visibility, use, source)
        hidden = hidden + update
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), own


__all__ = ["MoRDecoderLayer", "MoRRMSNorm"]
