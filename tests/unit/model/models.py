"""The small models that the unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.model.mor_model import MoRModel, build_model

VOCAB = 64
SEQ = 32

RECURSIONS = {
    "vanilla": {},
    "recursive": {"num_recursions": 3},
    "recursive_sharing": {"num_recursions": 3, "kv_mode": "sharing"},
    "sequence_sharing": {"num_recursions": 3, "kv_mode": "sharing", "sharing_strategy": "middle_sequence"},
    "expert": {"num_recursions": 3, "routing": "expert_choice"},
    "expert_nr2_cycle": {"num_recursions": 2, "routing": "expert_choice", "sharing_strategy": "cycle"},
    "expert_sharing": {"num_recursions": 3, "routing": "expert_choice", "kv_mode": "sharing"},
    "expert_sharing_update": {"num_recursions": 3, "routing": "expert_choice", "kv_mode": "sharing_update"},
    "expert_aux_router": {"num_recursions": 3, "routing": "expert_choice", "router_objective": "aux_router"},
    "token": {"num_recursions": 3, "routing": "token_choice", "router_z_loss_coeff": 1e-3},
    "token_cycle": {"num_recursions": 2, "routing": "token_choice", "sharing_strategy": "cycle"},
    "token_loss_free": {"num_recursions": 3, "routing": "token_choice", "router_balance": "loss_free"},
    "token_sharing": {"num_recursions": 3, "routing": "token_choice", "kv_mode": "sharing"},
    "token_sharing_update": {"num_recursions": 3, "routing": "token_choice", "kv_mode": "sharing_update"},
}

LORA = {"relaxation": "lora", "lora_rank": 3, "lora_alpha": 6.0}
RELAXED = {
    "recursive_relaxed": RECURSIONS["recursive"] | LORA | {"recursion_norms": True},
    "sequence_relaxed": RECURSIONS["sequence_sharing"] | LORA | {"recursion_norms": True},
    "expert_relaxed": RECURSIONS["expert"] | LORA | {"recursion_norms": True, "recursion_embedding": True},
    "token_relaxed": RECURSIONS["token_sharing_update"] | LORA | {"lora_recursions": "all_but_first"},
}
"""Models whose recursions differ."""


def small_config(name: str, **model) -> Config:
    shape = ModelConfig(
        num_layers=8, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, max_position_embeddings=SEQ,
        init_method_std=0.1, vocab_size=VOCAB,
    )  # fmt: skip
    recursion = RecursionConfig(**(RECURSIONS | RELAXED)[name])
    return validate(Config(model=replace(shape, **model), recursion=recursion, data=DataConfig(seq_length=SEQ)))


def small_model(name: str, **model) -> MoRModel:
    return build_model(small_config(name, **model))


def random_ids(batch: int = 3, length: int = SEQ, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def training_batch(ids: torch.Tensor) -> Batch:
    return Batch(ids, labels=ids.roll(-1, dims=1))


@contextmanager
def weights_in_their_modules(model: nn.Module) -> Iterator[None]:
    """Weights are NaN but while their own module runs, as if they were offloaded or partitioned between its calls."""
    values_of = {weight: weight.data for weight in model.parameters()}
    with ExitStack() as stack:
        for module in model.modules():
            own = [(weight, values_of[weight]) for weight in module.parameters(recurse=False)]

            def give(module, arguments, own=own):
                for weight, values in own:
                    weight.data = values

            def take(module, arguments, result, own=own):
                for weight, values in own:
                    weight.data = torch.full_like(values, float("nan"))

            if own:
                stack.callback(give, None, None)
                stack.callback(module.register_forward_pre_hook(give).remove)
                stack.callback(module.register_forward_hook(take).remove)
                take(None, None, None)
        yield
