"""Parameters and floating-point operations, from the recursion plan.

Two counts of FLOPs, never to be mixed:
- the *paper's*: forward, linear layers and attention only, GQA ignored, capacities as planned. It reproduces the
  published step counts (docs/mor.md, sec. 7) and sets isoFLOP budgets.
- *executed*: what a step multiplies: GQA, router and head included, causal pairs once, tokens as they were really
  routed. It is what utilisation is measured with. A training step costs three forwards.
A multiply-add is two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mor_megatron.config.schema import Config
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer, default_capacities, plan_from_config


@dataclass(frozen=True)
class ParameterCount:
    """Number of weights."""

    unique: int
    """Stored and trained, vocabulary padding left out."""
    non_embedding: int
    """unique without embedding and untied head (the paper's model sizes)."""
    unrolled: int
    """Of a vanilla model of the same unrolled depth."""


@dataclass(frozen=True)
class _Widths:
    hidden: int
    ffn: int
    query: int
    key_value: int

    @property
    def layer_matrices(self) -> int:
        return self.hidden * (2 * self.query + 2 * self.key_value) + 3 * self.hidden * self.ffn

    @property
    def layer_norms(self) -> int:
        return 2 * self.hidden


def _widths(config: Config) -> _Widths:
    model = config.model
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups if model.group_query_attention else model.num_attention_heads
    return _Widths(model.hidden_size, model.ffn_hidden_size, head * model.num_attention_heads, head * groups)


def _vocabulary(config: Config, vocab_size: int | None) -> int:
    vocabulary = vocab_size or config.model.vocab_size
    if vocabulary is None:
        raise ValueError("vocab-size is not set: give it, or a tokenizer")
    return vocabulary


def router_parameters(config: Config) -> int:
    """Weights of all routers, auxiliary ones included."""
    recursion, hidden = config.recursion, config.model.hidden_size

    def one(outputs: int) -> int:
        return hidden * outputs if recursion.router_type == "linear" else 2 * hidden * (hidden + outputs)

    if recursion.routing == "token_choice":
        return one(recursion.num_recursions)
    if recursion.routing == "expert_choice":
        return recursion.num_recursions * one(1) * (2 if recursion.router_objective == "aux_router" else 1)
    return 0


def count_parameters(config: Config, vocab_size: int | None = None) -> ParameterCount:
    """Unique, non-embedding and unrolled parameter counts.

    Raises:
        ValueError: neither vocab_size nor config.model.vocab_size is set.
    """
    widths, plan = _widths(config), plan_from_config(config)
    embedding = (
        _vocabulary(config, vocab_size) * widths.hidden * (2 if config.model.untie_embeddings_and_output_weights else 1)
    )
    rest = router_parameters(config) + widths.hidden  # final norm
    layer = layer_parameters(config)
    non_embedding = plan.num_physical_layers * layer + rest
    unrolled = plan.num_layers * layer + widths.hidden + embedding
    return ParameterCount(non_embedding + embedding, non_embedding, unrolled)


def layer_parameters(config: Config, tensor_parallel_size: int = 1) -> int:
    """Weights of one layer on one tensor-parallel rank: its share of the matrices, and whole norms."""
    widths = _widths(config)
    return widths.layer_matrices // tensor_parallel_size + widths.layer_norms


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel_size: int = 1) -> int:
    """The vocabulary rounded up to a multiple of `divisor` on every tensor-parallel rank, as Megatron-LM does."""
    unit = divisor * tensor_parallel_size
    return -(-vocab_size // unit) * unit


def planned_fractions(config: Config) -> tuple[float, ...]:
    """Expected fraction of tokens at each recursion: capacities, or balanced depths for token-choice."""
    plan = plan_from_config(config)
    return default_capacities(plan.num_recursions) if config.recursion.routing == "token_choice" else plan.capacities


def paper_flops_per_token(config: Config) -> float:
    """Forward FLOPs a token by the authors' accounting (docs/mor.md, sec. 7): sum over layers of c*lin + c^2*att."""
    plan, hidden = plan_from_config(config), config.model.hidden_size
    fractions = planned_fractions(config)
    projection, ffn = 2 * hidden * hidden, 2 * 3 * hidden * config.model.ffn_hidden_size
    attention = 2 * config.data.seq_length * hidden
    total = 0.0
    for layer in plan.layers:
        c = _fraction(layer, fractions)
        shares = _skips_keys(plan, layer)
        total += c * ((2 if shares else 4) * projection + ffn) + c * (1.0 if shares else c) * attention
    return total


def executed_flops_per_token(
    config: Config, fractions: Sequence[float] | None = None, vocab_size: int | None = None
) -> float:
    """Forward FLOPs a token that are really multiplied; a training step takes three times as many.

    Args:
        config: the run.
        fractions: measured fraction of tokens active at each recursion, [Nr]; default: as planned.
        vocab_size: default config.model.vocab_size.
    Raises:
        ValueError: no vocabulary size is known.
    """
    head = head_flops_per_token(config, vocab_size)
    return head + 2.0 * router_parameters(config) + sum(layer_flops_per_token(config, fractions))


def layer_flops_per_token(config: Config, fractions: Sequence[float] | None = None) -> tuple[float, ...]:
    """Executed forward FLOPs a token of each virtual layer, in their order; see `executed_flops_per_token`."""
    widths, plan = _widths(config), plan_from_config(config)
    fractions = planned_fractions(config) if fractions is None else fractions
    flops = []
    for layer in plan.layers:
        c = _fraction(layer, fractions)
        shares = _skips_keys(plan, layer)
        outputs = 2 * widths.query + (0 if shares else 2 * widths.key_value) + 3 * widths.ffn
        keys = 1.0 if plan.kv_mode != "caching" and layer.kv_source != layer.index else c
        flops.append(c * 2 * widths.hidden * outputs + c * keys * 2 * config.data.seq_length * widths.query)
    return tuple(flops)


def head_flops_per_token(config: Config, vocab_size: int | None = None) -> float:
    """Forward FLOPs a token of the LM head, vocabulary padding left out.

    Raises:
        ValueError: no vocabulary size is known.
    """
    return 2.0 * config.model.hidden_size * _vocabulary(config, vocab_size)


def _fraction(layer: VirtualLayer, fractions: Sequence[float]) -> float:
    return 1.0 if layer.recursion is None else fractions[layer.recursion]


def _skips_keys(plan: RecursionPlan, layer: VirtualLayer) -> bool:
    return plan.kv_mode == "sharing" and layer.kv_source != layer.index
