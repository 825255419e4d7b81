"""Initial weights: drawn for each parameter from the run's seed and its stored name, and then cut.

So the same seed gives the same model in every layout, and a rank draws only what it holds.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state
from torch import nn

from mor_megatron.distributed.sharding import cut
from mor_megatron.model.stored_names import stored_parameters


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int, std: float, vocab_size: int, aliases: dict[str, str]) -> None:
    """Fill every parameter of two or more dimensions with N(0, std^2); norm weights stay 1 (docs/mor.md, sec. 1).

    Those stay as they are, too, that `recursion.relaxation.keep_initial` has marked.

    Args:
        model: parameters carry Megatron-core's tensor-parallel attributes where they are cut.
        seed: of the run.
        std: standard deviation; there is no depth scaling.
        vocab_size: rows of embedding and head that are drawn; the padding is 0, for its amount depends on the layout.
        aliases: name of a copy -> name whose values it gets.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in stored_parameters(model):
        if parameter.ndim < 2 or getattr(parameter, "keeps_initial", False):
            continue
        name = aliases.get(name, name)
        shape = list(parameter.shape)
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        if is_cut:
            shape[parameter.partition_dim] *= size
        full = torch.zeros(shape)
        rows = full[:vocab_size] if "word_embeddings" in name or "output_layer" in name else full
        rows.normal_(std=std, generator=_generator(seed, name))
        share = cut(full, parameter.partition_dim, parameter.partition_stride, rank, size) if is_cut else full
        parameter.copy_(share)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
