"""Reference cases from the authors' implementation: their settings, names and weights, mapped to ours.

A case is one safetensors file: weights, inputs, outputs, losses and gradients, and a JSON `meta` with the settings.
A setting that this file does not know is an error, never a skip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor, nn

from mor_megatron.config.schema import Config, ModelConfig
from mor_megatron.distributed.sharding import cut
from mor_megatron.huggingface.authors import check_keys, parameter_names, recursion_config
from mor_megatron.huggingface.weights import Names, fuse, split
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.model.stored_names import EMBEDDING, HEAD, stored_name, stored_parameters


@dataclass(frozen=True)
class Case:
    """One file of the authors' numbers."""

    path: Path
    meta: dict
    tensors: dict[str, Tensor]
    config: Config

    @property
    def routing(self) -> str:
        return self.config.recursion.routing

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def load_case(path: Path) -> Case:
    """Read a case and translate its settings.

    Raises:
        ValueError: the file has no meta, or a setting that we do not know.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "meta" not in metadata:
            raise ValueError(f"{path}: no `meta` among the metadata")
        meta = json.loads(metadata["meta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Case(path, meta, tensors, _config(meta, path))


def _config(meta: dict, path: Path) -> Config:
    check_keys(meta, "case dims recursive kv_sharing mor ties n_params tied_head seed", path)
    dims = meta["dims"]
    check_keys(dims, "B S V H L L_effective FF NH NKV eps theta", path)
    model = ModelConfig(
        num_layers=dims["L_effective"],
        hidden_size=dims["H"],
        ffn_hidden_size=dims["FF"],
        num_attention_heads=dims["NH"],
        group_query_attention=dims["NKV"] != dims["NH"],
        num_query_groups=dims["NKV"],
        kv_channels=dims["H"] // dims["NH"],
        max_position_embeddings=dims["S"],
        norm_epsilon=dims["eps"],
        rotary_base=dims["theta"],
        untie_embeddings_and_output_weights=not meta["tied_head"],
        vocab_size=dims["V"],
        make_vocab_size_divisible_by=1,
    )
    return Config(model=model, recursion=recursion_config(meta, dims["L_effective"], path))


def model_of(case: Case) -> MoRModel:
    """Our model with the case's weights; in a layout of several ranks, this rank's part of it.

    Raises:
        ValueError: a weight of the file has no place in ours, or one of ours is not in the file.
    """
    model = build_model(case.config)
    ours = {**dict(stored_parameters(model)), **dict(model.named_buffers())}
    names = _names(case, model)
    left = {name for name in case.tensors if name.startswith("param.")}
    left -= {f"param.{part}" for parts in names.values() for part in parts}
    with torch.no_grad():
        for name, target in ours.items():
            original = EMBEDDING if name == HEAD and case.meta["tied_head"] else name
            if original in names:
                full = fuse(name, [case[f"param.{part}"] for part in names[original]], case.config.model)
                target.copy_(_share(target, full))
    missing = {name for name, _ in stored_parameters(model)} - set(names)
    missing -= {HEAD} if case.meta["tied_head"] else set()
    if left or missing:
        raise ValueError(f"{case.path}: not used: {sorted(left)}; not in the file: {sorted(missing)}")
    return model


def _share(target: Tensor, full: Tensor) -> Tensor:
    """What this tensor-parallel rank holds of a weight."""
    if not getattr(target, "tensor_model_parallel", False):
        return full
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return cut(full, target.partition_dim, target.partition_stride, rank, size)


def gradients_of(case: Case, gradients: dict[str, Tensor], model: MoRModel) -> dict[str, Tensor]:
    """Whole gradients by our names -> under the authors' names."""
    theirs: dict[str, Tensor] = {}
    gradients = {stored_name(name, gradients): gradient for name, gradient in gradients.items()}
    for name, parts in _names(case, model).items():
        if name in gradients:
            theirs.update(zip(parts, split(name, gradients[name], len(parts), case.config.model), strict=True))
    return theirs


def _names(case: Case, model: MoRModel) -> Names:
    stored = [name.removeprefix("param.") for name in case.tensors if name.startswith("param.")]
    return parameter_names(model.plan, case.config.recursion, case.meta["tied_head"], stored)


def unique_storages(model: nn.Module) -> int:
    """Elements of all parameters, each storage once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
