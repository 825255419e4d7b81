"""Weights under the names of the LLaMA family, and under ours: one table of names, used in both directions.

Megatron-core keeps query, key and value of a layer in one tensor, group by group, and gate and up in another; the
LLaMA family keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mor_megatron.config.schema import Config, ModelConfig
from mor_megatron.huggingface.relaxed_mor import ADAPTERS
from mor_megatron.model.stored_names import EMBEDDING, HEAD, stored_name
from mor_megatron.planning.accounting import routers
from mor_megatron.recursion.relaxation import adapted

FINAL_NORM, RECURSION_EMBEDDING = "final_layernorm.weight", "recursion_embedding.weight"

Names = dict[str, tuple[str, ...]]
"""Our name -> their names of the tensors that make it up."""

MAPS = {
    "self_attention.linear_qkv": ("self_attn", ("q", "k", "v")),
    "self_attention.linear_proj": ("self_attn", ("o",)),
    "mlp.linear_fc1": ("mlp", ("gate", "up")),
    "mlp.linear_fc2": ("mlp", ("down",)),
}
"""Our name of a linear layer -> their module, and their names of the maps in it (`relaxation.PARTS`)."""


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
    }
    for layer, (module, parts) in MAPS.items():
        names[f"{ours}.{layer}.weight"] = tuple(f"{theirs}.{module}.{part}_proj.weight" for part in parts)
    if qkv_bias:
        names[f"{ours}.self_attention.linear_qkv.bias"] = tuple(f"{theirs}.self_attn.{x}_proj.bias" for x in "qkv")
    return names


def adapted_maps(config: Config) -> Iterator[tuple[str, str, range]]:
    """The maps of a shared layer that have adapters: our layer, a part of it, its recursions."""
    recursions = adapted(config.recursion, config.plan)
    for layer, (_, parts) in MAPS.items():
        yield from ((layer, part, recursions[part]) for part in parts if part in recursions)


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
    plan, recursion = config.plan, config.recursion
    for physical in range(plan.num_physical_layers):
        names |= layer_names(physical, f"model.layers.{physical}", config.model.add_qkv_bias)
    for physical in {layer.physical for layer in plan.shared}:
        for layer, part, _ in adapted_maps(config):
            module = f"model.layers.{physical}.{MAPS[layer][0]}.{ADAPTERS[part]}"
            names |= {f"layers.{physical}.{layer}.adapters.{part}_{x}": (f"{module}.{part}_{x}",) for x in "ab"}
    if recursion.recursion_embedding:
        names[RECURSION_EMBEDDING] = (f"model.{RECURSION_EMBEDDING}",)
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
    if len(tensors) == 1:
        return tensors[0]
    if ".linear_qkv." not in name:
        return torch.cat(tensors)
    inputs = tensors[0].shape[1:]  # a bias has none
    heads = [t.reshape(model.key_value_heads, -1, model.kv_channels, *inputs) for t in tensors]
    return torch.cat(heads, dim=1).reshape(-1, *inputs)


def split(name: str, tensor: Tensor, count: int, model: ModelConfig) -> list[Tensor]:
    """The reverse of `fuse`."""
    if count == 1 or ".linear_qkv." not in name:
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
