"""Weights under the names of the LLaMA family, and under ours: one table of names, used in both directions.

Megatron-core keeps query, key and value of a layer in one tensor, group by group, and gate and up in another; the
LLaMA family keeps them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mor_megatron.config.schema import Config, ModelConfig
from mor_megatron.model.mor_model import EMBEDDING, HEAD
from mor_megatron.model.stored_names import stored_name
from mor_megatron.planning.accounting import routers

FINAL_NORM = "final_layernorm.weight"

Names = dict[str, tuple[str, ...]]
"""Our name -> their names of the tensors that make it up."""


def outer_names(tied: bool) -> Names:
    """Embedding, final norm and head."""
    names: Names = {EMBEDDING: ("model.embed_tokens.weight",), FINAL_NORM: ("model.norm.weight",)}
    return names if tied else {**names, HEAD: ("lm_head.weight",)}


def layer_names(physical: int, theirs: str, qkv_bias: bool = False) -> Names:
    """One layer.

    Args:
        physical: our number of it.
        theirs: prefix of its tensors, `model.layers.0`.
        qkv_bias: whether query, key and value have biases.
    """
    ours = f"layers.{physical}"
    names = {
        f"{ours}.input_layernorm.weight": (f"{theirs}.input_layernorm.weight",),
        f"{ours}.pre_mlp_layernorm.weight": (f"{theirs}.post_attention_layernorm.weight",),
        f"{ours}.self_attention.linear_qkv.weight": tuple(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"),
        f"{ours}.self_attention.linear_proj.weight": (f"{theirs}.self_attn.o_proj.weight",),
        f"{ours}.mlp.linear_fc1.weight": tuple(f"{theirs}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        f"{ours}.mlp.linear_fc2.weight": (f"{theirs}.mlp.down_proj.weight",),
    }
    if qkv_bias:
        names[f"{ours}.self_attention.linear_qkv.bias"] = tuple(f"{theirs}.self_attn.{x}_proj.bias" for x in "qkv")
    return names


def router_names(ours: str, theirs: str, router_type: str, parts: tuple[str, str]) -> Names:
    """One router.

    Args:
        ours, theirs: prefixes.
        parts: their names of the inner layer (mlp only) and of the last one.
    """
    suffixes = parts if router_type == "mlp" else parts[1:]
    return {f"{ours}.weights.{i}": (f"{theirs}.{suffix}.weight",) for i, suffix in enumerate(suffixes)}


def export_names(config: Config) -> Names:
    """All names of an exported model.

    Args:
        config: validated settings of the run.
    """
    names = outer_names(tied=not config.model.untie_embeddings_and_output_weights)
    for physical in range(config.plan.num_physical_layers):
        names |= layer_names(physical, f"model.layers.{physical}", config.model.add_qkv_bias)
    own = [f"router.{name}" for name in routers(config).state_dict()]
    return names | {stored_name(name, own): (f"model.{name}",) for name in own}


def to_theirs(parameters: Mapping[str, Tensor], names: Names, model: ModelConfig) -> dict[str, Tensor]:
    """Our tensors -> theirs.

    Raises:
        ValueError: there is a tensor that `names` does not know, or one is missing.
    """
    _require(set(parameters), set(names))
    theirs: dict[str, Tensor] = {}
    for ours, parts in names.items():
        theirs.update(zip(parts, split(ours, parameters[ours], len(parts), model), strict=True))
    return theirs


def to_ours(tensors: Mapping[str, Tensor], names: Names, model: ModelConfig) -> dict[str, Tensor]:
    """Their tensors -> ours.

    Raises:
        ValueError: there is a tensor that `names` does not know, or one is missing.
    """
    _require(set(tensors), {part for parts in names.values() for part in parts})
    return {ours: fuse(ours, [tensors[part] for part in parts], model) for ours, parts in names.items()}


def fuse(name: str, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k, v -> for each key/value group its query heads, k, v; gate, up -> one below the other."""
    if ".linear_qkv." not in name:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    inputs = tensors[0].shape[1:]  # a bias has none
    heads = [t.reshape(model.key_value_heads, -1, model.kv_channels, *inputs) for t in tensors]
    return torch.cat(heads, dim=1).reshape(-1, *inputs)


def split(name: str, tensor: Tensor, count: int, model: ModelConfig) -> list[Tensor]:
    """The reverse of `fuse`."""
    if ".linear_qkv." not in name:
        return [part.contiguous() for part in tensor.chunk(count)]
    inputs = tensor.shape[1:]
    heads = tensor.reshape(model.key_value_heads, -1, model.kv_channels, *inputs)
    parts = heads.split([heads.shape[1] - 2, 1, 1], dim=1)
    return [part.reshape(-1, *inputs) for part in parts]


def _require(there: set[str], wanted: set[str]) -> None:
    if there != wanted:
        raise ValueError(
            f"the weights are of another model: not known {sorted(there - wanted)[:5]}, missing "
            f"{sorted(wanted - there)[:5]}: give the settings they were trained with"
        )
