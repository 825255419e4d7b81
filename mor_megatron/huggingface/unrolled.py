"""A model without routing as a plain Llama, which every engine and quantiser of that family takes.

A vanilla model has a Llama's layers under other names. A recursive one is unrolled: its shared layers are copied to
every position at which they run, and the adapters of its recursions are added to the copies. Nothing is approximated,
and what the models share is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mor_megatron.config.schema import Config
from mor_megatron.huggingface.export import special_tokens
from mor_megatron.huggingface.published import LLAMA3
from mor_megatron.huggingface.weights import MAPS, adapted_maps, layer_names, outer_names, split
from mor_megatron.planning.accounting import count_parameters
from mor_megatron.recursion.plan import VirtualLayer


def to_llama(
    weights: Mapping[str, Tensor],
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None = None,
    depth: int | None = None,
) -> LlamaForCausalLM:
    """The unrolled model in memory, fp32, in evaluation mode.

    Args:
        weights: whole tensors by our names, vocabulary without padding.
        config: settings of the run, those of its model resolved. The vocabulary is the run's: a Llama cannot leave out
            a row for a padding token.
        tokenizer: gives the special tokens.
        depth: recursions that every token passes; default all.
    Raises:
        ValueError: the model is no Llama at any depth, or it has not as many recursions.
    """
    layers = unrolled_layers(config, depth)
    model, tied = config.model, not config.model.untie_embeddings_and_output_weights
    state = {theirs: weights[ours].clone() for ours, (theirs,) in outer_names(tied).items()}
    for i, use in enumerate(layers):
        for ours, theirs in layer_names(use.physical, f"model.layers.{i}", model.add_qkv_bias).items():
            weight = weights[ours]
            if weight.ndim == 2 and "layernorm" in ours:
                weight = weight[use.recursion]
            parts = split(ours, weight, len(theirs), model)
            state |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
        for name, update in _updates(weights, config, use):
            state[f"model.layers.{i}.{name}_proj.weight"] += update
    if model.add_qkv_bias:  # a Llama with biases has one more, which adds nothing
        zeros = {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(model.hidden_size) for i in range(len(layers))}
        state |= zeros
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama = LlamaForCausalLM(_llama_config(config, len(layers)))
    llama.load_state_dict(state)
    llama.config.rope_theta = model.rotary_base  # where readers older than rope_parameters look for it
    tokens = special_tokens(tokenizer, config)
    llama.config.update(tokens)
    llama.generation_config = GenerationConfig(**tokens)
    return llama.eval()


def unrolled_layers(config: Config, depth: int | None = None) -> tuple[VirtualLayer, ...]:
    """Layers that every token passes, in their order.

    Raises:
        ValueError: as `to_llama`.
    """
    recursion, plan = config.recursion, config.plan
    remedy = "export it without --as, for transformers with trust_remote_code"
    if config.routing_method.routes:
        raise ValueError(
            f"routing={recursion.routing} sends tokens through different layers and weighs what comes of it, which no "
            f"Llama does: {remedy}"
        )
    if depth is not None and not 1 <= depth <= plan.num_recursions:
        raise ValueError(f"depth={depth} must be between 1 and num-recursions={plan.num_recursions}")
    depth = depth or plan.num_recursions
    layers = tuple(layer for layer in plan.layers if layer.recursion is None or layer.recursion < depth)
    if any(layer.kv_source != layer.index for layer in layers):
        raise ValueError(
            f"kv-mode={recursion.kv_mode} lets a recursion attend to the keys and values of the first, which no Llama "
            f"does: {remedy}"
        )
    if recursion.recursion_embedding:
        raise ValueError(f"recursion-embedding=True adds a vector between layers, which no Llama does: {remedy}")
    return layers


def _updates(weights: Mapping[str, Tensor], config: Config, use: VirtualLayer) -> Iterator[tuple[str, Tensor]]:
    """What adapters add to the linear maps of one use of a layer: `mlp.down`, and a matrix [outputs, inputs]."""
    settings = config.recursion
    for layer, part, recursions in adapted_maps(config):
        if use.recursion in recursions:
            a, b = (weights[f"layers.{use.physical}.{layer}.adapters.{part}_{x}"] for x in "ab")
            i = use.recursion - recursions.start
            yield f"{MAPS[layer][0]}.{part}", settings.lora_scale * b[i].t() @ a[i]


def unrolling(llama: LlamaForCausalLM, config: Config) -> str:
    """In one line, what became of the model."""
    count, trained = len(llama.model.layers), config.plan.num_physical_layers
    line = f"LlamaForCausalLM of {count} layers"
    if count <= trained:
        return line
    unique, stored = count_parameters(config).unique, sum(p.numel() for p in llama.parameters())
    return f"{line}, copies of the {trained} that were trained: {stored:,} weights in place of {unique:,}"


def _llama_config(config: Config, num_layers: int) -> LlamaConfig:
    model = config.model
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor} | LLAMA3
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.key_value_heads,
        head_dim=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope,
        attention_bias=model.add_qkv_bias,
        initializer_range=model.init_method_std,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
