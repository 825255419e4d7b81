"""Parameters, floating-point operations and key/value memory, from the recursion plan.

Two counts of FLOPs, never to be mixed:
- the *paper's*: forward, linear layers and attention only, GQA ignored, capacities as planned. It reproduces the
  published step counts (docs/mor.md, sec. 7) and sets isoFLOP budgets. Adapters of recursions come on top.
- *executed*: what a step multiplies: GQA, router and head included, causal pairs once, tokens as they were really
  routed. A training step costs three forwards, less where weights are frozen, the *model* FLOPs (PaLM, arXiv
  2204.02311, app. B: MFU); the *hardware* FLOPs (HFU) add what recomputation multiplies once more.
A multiply-add is two operations. Either count of `dense_equivalent(config)` is that of the unrolled network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from mor_megatron.config.schema import Config, RecursionConfig
from mor_megatron.recursion.context import TOKENS_PER_RECURSION
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer
from mor_megatron.recursion.relaxation import adapted
from mor_megatron.recursion.routing import RoutingMethod

FORWARDS_PER_STEP = 3
"""A backward pass multiplies twice what a forward pass does: for the gradients of inputs, and of weights."""
ROW_PARALLEL = ("o", "down")
"""Linear maps whose input tensor-parallel ranks divide, not their output."""


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
class TrainingFlops:
    """FLOPs of one training token, forward and backward."""

    model: float
    """What the computation needs, whatever is kept or computed again: what MFU counts."""
    hardware: float
    """Recomputation included: what HFU counts. What a fused attention kernel computes again is not in it."""


@dataclass(frozen=True)
class Widths:
    """Widths of a layer, in numbers a token."""

    hidden: int
    """H, of the residual stream."""
    ffn: int
    """F, of the feed-forward network."""
    query: int
    """Of all query heads together; the attention's output has the same."""
    key_value: int
    """Of all keys, and of all values."""
    has_qkv_bias: bool

    @classmethod
    def of(cls, config: Config) -> Widths:
        """Those of a run's model."""
        model = config.model
        head = model.kv_channels or model.hidden_size // model.num_attention_heads
        query, key_value = head * model.num_attention_heads, head * model.key_value_heads
        return cls(model.hidden_size, model.ffn_hidden_size, query, key_value, model.add_qkv_bias)

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps (`relaxation.PARTS`)."""
        outputs = {"q": self.query, "k": self.key_value, "v": self.key_value, "gate": self.ffn, "up": self.ffn}
        inputs = {"o": self.query, "down": self.ffn}
        maps = {part: (self.hidden, width) for part, width in outputs.items()}
        return maps | {part: (width, self.hidden) for part, width in inputs.items()}

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's linear maps, biases left out."""
        return sum(inputs * outputs for inputs, outputs in self.maps.values())

    @property
    def layer_biases(self) -> int:
        """Biases of q, k and v."""
        return self.query + 2 * self.key_value if self.has_qkv_bias else 0

    @property
    def layer_norms(self) -> int:
        """Weights of a layer's two norms."""
        return 2 * self.hidden


def _vocabulary(config: Config) -> int:
    if config.model.vocab_size is None:
        raise ValueError("vocab-size is not set: give it, or a tokenizer")
    return config.model.vocab_size


def routers(config: Config) -> RoutingMethod:
    """The routing method with its parameters and buffers, which have shapes and names, but no storage."""
    method = config.routing_method
    with torch.device("meta"):
        method.build(config.model.hidden_size, torch.float32)
    return method


def router_parameters(config: Config) -> int:
    """Weights of all routers, auxiliary ones included."""
    return _router_parameters(type(config.routing_method), config.recursion, config.plan, config.model.hidden_size)


@lru_cache(maxsize=8)  # building routers takes a millisecond, and a search asks for one model's thousands of times
def _router_parameters(method: type[RoutingMethod], settings: Any, plan: RecursionPlan, hidden_size: int) -> int:
    with torch.device("meta"):
        built = method(settings, plan)
        built.build(hidden_size, torch.float32)
    return sum(weight.numel() for weight in built.parameters())


def count_parameters(config: Config) -> ParameterCount:
    """Unique, non-embedding and unrolled parameter counts.

    Raises:
        ValueError: no vocabulary size is known.
    """
    widths, plan = Widths.of(config), config.plan
    embedding = _vocabulary(config) * widths.hidden * (2 if config.model.untie_embeddings_and_output_weights else 1)
    rest = router_parameters(config) + widths.hidden  # final norm
    layer = layer_parameters(config)
    rest += plan.block_size * relaxation_parameters(config) + recursion_embedding_parameters(config)
    non_embedding = plan.num_physical_layers * layer + rest
    unrolled = plan.num_layers * layer + widths.hidden + embedding
    return ParameterCount(non_embedding + embedding, non_embedding, unrolled)


def layer_parameters(config: Config, tensor_parallel_size: int = 1) -> int:
    """Weights of one layer on one tensor-parallel rank: its share of matrices and biases, and whole norms."""
    widths = Widths.of(config)
    return (widths.layer_matrices + widths.layer_biases) // tensor_parallel_size + widths.layer_norms


def adapter_parameters(config: Config) -> tuple[int, int]:
    """Weights of the adapters of one layer of the shared block: those of factors that tensor-parallel ranks divide, on
    the side on which they divide the map, and those of factors that each of them has."""
    recursion, maps = config.recursion, Widths.of(config).maps
    divided = whole = 0
    for part, recursions in adapted(recursion, config.plan).items():
        inputs, outputs = maps[part]
        cut, other = (inputs, outputs) if part in ROW_PARALLEL else (outputs, inputs)
        divided += len(recursions) * recursion.lora_rank * cut
        whole += len(recursions) * recursion.lora_rank * other
    return divided, whole


def relaxation_parameters(config: Config, tensor_parallel_size: int = 1) -> int:
    """Weights that a layer of the shared block has beyond `layer_parameters` on one tensor-parallel rank: adapters, and
    norms of further recursions."""
    divided, whole = adapter_parameters(config)
    further = config.plan.num_recursions - 1 if config.recursion.recursion_norms else 0
    return divided // tensor_parallel_size + whole + further * Widths.of(config).layer_norms


def recursion_embedding_parameters(config: Config) -> int:
    """Weights of the vectors that recursions begin with."""
    recursion = config.recursion
    return recursion.num_recursions * config.model.hidden_size if recursion.recursion_embedding else 0


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel_size: int = 1) -> int:
    """The vocabulary rounded up to a multiple of `divisor` on every tensor-parallel rank, as Megatron-LM does."""
    unit = divisor * tensor_parallel_size
    return -(-vocab_size // unit) * unit


def planned_fractions(config: Config) -> tuple[float, ...]:
    """Expected fraction of tokens at each recursion: capacities, or balanced depths for token-choice."""
    return config.routing_method.planned_fractions()


def measured_fractions(metrics: Mapping[str, float | None], num_recursions: int) -> tuple[float, ...] | None:
    """Fraction of tokens at each recursion in the metrics of an iteration, [Nr]; None if nothing was routed."""
    names = [TOKENS_PER_RECURSION.format(r) for r in range(num_recursions)]
    return tuple(metrics[name] for name in names) if names[0] in metrics else None


def dense_equivalent(config: Config) -> Config:
    """The vanilla model of the same unrolled depth: every virtual layer has weights of its own, which are all trained,
    and no token leaves."""
    model = replace(config.model, num_layers=config.plan.num_layers)
    return replace(config, model=model, recursion=RecursionConfig(), optimizer=replace(config.optimizer, freeze="none"))


def paper_flops_per_token(config: Config) -> float:
    """Forward FLOPs a token by the authors' accounting (docs/mor.md, sec. 7): sum over layers of c*lin + c^2*att."""
    plan, hidden = config.plan, config.model.hidden_size
    fractions = planned_fractions(config)
    projection, ffn = 2 * hidden * hidden, 2 * 3 * hidden * config.model.ffn_hidden_size
    attention = 2 * config.data.seq_length * hidden
    total = 0.0
    for layer in plan.layers:
        c = active_fraction(layer, fractions)
        shares = skips_keys(plan, layer)
        total += c * ((2 if shares else 4) * projection + ffn) + c * (1.0 if shares else c) * attention
        total += c * adapter_flops(config, layer)
    return total


def adapted_maps(config: Config, layer: VirtualLayer) -> list[str]:
    """The linear maps of a virtual layer that have an adapter there."""
    recursions = adapted(config.recursion, config.plan)
    return [part for part, used in recursions.items() if layer.recursion in used]


def adapter_flops(config: Config, layer: VirtualLayer) -> int:
    """Forward FLOPs of the adapters of one virtual layer for each of its tokens."""
    maps = Widths.of(config).maps
    return 2 * config.recursion.lora_rank * sum(sum(maps[part]) for part in adapted_maps(config, layer))


def iterations_for_budget(config: Config, budget: float) -> int:
    """Iterations that a budget of forward FLOPs by the authors' accounting buys, rounded.

    Args:
        config: the run, its `global_batch_size` set.
        budget: FLOPs; the paper's are 2e18, 5e18 and 16.5e18.
    """
    tokens = config.training.global_batch_size * config.data.seq_length
    return round(budget / (paper_flops_per_token(config) * tokens))


def executed_flops_per_token(config: Config, fractions: Sequence[float] | None = None) -> float:
    """Forward FLOPs a token that are really multiplied.

    Args:
        config: the run.
        fractions: measured fraction of tokens active at each recursion, [Nr]; default: as planned.
    Raises:
        ValueError: no vocabulary size is known.
    """
    head = head_flops_per_token(config)
    return head + router_flops_per_token(config, fractions) + sum(layer_flops_per_token(config, fractions))


def training_flops_per_token(
    config: Config, fractions: Sequence[float] | None = None, teacher: Config | None = None
) -> TrainingFlops:
    """Executed FLOPs of a training token; arguments and errors as `executed_flops_per_token`.

    Args:
        teacher: of `teacher.beside`; it runs forward once.
    """
    layers, granularity = layer_work(config, fractions), config.training.recompute_granularity
    others = head_training_flops_per_token(config) + FORWARDS_PER_STEP * router_flops_per_token(config, fractions)
    others += 0.0 if teacher is None else executed_flops_per_token(teacher)
    model, hardware = (others + sum(sum(work.training(g)) for work in layers) for g in (None, granularity))
    return TrainingFlops(model, hardware)


def layer_flops_per_token(config: Config, fractions: Sequence[float] | None = None) -> tuple[float, ...]:
    """Executed forward FLOPs a token of each virtual layer, in their order; see `executed_flops_per_token`."""
    return tuple(work.linear + work.attention for work in layer_work(config, fractions))


def router_flops_per_token(config: Config, fractions: Sequence[float] | None = None) -> float:
    """Executed forward FLOPs a token of all routers."""
    fractions = planned_fractions(config) if fractions is None else fractions
    return config.routing_method.flops_per_token(router_parameters(config), fractions)


def head_flops_per_token(config: Config) -> float:
    """Forward FLOPs a token of the LM head, vocabulary padding left out.

    Raises:
        ValueError: no vocabulary size is known.
    """
    return 2.0 * config.model.hidden_size * _vocabulary(config)


def head_training_flops_per_token(config: Config) -> float:
    """FLOPs a token of the LM head, forward and backward; see `head_flops_per_token`."""
    gradients = is_reached(config, config.plan.layers[-1]) + (config.optimizer.freeze == "none")
    return (1 + gradients) * head_flops_per_token(config)


def kv_bytes_per_token(config: Config, fractions: Sequence[float] | None = None, bytes_per_number: int = 2) -> float:
    """Bytes of keys and values that generation keeps for a token, mean over tokens (docs/inference.md, the cache).

    Args:
        config: the run.
        fractions: fraction of tokens active at each recursion, [Nr]; default: as planned.
        bytes_per_number: 2 for bf16 and fp16.
    """
    plan, row = config.plan, 2 * Widths.of(config).key_value * bytes_per_number
    fractions = planned_fractions(config) if fractions is None else fractions
    return row * sum(active_fraction(layer, fractions) for layer in plan.layers if not skips_keys(plan, layer))


@dataclass(frozen=True)
class LayerWork:
    """Executed forward FLOPs a token of one virtual layer."""

    linear: float
    attention: float
    trained: float
    """Part of `linear` whose weights are not frozen."""
    is_reached: bool
    """Whether the backward pass goes back to it."""

    def training(self, recomputed: str | None) -> tuple[float, float]:
        """FLOPs a token of linear maps and of attention, forward and backward.

        Args:
            recomputed: `recompute_granularity`. A layer or a whole pass repeats the forward, the core its attention.
        """
        if not self.is_reached:
            return self.linear, self.attention
        linear = (2 + (recomputed == "full")) * self.linear + self.trained
        return linear, (FORWARDS_PER_STEP + (recomputed is not None)) * self.attention


def layer_work(config: Config, fractions: Sequence[float] | None = None) -> list[LayerWork]:
    """Work of each virtual layer; see `executed_flops_per_token`."""
    widths, plan = Widths.of(config), config.plan
    fractions = planned_fractions(config) if fractions is None else fractions
    work = []
    for layer in plan.layers:
        c = active_fraction(layer, fractions)
        shares = skips_keys(plan, layer)
        outputs = 2 * widths.query + (0 if shares else 2 * widths.key_value) + 3 * widths.ffn
        keys = 1.0 if plan.kv_mode != "caching" and layer.kv_source != layer.index else c
        attention = c * keys * 2 * config.data.seq_length * widths.query
        adapters = adapter_flops(config, layer)
        linear = 2 * widths.hidden * outputs + adapters
        trained = {"none": linear, "base": adapters, "all-but-routers": 0}[config.optimizer.freeze]
        work.append(LayerWork(c * linear, attention, c * trained, is_reached(config, layer)))
    return work


def is_reached(config: Config, layer: VirtualLayer) -> bool:
    """Whether the backward pass goes back to a virtual layer: with `--freeze`, nothing before the block is trained."""
    return config.optimizer.freeze == "none" or layer not in config.plan.first


def active_fraction(layer: VirtualLayer, fractions: Sequence[float]) -> float:
    """Fraction of tokens that a virtual layer processes, of those at each recursion, [Nr]."""
    return 1.0 if layer.recursion is None else fractions[layer.recursion]


def skips_keys(plan: RecursionPlan, layer: VirtualLayer) -> bool:
    """Whether a layer projects queries only, because it attends to another's keys and values as they are."""
    return plan.kv_mode == "sharing" and layer.kv_source != layer.index
