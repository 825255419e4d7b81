"""The table of the layout tests: named layouts, named models, and the configuration of each pair.

Everything is tiny, and sizes do not divide evenly unless they must: odd numbers of kept tokens, a vocabulary that needs
padding, masks that count different numbers of tokens on each rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mor_megatron.config.schema import (
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecursionConfig,
    TrainingConfig,
)
from mor_megatron.config.validate import validate

VOCABULARY = 61
SEQ_LENGTH = 24
RUN = 20
"""Equal tokens at the start of every other sequence: the cut of each selection falls among them."""
BLOCK = 4
"""Layers of the shared block, so that four pipeline ranks have one each."""
MICRO_BATCH = 2
GLOBAL_BATCH = 8
"""Four micro-batches for one replica, which fill a ring of four; layouts that need more or fewer have those."""
TWO = 2 * MICRO_BATCH
"""For tensor parallelism alone: gradients are accumulated once, and most of the time goes to small messages."""
STEPS = 2
"""Momentum and moments act in the second, and the masks of odd and even steps differ."""


@dataclass(frozen=True)
class Layout:
    """One way to divide a run among processes."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    pipeline_layers: tuple[int, ...] | None = None
    global_batch: int = GLOBAL_BATCH
    loss_chunk_rows: int | None = None
    """Of the 48 of a micro-batch, which one process has as a whole."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def groups(self) -> tuple[int, int]:
        """What the process groups depend on, beside the world size."""
        return self.tp, self.pp

    def __str__(self) -> str:
        return self.name


ONE = Layout("one")
"""What every layout is compared with; one process, whose batch is cut into micro-batches of the same size."""

LAYOUTS = [
    Layout("dp2", dp=2),
    Layout("dp2-zero0", dp=2, zero=0),
    Layout("dp2-zero2", dp=2, zero=2, loss_chunk_rows=20),
    Layout("dp2-zero3", dp=2, zero=3, loss_chunk_rows=20),
    Layout("tp2", tp=2, global_batch=TWO, loss_chunk_rows=20),
    Layout("tp2-sp", tp=2, global_batch=TWO, sequence_parallel=True, loss_chunk_rows=20),
    Layout("pp2", pp=2, loss_chunk_rows=20),
    Layout("pp2-uneven", pp=2, pipeline_layers=(3, 1)),
    Layout("pp2-odd", pp=2, global_batch=10),  # five micro-batches: turns of unequal lengths
    Layout("pp2-zero0", pp=2, zero=0, loss_chunk_rows=20),
    Layout("dp4", dp=4, global_batch=16),
    Layout("tp2-dp2", tp=2, dp=2),
    Layout("tp2-dp2-zero2", tp=2, dp=2, zero=2),
    Layout("tp2-dp2-zero3", tp=2, dp=2, zero=3),
    Layout("tp2-sp-dp2-zero3", tp=2, dp=2, zero=3, sequence_parallel=True, loss_chunk_rows=20),
    Layout("tp2-pp2", tp=2, pp=2),
    Layout("tp2-sp-pp2", tp=2, pp=2, sequence_parallel=True),
    Layout("pp2-dp2", pp=2, dp=2, global_batch=16),
    Layout("pp4", pp=4),
]

EXPERT = {"routing": "expert_choice", "router_aux_loss_coeff": 0.1, "router_z_loss_coeff": 0.01}
EXPERT3 = EXPERT | {"num_recursions": 3, "capacity": (1.0, 0.65, 0.3)}  # 24, 15 and 7 tokens
TOKEN3 = {"routing": "token_choice", "num_recursions": 3, "router_z_loss_coeff": 0.01}
GROUPS = {"group_query_attention": True, "num_query_groups": 2, "add_qkv_bias": True}
LORA = {"relaxation": "lora", "lora_rank": 3, "lora_alpha": 6.0}

MODELS: dict[str, dict] = {
    "vanilla": {"num_recursions": 1},
    "recursive": {"num_recursions": 3},
    "expert-nr2": EXPERT | {"num_recursions": 2, "capacity": (1.0, 0.55)},  # 24 and 13 tokens
    "expert-nr3": EXPERT3,
    "expert-sharing": EXPERT3 | {"kv_mode": "sharing"},
    "expert-sharing-update": EXPERT3 | {"kv_mode": "sharing_update"},
    "expert-aux-router": EXPERT3 | {"router_objective": "aux_router", "router_type": "mlp"},
    "expert-untied": EXPERT3 | {"untie_embeddings_and_output_weights": True},
    "expert-gqa": EXPERT3 | GROUPS | {"kv_mode": "sharing"},
    "expert-relaxed": EXPERT3
    | LORA
    | {"recursion_norms": True, "recursion_embedding": True, "router_gating": "residual", "router_alpha": 1.5},
    "expert-relaxed-gqa": EXPERT3 | LORA | GROUPS | {"kv_mode": "sharing"},
    "cycle": EXPERT3 | {"sharing_strategy": "cycle"},
    "middle-sequence": {"num_recursions": 2, "sharing_strategy": "middle_sequence", "kv_mode": "sharing"},
    "sequence-relaxed": LORA
    | {"num_recursions": 2, "sharing_strategy": "middle_sequence", "recursion_norms": True, "lora_targets": "mlp"},
    "token-balance": TOKEN3,
    "token-relaxed": TOKEN3 | LORA | {"lora_recursions": "all_but_first", "kv_mode": "sharing_update"},
    "token-loss-free": TOKEN3 | {"router_balance": "loss_free", "router_bias_update_rate": 0.01},
    "token-sharing": TOKEN3 | {"kv_mode": "sharing"},
}

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "sgd": OptimizerConfig(optimizer="sgd", lr=0.2, sgd_momentum=0.9, weight_decay=0.1, clip_grad=0.5),
    # An epsilon of the size of a clipped gradient's elements. With 1e-8, an element that is nearly zero would be
    # divided by its own rounding error: its update, of full size, would have a sign by chance in *every* layout. At
    # twice this rate, one process whose initial weights are moved by half a last bit ends 1e-5 away from itself.
    "adam": OptimizerConfig(optimizer="adam", lr=0.01, adam_eps=1e-3, weight_decay=0.1, clip_grad=0.5),
}


def build_config(model: str, layout: Layout, optimizer: str = "sgd", bf16: bool = False, **changes) -> Config:
    """The validated configuration of one cell; `changes` are fields of any section but data and layout."""
    shape = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LENGTH,
        init_method_std=0.1,
        vocab_size=VOCABULARY,
        make_vocab_size_divisible_by=6,
    )
    training = TrainingConfig(
        micro_batch_size=MICRO_BATCH,
        global_batch_size=layout.global_batch,
        train_iters=STEPS,
        zero_stage=layout.zero,
        bf16=bf16,
        loss_chunk_rows=layout.loss_chunk_rows,
    )
    settings = MODELS[model] | changes
    sections = RecursionConfig(), OPTIMIZERS[optimizer], DistillationConfig(), shape, training
    unknown = [k for k in settings if not any(hasattr(section, k) for section in sections)]
    assert not unknown, unknown
    recursion, optimization, distillation, shape, training = (
        replace(section, **{k: v for k, v in settings.items() if hasattr(section, k)}) for section in sections
    )
    ends = 2 if recursion.sharing_strategy.startswith("middle") and recursion.num_recursions > 1 else 0
    shape = replace(shape, num_layers=ends + BLOCK * recursion.num_recursions)
    config = Config(
        model=shape,
        recursion=recursion,
        data=DataConfig(seq_length=SEQ_LENGTH),
        optimizer=optimization,
        distillation=distillation,
        training=training,
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sequence_parallel,
            pipeline_model_parallel_size=layout.pp,
            pipeline_layers=layout.pipeline_layers,
        ),
    )
    return validate(config, layout.world_size)
