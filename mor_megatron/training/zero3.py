"""ZeRO-3 and weights that are read outside the module that owns them.

DeepSpeed gathers a module's own weights before its forward and again before its backward. It can find out by itself
when another module reads them, but only in a forward that it drives; evaluation runs the bare model.
"""

from __future__ import annotations

from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from torch import nn

from mor_megatron.model.attention import MoRSelfAttention
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.recursion.routers import Router


def register_borrowed_weights(model: nn.Module) -> None:
    """Tell DeepSpeed which modules of a model that it has partitioned read weights of others."""
    for module in model.modules():
        for weight in _borrowed(module):
            register_external_parameter(module, weight)


def _borrowed(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, MoRModel) and module.tied:
        return [module.embedding.word_embeddings.weight]  # the head
    if isinstance(module, MoRSelfAttention):
        return [module.linear_qkv.weight]  # queries alone, where keys and values are shared
    if isinstance(module, Router):
        return list(module.weights)  # a ParameterList is a module without a forward
    return []
