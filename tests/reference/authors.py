"""Cases run with the authors' implementation: their settings, names and weights, mapped to ours.

A case is one safetensors file: weights, inputs, outputs, losses and gradients, and a JSON `meta` with the settings.
A setting this file does not know is an error, never a skip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor, nn

from mor_megatron.config.schema import Config, ModelConfig, RecursionConfig
from mor_megatron.model import MoRModel, build_model
from mor_megatron.model.mor_model import EMBEDDING, HEAD
from mor_megatron.parallel.sharding import cut


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
    _keys(meta, "case dims recursive kv_sharing mor ties n_params tied_head seed", path)
    dims = meta["dims"]
    _keys(dims, "B S V H L L_effective FF NH NKV eps theta", path)
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
    return Config(model=model, recursion=_recursion(meta, path))


def _recursion(meta: dict, path: Path) -> RecursionConfig:
    recursive, sharing, mor = meta["recursive"], meta["kv_sharing"] or {"enable": False}, meta["mor"]
    _keys(recursive, "enable base_depth num_recursion sharing ln_share initialization", path)
    _keys(sharing, "enable base_depth num_recursion sharing update_cache", path)
    if not recursive["enable"]:
        if sharing["enable"] or (mor and mor["enable"]):
            raise ValueError(f"{path}: kv_sharing or mor without recursive")
        return RecursionConfig(num_recursions=1)
    num_recursions, strategy = recursive["num_recursion"], recursive["sharing"]
    _allowed("recursive.ln_share", recursive["ln_share"], (True,), path)
    _allowed("recursive.sharing", strategy, ("cycle", "sequence", "middle_cycle", "middle_sequence"), path)
    block = (meta["dims"]["L_effective"] - (2 if strategy.startswith("middle") else 0)) // num_recursions
    _allowed("recursive.base_depth", recursive["base_depth"], (None, block), path)
    if num_recursions < 2:
        raise ValueError(f"{path}: recursive.num_recursion={num_recursions} (a special case of the authors) is unknown")
    config = RecursionConfig(num_recursions=num_recursions, sharing_strategy=strategy)
    if sharing["enable"]:
        _allowed("kv_sharing.num_recursion", sharing["num_recursion"], (None, num_recursions), path)
        _allowed("kv_sharing.sharing", sharing["sharing"], (None, strategy), path)
        _allowed("kv_sharing.base_depth", sharing["base_depth"], (None, block), path)
        config = replace(config, kv_mode="sharing_update" if sharing["update_cache"] else "sharing")
    if not mor or not mor["enable"]:
        return config
    return _routing(config, mor, path)


def _routing(config: RecursionConfig, mor: dict, path: Path) -> RecursionConfig:
    _keys(mor, "enable type capacity rand_router router_type z_loss z_coeff temp expert token", path)
    _allowed("mor.type", mor["type"], ("expert", "token"), path)
    _allowed("mor.rand_router", mor["rand_router"], (False,), path)
    _allowed("mor.router_type", mor["router_type"], ("linear", "mlp", "wide_mlp"), path)
    config = replace(
        config,
        router_type="linear" if mor["router_type"] == "linear" else "mlp",
        router_temperature=mor["temp"],
        router_z_loss_coeff=mor["z_coeff"] if mor["z_loss"] else 0.0,
    )
    if mor["type"] == "expert":
        expert = mor["expert"]
        _keys(expert, "cap_warmup_step router_func alpha sampling include_first coeff gating", path)
        _allowed("mor.expert.sampling", expert["sampling"], ("aux_loss", "aux_router"), path)
        _allowed("mor.expert.gating", expert["gating"], ("weighted", "additive"), path)
        _allowed("mor.expert.router_func", expert["router_func"], ("sigmoid", "tanh", None), path)
        _allowed("mor.expert.cap_warmup_step is a number", isinstance(expert["cap_warmup_step"], int), (True,), path)
        capacity = mor["capacity"]
        if isinstance(capacity, str):
            capacity = tuple(float(c) for c in capacity.split(","))
        return replace(
            config,
            routing="expert_choice",
            capacity=capacity,
            capacity_warmup_iters=expert["cap_warmup_step"],
            router_func=expert["router_func"] or "none",
            router_alpha=expert["alpha"],
            router_objective=expert["sampling"],
            # The authors' second router is trained by an optimizer of its own: not part of their total loss.
            router_aux_loss_coeff=0.0 if expert["sampling"] == "aux_router" else expert["coeff"],
            router_gating=expert["gating"],
        )
    token = mor["token"]
    _keys(token, "bal_warmup_step router_func alpha balancing coeff u gating", path)
    _allowed("mor.token.router_func", token["router_func"], ("softmax", "sigmoid"), path)
    _allowed("mor.token.balancing", token["balancing"], ("loss", "loss_free"), path)
    _allowed("mor.token.gating", token["gating"], ("weighted", "additive"), path)
    _allowed("mor.token.bal_warmup_step is a number", isinstance(token["bal_warmup_step"], int), (True,), path)
    return replace(
        config,
        routing="token_choice",
        router_func=token["router_func"],
        router_alpha=token["alpha"],
        router_balance=token["balancing"],
        router_balance_coeff=token["coeff"],
        router_balance_scope="microbatch",
        router_bias_update_rate=token["u"],
        router_balance_warmup_iters=token["bal_warmup_step"],
        router_gating=token["gating"],
    )


def _keys(settings: dict, known: str, path: Path) -> None:
    unknown = set(settings) - set(known.split())
    if unknown:
        raise ValueError(f"{path}: unknown settings {sorted(unknown)}")


def _allowed(name: str, value, allowed: tuple, path: Path) -> None:
    if value not in allowed:
        raise ValueError(f"{path}: {name}={value!r} is not one of {allowed}")


def model_of(case: Case) -> MoRModel:
    """Our model with the case's weights; in a layout of several ranks, this rank's part of it.

    Raises:
        ValueError: a weight of the file has no place in ours, or one of ours is not in the file.
    """
    model = build_model(case.config, case.meta["dims"]["V"])
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = parameter_names(case, model)
    left = {name for name in case.tensors if name.startswith("param.")}
    left -= {f"param.{part}" for parts in names.values() for part in parts}
    with torch.no_grad():
        for name, target in ours.items():
            original = EMBEDDING if name == HEAD and case.meta["tied_head"] else name
            if original in names:
                full = _fuse(name, [case[f"param.{part}"] for part in names[original]], case.config.model)
                target.copy_(_share(target, full))
    missing = {name for name, _ in model.named_parameters()} - set(names)
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
    for name, parts in parameter_names(case, model).items():
        if name in gradients:
            theirs.update(zip(parts, _split(name, gradients[name], len(parts), case.config.model), strict=True))
    return theirs


def parameter_names(case: Case, model: MoRModel) -> dict[str, tuple[str, ...]]:
    """Our name -> the authors' names of the tensors that make it up."""
    names = {
        EMBEDDING: ("model.embed_tokens.weight",),
        "final_layernorm.weight": ("model.norm.weight",),
    }
    if not case.meta["tied_head"]:
        names[HEAD] = ("lm_head.weight",)
    for layer in model.plan.layers:
        ours, theirs = f"layers.{layer.physical}", _layer_name(case, model, layer)
        if f"param.{theirs}.input_layernorm.weight" not in case:
            continue  # a later use of a tied layer
        names[f"{ours}.input_layernorm.weight"] = (f"{theirs}.input_layernorm.weight",)
        names[f"{ours}.pre_mlp_layernorm.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
        names[f"{ours}.self_attention.linear_qkv.weight"] = tuple(
            f"{theirs}.self_attn.{x}_proj.weight" for x in ("q", "k", "v")
        )
        names[f"{ours}.self_attention.linear_proj.weight"] = (f"{theirs}.self_attn.o_proj.weight",)
        names[f"{ours}.mlp.linear_fc1.weight"] = tuple(f"{theirs}.mlp.{x}_proj.weight" for x in ("gate", "up"))
        names[f"{ours}.mlp.linear_fc2.weight"] = (f"{theirs}.mlp.down_proj.weight",)
    lead = len(model.plan.first)
    if case.routing == "expert_choice":
        for r in range(model.plan.num_recursions):
            names.update(_router_names(f"router.routers.{r}", f"model.layers.{lead + r}.mor_router", case))
            if case.config.recursion.router_objective == "aux_router":
                names.update(_router_names(f"router.aux_routers.{r}", f"model.layers.{lead + r}.mlp_router", case))
    elif case.routing == "token_choice":
        router = f"model.layers.{lead}.mor_router"
        names.update(_router_names("router.router", router, case))
        bias = [n for n in case.tensors if n.startswith("param.") and n.endswith("router_bias")]
        if bias:
            names["router.balance_bias"] = (bias[0].removeprefix("param."),)
    return names


def _layer_name(case: Case, model: MoRModel, layer) -> str:
    plan = model.plan
    if case.routing == "none":
        return f"model.layers.{layer.index}"
    lead = len(plan.first)
    if layer.recursion is None:
        wrappers = plan.num_recursions if case.routing == "expert_choice" else 1
        return "model.layers.0" if layer.index == 0 else f"model.layers.{lead + wrappers}"
    slot = layer.physical - lead
    if case.routing == "expert_choice":
        return f"model.layers.{lead + layer.recursion}.block.{slot}"
    return f"model.layers.{lead}.block_list.{layer.recursion}.{slot}"


def _router_names(ours: str, theirs: str, case: Case) -> dict[str, tuple[str, ...]]:
    if case.config.recursion.router_type == "linear":
        return {f"{ours}.weights.0": (f"{theirs}.router.weight",)}
    return {f"{ours}.weights.{i}": (f"{theirs}.router.{2 * i}.weight",) for i in range(2)}


def _fuse(name: str, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k, v -> for each key/value group its query heads, k, v; gate, up -> stacked."""
    if not name.endswith("linear_qkv.weight"):
        return torch.cat(tensors)
    width = tensors[0].shape[-1]
    heads = [t.view(model.num_query_groups, -1, model.kv_channels, width) for t in tensors]
    return torch.cat(heads, dim=1).reshape(-1, width)


def _split(name: str, tensor: Tensor, count: int, model: ModelConfig) -> list[Tensor]:
    if not name.endswith("linear_qkv.weight"):
        return list(tensor.chunk(count))
    width = tensor.shape[-1]
    heads = tensor.view(model.num_query_groups, -1, model.kv_channels, width)
    queries, keys, values = heads.split([heads.shape[1] - 2, 1, 1], dim=1)
    return [part.reshape(-1, width) for part in (queries, keys, values)]


def unique_storages(model: nn.Module) -> int:
    """Elements of all parameters, each storage once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
