"""Every setting of a run, once: name, type, default, meaning. Here those of the model; `run_schema.py` has the others.

A field `num_layers` is the flag `--num-layers` and the YAML key `num-layers`. Names are Megatron-LM's where it has
one, DeepSpeed's for ZeRO, and our own for Mixture-of-Recursions. A field's docstring is its `--help` text. Beside it
stand its range, when it is read, and what its change means to a run that loads a checkpoint, where that is not what its
section says (`recursion.setting`). `validate.py` checks how fields fit together, and `cli.py` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, make_dataclass
from functools import cached_property
from typing import Any, Literal, get_type_hints

from mor_megatron.config.run_schema import (
    CheckpointConfig,
    DataConfig,
    DistillationConfig,
    FaultConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from mor_megatron.recursion.methods import METHODS, method_of
from mor_megatron.recursion.plan import STRATEGIES, RecursionPlan, build_plan, effective_depth
from mor_megatron.recursion.relaxation import RelaxationSettings
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.setting import Change, setting

CHANGE = "change"
"""Key of a section's metadata under which stands what most changes of its settings mean."""

_WITH_GROUPS = ("--group-query-attention", lambda config: config.model.group_query_attention)
_WITH_ROPE_SCALING = ("--use-rope-scaling", lambda config: config.model.use_rope_scaling)
# Beside the settings of routing methods, which travel with exports, the condition is on their section alone.
_WITH_RECURSIONS = ("--num-recursions above 1", lambda sharing: sharing.num_recursions > 1)


@dataclass(frozen=True)
class ModelConfig:
    """Decoder shape (LLaMA family: RMSNorm, SwiGLU, RoPE; no biases but, as in Qwen2, those of q, k and v)."""

    num_layers: int = setting(8, least=1)
    """Unrolled depth: virtual layers that a token of full depth passes."""
    hidden_size: int = setting(256, least=1, change=Change.WEIGHTS)
    """Width of the residual stream, H."""
    ffn_hidden_size: int = setting(704, least=1, change=Change.WEIGHTS)
    """Inner width of the SwiGLU feed-forward."""
    num_attention_heads: int = setting(4, least=1, change=Change.WEIGHTS)
    """Query heads."""
    group_query_attention: bool = setting(False, change=Change.WEIGHTS)
    """Use grouped-query attention with --num-query-groups key/value heads."""
    num_query_groups: int | None = setting(None, least=1, read_with=_WITH_GROUPS, change=Change.WEIGHTS)
    """Key/value heads when --group-query-attention is set."""
    kv_channels: int | None = setting(None, least=1, change=Change.WEIGHTS)
    """Width of one head; default hidden-size / num-attention-heads."""
    max_position_embeddings: int = setting(2048, least=1, change=Change.REPORTED)
    """Longest sequence the model may see."""
    norm_epsilon: float = setting(1e-5, above=0)
    """RMSNorm epsilon."""
    rotary_base: float = setting(10000.0, above=0)
    """RoPE theta."""
    use_rope_scaling: bool = False
    """Stretch the slow rotary frequencies as Llama 3.1 does, for sequences longer than its first 8192 positions."""
    rope_scaling_factor: float = setting(8.0, above=0, read_with=_WITH_ROPE_SCALING)
    """How far: 8 in Llama 3.1 and 3.3, 32 in Llama 3.2."""
    add_qkv_bias: bool = setting(False, change=Change.WEIGHTS)
    """Give the query, key and value projections a bias, as Qwen2 does; it starts at 0."""
    init_method_std: float = setting(0.02, least=0, change=Change.REPORTED)
    """Every linear, embedding and router weight starts from N(0, std^2) (MoR: no depth scaling)."""
    untie_embeddings_and_output_weights: bool = setting(False, change=Change.WEIGHTS)
    """Give the LM head its own weight instead of the embedding's."""
    vocab_size: int | None = setting(None, least=1, change=Change.WEIGHTS)
    """Vocabulary before padding; default: the tokenizer's."""
    make_vocab_size_divisible_by: int = setting(128, least=1, change=Change.REPORTED)
    """The embedding is padded to a multiple of this."""

    @property
    def key_value_heads(self) -> int:
        """Heads that have keys and values: the groups of query heads, or every head."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads


@dataclass(frozen=True)
class SharingConfig:
    """What makes it Mixture-of-Recursions: sharing, key/value strategy, and which routing method there is."""

    num_recursions: int = setting(1, least=1)
    """Nr: applications of the shared block; 1 with routing none is a vanilla Transformer."""
    sharing_strategy: str = "middle_cycle"
    """Which virtual layers share a physical one (paper, table 1); middle_* keeps the first and last layer unique."""
    depth_rounding: Literal["error", "down", "up"] = setting("error", read_with=_WITH_RECURSIONS, change=Change.SILENT)
    """What to do when Nr does not divide the shared depth."""
    routing: str = "none"
    """expert_choice: each recursion picks tokens; token_choice: each token picks its depth; none: every token, every
    recursion."""
    kv_mode: Literal["caching", "sharing", "sharing_update"] = "caching"
    """caching: keys/values of a recursion's own tokens; sharing: those of recursion 0 for all; sharing_update: those
    of recursion 0 with the active rows replaced."""
    extension: str | None = setting(None, change=Change.SILENT)
    """Python file that registers further sharing strategies and routing methods (docs/extending.md)."""


def recursion_config() -> type[SharingConfig]:
    """`SharingConfig` with the settings of relaxation and of all registered routing methods."""
    choices = [
        ("sharing_strategy", Literal[tuple(STRATEGIES)], setting("middle_cycle", read_with=_WITH_RECURSIONS)),
        ("routing", Literal[tuple(METHODS)], setting("none")),
    ]
    settings = dict.fromkeys(method.Settings for method in METHODS.values())
    bases = (*reversed(settings), RelaxationSettings, SharingConfig)
    return make_dataclass("RecursionConfig", choices, bases=bases, frozen=True, namespace={"__module__": __name__})


RecursionConfig = recursion_config()


@dataclass(frozen=True)
class Config:
    """A whole run. Sections group the fields, and say what most of their changes mean; flags and YAML keys are flat."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={CHANGE: Change.FUNCTION})
    recursion: RecursionConfig = field(default_factory=lambda: RecursionConfig(), metadata={CHANGE: Change.FUNCTION})
    data: DataConfig = field(default_factory=DataConfig, metadata={CHANGE: Change.REPORTED})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata={CHANGE: Change.REPORTED})
    distillation: DistillationConfig = field(default_factory=DistillationConfig, metadata={CHANGE: Change.REPORTED})
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={CHANGE: Change.REPORTED})
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={CHANGE: Change.REPORTED})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={CHANGE: Change.SILENT})
    faults: FaultConfig = field(default_factory=FaultConfig, metadata={CHANGE: Change.SILENT})
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={CHANGE: Change.SILENT})

    @cached_property
    def plan(self) -> RecursionPlan:
        """Which layer runs where, how often and for how many tokens.

        Raises:
            ValueError: depth, number of recursions and sharing strategy do not fit.
        """
        recursion = self.recursion
        count, strategy = recursion.num_recursions, recursion.sharing_strategy
        depth = effective_depth(self.model.num_layers, count, strategy, recursion.depth_rounding)
        capacities = method_of(recursion.routing).capacities(recursion, count)
        return build_plan(depth, count, strategy, recursion.kv_mode, capacities)

    @property
    def is_ring(self) -> bool:
        """Whether a micro-batch passes every pipeline rank once a recursion (planning/stages.py)."""
        plan = self.plan
        return self.parallel.pipeline_model_parallel_size > 1 and plan.num_recursions > 1 and plan.is_cyclic

    @property
    def routing_method(self) -> RoutingMethod:
        """The routing method without weights: what can be said of it from the settings alone."""
        return method_of(self.recursion.routing)(self.recursion, self.plan)

    def settings(self) -> Iterator[tuple[str, Field, Any]]:
        """Every setting: the name of its section, its field, its value."""
        for section in fields(self):
            part = getattr(self, section.name)
            for entry in fields(part):
                yield section.name, entry, getattr(part, entry.name)


def setting_types() -> dict[str, tuple[str, Any]]:
    """Every setting there is now, by its name: its section and its type."""
    return {
        name: (section, hint)
        for section, kind in get_type_hints(Config).items()
        for name, hint in get_type_hints(kind).items()
    }
