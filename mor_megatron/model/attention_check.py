"""Core attention on random inputs against PyTorch's plain attention in fp32: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mor_megatron.model.attention import AttentionMetadata, AttentionPattern, CoreAttention, RotaryTable
from mor_megatron.recursion.dispatch import ActiveTokens

Attention = Callable[[Tensor, Tensor, Tensor, AttentionPattern], Tensor]
LAYER = (SimpleNamespace(attention_dropout=0.0), 1, None, "self")
"""What a core attention is built with; it reads no more of the configuration."""


@dataclass(frozen=True)
class Heads:
    """Core attention of one rank."""

    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    device: str


def random_case(
    heads: Heads, active: ActiveTokens, keys_of_all: bool = False, documents: Tensor | None = None
) -> tuple[AttentionPattern, list[Tensor]]:
    """How the active tokens attend; and query, key, value and the gradient of the output, the same at every call.

    Args:
        documents: ids [B, S]; None: one document.
    """
    generator = torch.Generator(heads.device).manual_seed(0)  # the run's own numbers stay as they are
    rotary = RotaryTable(heads.width, 1, 1e4)
    metadata = AttentionMetadata(rotary, active.seq_length, active.batch_size, heads.dtype, document_ids=documents)
    keys = (active.seq_length, active.batch_size) if keys_of_all else active.shape
    shapes = [(*active.shape, heads.heads), *[(*keys, heads.groups)] * 2, (*active.shape, heads.heads)]
    query, key, value, grad = (
        torch.randn(*shape, heads.width, generator=generator, device=heads.device, dtype=heads.dtype)
        for shape in shapes
    )
    return AttentionPattern(metadata, active, keys_of_all), [query, key, value, grad.flatten(2)]


def outputs_and_gradients(attention: Attention, pattern: AttentionPattern, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    *parts, grad = inputs
    leaves = [x.detach().requires_grad_() for x in parts]
    with torch.enable_grad():
        out = attention(*leaves, pattern)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expected(pattern: AttentionPattern, inputs: list[Tensor]) -> list[Tensor]:
    """The same from the CPU's way, in fp32."""
    exact = AttentionPattern(replace(pattern.metadata, dtype=torch.float32), pattern.active, pattern.keys_of_all)
    with sdpa_kernel(SDPBackend.MATH):
        return outputs_and_gradients(CoreAttention(*LAYER), exact, [x.float() for x in inputs])


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to its largest value."""
    return torch.stack(
        [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    ).tolist()
