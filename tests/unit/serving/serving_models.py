"""Tiny models of every kind that the engine runs, and what `generate` makes of a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.batch import generate_all

VOCAB = 40
LONGEST = 64
TOLERANCE = 3e-5  # fp32, eight layers of large weights, other row counts in every product
MARGIN = 4 * TOLERANCE  # the most likely token must lead by this, or rounding could choose another one

_EXPERT = {"num_recursions": 3, "routing": "expert_choice"}
_TOKEN = {"num_recursions": 3, "routing": "token_choice"}
KINDS = {
    "vanilla": {"num_hidden_layers": 3},
    "recursive": {"num_recursions": 3},
    "recursive_sharing": {"num_recursions": 3, "kv_mode": "sharing"},
    "expert": {**_EXPERT, "num_hidden_layers": 8},
    "expert_sharing": {**_EXPERT, "kv_mode": "sharing"},
    "expert_mlp_cycle": {
        **_EXPERT,
        "num_recursions": 4,
        "sharing_strategy": "cycle",
        "num_hidden_layers": 4,
        "router_type": "mlp",
    },
    "expert_aux_router": {**_EXPERT, "router_objective": "aux_router", "router_func": "tanh"},
    "expert_additive": {**_EXPERT, "router_gating": "additive"},
    "expert_residual": {**_EXPERT, "router_gating": "residual", "router_alpha": 1.5},
    "expert_bias_scaled": {**_EXPERT, "qkv_bias": True, "rope_theta": 5e5, "rope_scaling_factor": 8.0},
    "expert_padding_row": {**_EXPERT, "padding_row": 7, "num_key_value_heads": 2},
    "token": _TOKEN,
    "token_sharing": {**_TOKEN, "kv_mode": "sharing"},
    "expert_relaxed": {
        **_EXPERT,
        "num_key_value_heads": 2,
        "relaxation": "lora",
        "lora_rank": 3,
        "lora_alpha": 4.5,
        "recursion_norms": True,
        "recursion_embedding": True,
    },
    "token_sharing_relaxed": {
        **_TOKEN,
        "kv_mode": "sharing",
        "relaxation": "lora",
        "lora_rank": 3,
        "lora_recursions": "all_but_first",
    },
    "token_loss_free": {**_TOKEN, "router_balance": "loss_free", "router_func": "sigmoid"},
}


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32, **settings) -> MoRForCausalLM:
    """Made once; tests do not change it. Weights are large and the head is its own, or greedy decoding would repeat one
    token for ever."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": LONGEST,
        "tie_word_embeddings": False,
        "initializer_range": 0.35,
    }
    model = MoRForCausalLM(MoRConfig(**{**sizes, **KINDS.get(kind, {}), **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "_b", "recursion_embedding.weight")):
                parameter.normal_(std=0.3)
            elif "layernorm" in name and parameter.ndim > 1:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("balance_bias"):
                buffer.copy_(torch.linspace(0.1, -0.1, len(buffer)))
    return model.eval().to(dtype)


@dataclass(frozen=True)
class Expected:
    """What `generate` makes of one prompt alone."""

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    """Of prompt and continuation."""
    logprobs: torch.Tensor
    """Of all tokens that could follow each one, [prompt and continuation, V]."""


@cache
def expected(
    kind: str, prompts: tuple[tuple[int, ...], ...], new: int, dtype: torch.dtype = torch.float32, **options
) -> tuple[Expected, ...]:
    """Greedy continuations of some prompts; `options` are those of `generate_all`."""
    return tuple(_expected(model_of(kind, dtype), prompts, new, options))


def _expected(
    model: MoRForCausalLM, prompts: tuple[tuple[int, ...], ...], new: int, options: dict
) -> Iterator[Expected]:
    continuations = list(generate_all(model, [list(prompt) for prompt in prompts], len(prompts), new, **options))
    texts = [[*prompt, *done.tokens] for prompt, done in zip(prompts, continuations, strict=True)]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=False, **options)
    for prompt, done, text, logits, depths in zip(
        prompts, continuations, texts, output.logits, output.depths.tolist(), strict=True
    ):
        best = logits[len(prompt) - 1 : len(text) - 1].topk(2, dim=1)
        assert tuple(best.indices[:, 0].tolist()) == done.tokens
        assert (best.values[:, 0] - best.values[:, 1]).min() > MARGIN
        assert tuple(depths[len(prompt) : len(text)]) == done.depths
        yield Expected(done.tokens, tuple(depths[: len(text)]), logits.log_softmax(1))


def fewest_bytes(model: MoRForCausalLM, tokens: int, page_size: int) -> int:
    """Least `kv_bytes` with which an engine takes a request of so many tokens."""
    config, plan = model.config, model.model.plan
    tables = plan.num_recursions if config.kv_mode == "caching" else 1
    share = sum(model.model.router.planned_fractions()[:tables])
    layers = len(plan.first) + len(plan.last) + share * plan.block_size
    pages = -(-tokens // page_size)
    page = 2 * page_size * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return math.ceil(page * layers * max(pages, pages * tables / share))
