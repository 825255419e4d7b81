"""Parts of layers in few kernels, for a GPU: where sequences decode, a kernel costs more than what it computes.

Products of the same rows become one, and the element-wise work between them is that of training (`model/elementwise`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.huggingface.relaxed_mor import ADAPTERS, MoRRMSNorm, Recursions, Relaxed
from mor_megatron.model.elementwise import Elementwise, implementation
from mor_megatron.serving.packed import shared_copy


class FusedNorm(nn.Module):
    """A norm with one weight for all recursions."""

    def __init__(self, norm: MoRRMSNorm, kernels: Elementwise):
        super().__init__()
        self.weight, self.eps, self.rms_norm = norm.weight, norm.eps, kernels.rms_norm

    def forward(self, x: Tensor, recursion: Recursions = None) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.rms_norm(x, self.weight, self.eps)


class FusedAttention(nn.Module):
    """Attention whose queries, keys and values are one product; it has a second copy of their weights."""

    def __init__(self, attention: Relaxed):
        super().__init__()
        self.attention = attention
        self.weight, self.bias, self.heads_of = _joined(attention, "q", "k", "v")
        self.heads_of = [size // attention.head_dim for size in self.heads_of]

    def heads(self, hidden: Tensor, recursion: Recursions, *parts: str) -> list[Tensor]:
        """As `MoRAttention`."""
        if parts != ("q", "k", "v"):
            return self.attention.heads(hidden, recursion, *parts)
        mixed = F.linear(hidden, self.weight, self.bias).view(len(hidden), -1, self.attention.head_dim)
        return list(mixed.split(self.heads_of, dim=1))

    def project(self, x: Tensor, recursion: Recursions, *parts: str) -> list[Tensor]:
        """As `MoRAttention`."""
        return self.attention.project(x, recursion, *parts)


class FusedMLP(nn.Module):
    """SwiGLU whose first two products are one; it has a second copy of their weights."""

    def __init__(self, mlp: Relaxed, kernels: Elementwise):
        super().__init__()
        self.mlp, self.swiglu = mlp, kernels.swiglu
        self.weight, _, _ = _joined(mlp, "gate", "up")

    def forward(self, x: Tensor, recursion: Recursions) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.mlp.project(self.swiglu(F.linear(x, self.weight)), recursion, "down")[0]


def fuse(model: MoRForCausalLM) -> MoRForCausalLM:
    """A copy of a model with fused parts; it has everything else in common with the model.

    Parts with adapters, with norms of single recursions or with other linear layers than `nn.Linear` stay as they are.
    """
    model, kernels = shared_copy(model), implementation(model.device.type)
    for layer in model.model.layers:
        if _is_plain(layer.self_attn, "q", "k", "v"):
            layer.self_attn = FusedAttention(layer.self_attn)
        if _is_plain(layer.mlp, "gate", "up"):
            layer.mlp = FusedMLP(layer.mlp, kernels)
    for name, module in list(model.named_modules()):
        if type(module) is MoRRMSNorm and module.weight.ndim == 1:
            model.set_submodule(name, FusedNorm(module, kernels))
    return model


def _is_plain(module: Relaxed, *parts: str) -> bool:
    maps = (module.get_submodule(f"{part}_proj") for part in parts)
    return ADAPTERS[parts[0]] not in module._modules and all(type(linear) is nn.Linear for linear in maps)


def _joined(module: Relaxed, *parts: str) -> tuple[Tensor, Tensor | None, list[int]]:
    """Weights and biases of some maps, one after the other, and their numbers of outputs."""
    maps = [module.get_submodule(f"{part}_proj") for part in parts]
    bias = None if maps[0].bias is None else torch.cat([linear.bias.detach() for linear in maps])
    return torch.cat([linear.weight.detach() for linear in maps]), bias, [linear.out_features for linear in maps]
