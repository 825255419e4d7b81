"""A small training model and its export in memory, for the tests of the exported format."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import torch
from models import RECURSIONS, RELAXED, SEQ, VOCAB, random_ids, small_config
from torch import Tensor

from mor_megatron.data.batch import Batch
from mor_megatron.huggingface.convert_config import export_config
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.huggingface.weights import export_names, to_theirs
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.model.stored_names import stored_name
from mor_megatron.recursion.context import RoutingContext

ALL = (
    *RECURSIONS,
    *RELAXED,
    "expert_mlp_tanh",
    "expert_additive",
    "expert_residual",
    "token_residual",
    "token_mlp",
    "expert_sharing_update_bias",
)
ROUTED = tuple(name for name in ALL if "expert" in name or "token" in name)
DECODED = (
    "vanilla",
    "recursive",
    "recursive_sharing",
    "sequence_sharing",
    "expert",
    "expert_sharing",
    "expert_sharing_update",
    "expert_aux_router",
    "token",
    "token_loss_free",
    "token_sharing",
    "token_sharing_update",
    "expert_relaxed",
)
EXTRA = {
    "expert_mlp_tanh": {"router_type": "mlp", "router_func": "tanh", "router_temperature": 0.7},
    "expert_additive": {"router_gating": "additive"},
    "expert_residual": {"router_gating": "residual", "router_alpha": 1.5},
    "token_residual": {"router_gating": "residual"},
    "token_mlp": {"router_type": "mlp", "router_func": "sigmoid"},
}
BIASED = {"add_qkv_bias": True, "use_rope_scaling": True, "rotary_base": 500000.0}
"""Model settings of names that end in `bias`: Qwen2's biases and Llama 3's scaled rotary embedding."""
TOLERANCE = 1e-5  # fp32, eight layers, other row counts in every product
__all__ = ["ALL", "DECODED", "ROUTED", "SEQ", "TOLERANCE", "VOCAB", "exported", "pair", "random_ids", "training_logits"]


@cache
def pair(name: str) -> tuple[MoRModel, MoRForCausalLM]:
    """Made once; tests do not change them."""
    kind = re.sub("_(mlp|additive|residual|bias).*", "", name)
    config = small_config(
        kind, group_query_attention=True, num_query_groups=2, **BIASED if name.endswith("bias") else {}
    )
    recursion = replace(config.recursion, **EXTRA.get(name, {}))
    if "expert" in name:
        recursion = replace(recursion, router_aux_loss_coeff=0.1)
    model = build_model(replace(config, recursion=recursion))
    spread_routing(model)
    return model.eval(), exported(model)


def spread_routing(model: MoRModel) -> None:
    """Routers that disagree about tokens, as trained ones do; fresh ones send half of them each way at most. And
    recursions that differ, where they may."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("router.") or name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif getattr(parameter, "keeps_initial", False):  # what recursions differ by
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("balance_bias"):
                buffer.copy_(torch.linspace(0.1, -0.1, len(buffer)))


def exported(model: MoRModel) -> MoRForCausalLM:
    """The same model for transformers."""
    config = export_config(model.run_config, eos_token_id=None)
    state = model.state_dict()
    parameters = {stored_name(name, state): state[name] for name in state if not name.endswith("_extra_state")}
    for name in parameters:
        if "word_embeddings" in name or "output_layer" in name:
            parameters[name] = parameters[name][: model.vocab_size]
    result = MoRForCausalLM(config)
    theirs = to_theirs(parameters, export_names(model.run_config), model.run_config.model)
    missing, unexpected = result.load_state_dict(theirs, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected
    result.tie_weights()
    return result.eval()


@torch.no_grad()
def training_logits(model: MoRModel, ids: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """Logits [B, S, V] of the training stack by threshold, and how many recursions each token passed [B, S]."""
    context = RoutingContext(selection="threshold", trace={}, **options)
    logits = model(Batch(ids), context)
    if "depth" in context.trace:
        return logits, context.trace["depth"].t() + 1
    active = [mask for name, mask in context.trace.items() if name.startswith("active_")]
    return logits, sum(mask.int() for mask in active).t() if active else None
