"""The checkpoints of the paper's authors: what their settings and names are in ours.

A setting that this file does not know is an error, never a skip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mor_megatron.config.schema import RecursionConfig
from mor_megatron.huggingface.weights import Names, layer_names, outer_names, router_names
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer

SECTIONS = ("recursive", "kv_sharing", "mor")
"""Of their configuration: what makes a model more than a LLaMA."""


def recursion_config(settings: dict, num_layers: int, path: Path) -> RecursionConfig:
    """Their sections `recursive`, `kv_sharing` and `mor` as ours.

    Args:
        settings: with these three; a section that is missing or None is off.
        num_layers: unrolled depth.
        path: named in errors.
    Raises:
        ValueError: a setting is missing, or one that we do not know.
    """
    try:
        return _recursion(*(settings.get(name) or {"enable": False} for name in SECTIONS), num_layers, path)
    except KeyError as error:
        raise ValueError(f"{path}: setting {error} is missing: give the configuration of the run") from error


def _recursion(recursive: dict, sharing: dict, mor: dict, num_layers: int, path: Path) -> RecursionConfig:
    check_keys(recursive, "enable base_depth num_recursion sharing ln_share initialization", path)
    check_keys(sharing, "enable base_depth num_recursion sharing update_cache", path)
    if not recursive["enable"]:
        if sharing["enable"] or mor["enable"]:
            raise ValueError(f"{path}: kv_sharing or mor without recursive")
        return RecursionConfig(num_recursions=1)
    num_recursions, strategy = recursive["num_recursion"], recursive["sharing"]
    _allowed("recursive.ln_share", recursive["ln_share"], (True,), path)
    _allowed("recursive.sharing", strategy, ("cycle", "sequence", "middle_cycle", "middle_sequence"), path)
    block = (num_layers - (2 if strategy.startswith("middle") else 0)) // num_recursions
    _allowed("recursive.base_depth", recursive["base_depth"], (None, block), path)
    if num_recursions < 2:
        raise ValueError(f"{path}: recursive.num_recursion={num_recursions} (a special case of the authors) is unknown")
    config = RecursionConfig(num_recursions=num_recursions, sharing_strategy=strategy)
    if sharing["enable"]:
        _allowed("kv_sharing.num_recursion", sharing["num_recursion"], (None, num_recursions), path)
        _allowed("kv_sharing.sharing", sharing["sharing"], (None, strategy), path)
        _allowed("kv_sharing.base_depth", sharing["base_depth"], (None, block), path)
        config = replace(config, kv_mode="sharing_update" if sharing["update_cache"] else "sharing")
    if not mor["enable"]:
        return config
    return _routing(config, mor, path)


def _routing(config: RecursionConfig, mor: dict, path: Path) -> RecursionConfig:
    check_keys(mor, "enable type capacity rand_router router_type z_loss z_coeff temp expert token", path)
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
        check_keys(expert, "cap_warmup_step router_func alpha sampling include_first coeff gating", path)
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
    check_keys(token, "bal_warmup_step router_func alpha balancing coeff u gating", path)
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


def parameter_names(plan: RecursionPlan, recursion: RecursionConfig, tied: bool, stored: Collection[str]) -> Names:
    """Our name -> their names of the tensors that make it up.

    Args:
        plan, recursion: of the model.
        tied: whether the head is the embedding.
        stored: their names in the file; a shared layer is looked up where it is first used.
    """
    names = outer_names(tied)
    for layer in plan.layers:
        theirs = layer_name(plan, recursion.routing, layer)
        if f"{theirs}.input_layernorm.weight" in stored:
            names = layer_names(layer.physical, theirs) | names
    lead = len(plan.first)
    if recursion.routing == "expert_choice":
        kinds = {"routers": "mor_router"}
        if recursion.router_objective == "aux_router":
            kinds["aux_routers"] = "mlp_router"
        for ours, theirs in kinds.items():
            for r in range(plan.num_recursions):
                names |= _router(f"router.{ours}.{r}", f"model.layers.{lead + r}.{theirs}", recursion)
    elif recursion.routing == "token_choice":
        names |= _router("router.router", f"model.layers.{lead}.mor_router", recursion)
        bias = [name for name in stored if name.endswith("router_bias")]
        if bias:
            names["router.balance_bias"] = (bias[0],)
    return names


def layer_name(plan: RecursionPlan, routing: str, layer: VirtualLayer) -> str:
    """Their prefix of a layer at one position: routed models wrap the layers of a recursion."""
    if routing == "none":
        return f"model.layers.{layer.index}"
    lead = len(plan.first)
    if layer.recursion is None:
        wrappers = plan.num_recursions if routing == "expert_choice" else 1
        return "model.layers.0" if layer.index == 0 else f"model.layers.{lead + wrappers}"
    slot = layer.physical - lead
    if routing == "expert_choice":
        return f"model.layers.{lead + layer.recursion}.block.{slot}"
    return f"model.layers.{lead}.block_list.{layer.recursion}.{slot}"


def first_uses(tensors: Mapping[str, Tensor], plan: RecursionPlan, routing: str) -> dict[str, Tensor]:
    """The tensors without those of later uses of shared layers.

    Raises:
        ValueError: a later use has weights of its own; the release gives expert-choice its own attention at each
            recursion.
    """
    kept = dict(tensors)
    first: dict[int, str] = {}
    for layer in plan.layers:
        theirs = layer_name(plan, routing, layer)
        names = [name for name in tensors if name.startswith(f"{theirs}.")]
        if not names or first.setdefault(layer.physical, theirs) == theirs:
            continue
        for name in names:
            shared = first[layer.physical] + name.removeprefix(theirs)
            if shared not in tensors or not torch.equal(kept.pop(name), tensors[shared]):
                raise ValueError(
                    f"{name} differs from {shared}, and both are one layer here: the model cannot be imported (the "
                    "first release of expert-choice has an attention of its own at each recursion)"
                )
    return kept


def _router(ours: str, theirs: str, recursion: RecursionConfig) -> Names:
    parts = ("0", "2") if recursion.router_type == "mlp" else ("", "")
    names = router_names(ours, f"{theirs}.router", recursion.router_type, parts)
    return {name: tuple(part.replace("..", ".") for part in parts) for name, parts in names.items()}


def check_keys(settings: dict, known: str, path: Path) -> None:
    unknown = set(settings) - set(known.split())
    if unknown:
        raise ValueError(f"{path}: unknown settings {sorted(unknown)}")


def _allowed(name: str, value, allowed: tuple, path: Path) -> None:
    if value not in allowed:
        raise ValueError(f"{path}: {name}={value!r} is not one of {allowed}")
