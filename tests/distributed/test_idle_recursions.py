"""A rank none of whose tokens reach a recursion with adapters takes part in the reduction of their gradients."""

from __future__ import annotations

import pytest
import torch
from layout_runs import Result, differences, train
from megatron.core import parallel_state
from table import LAYOUTS, build_config
from torch import nn

from mor_megatron.model.mor_model import MoRModel

BY_NAME = {layout.name: layout for layout in LAYOUTS}


def shallow_on_one_rank(model: MoRModel) -> None:
    """Tokens of data-parallel rank 0 take full depth, those of the other stop after recursion 0."""
    bias = torch.tensor([0.0, 0.0, 10.0] if parallel_state.get_data_parallel_rank() == 0 else [10.0, 0.0, 0.0])

    def prefer(router: nn.Module, args: tuple) -> None:
        router.balance_bias.copy_(bias)

    model.router.register_forward_pre_hook(prefer)


def run(workers, name: str) -> Result:
    layout = BY_NAME[name]
    config = build_config("token-relaxed", layout, router_balance="loss_free", loss_chunk_rows=None)
    return workers.run(layout.world_size, layout.groups, train, config, shallow_on_one_rank)[0]


@pytest.fixture(scope="module")
def expected(workers) -> Result:
    """Without ZeRO, DeepSpeed itself fills in what a rank lacks."""
    return run(workers, "dp2-zero0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2", "dp2-zero2", "dp2-zero3"])
def test_zero_stages_agree(workers, expected, name):
    assert expected.reports[0].routing["tokens_per_recursion_1"] == 0.5
    found = differences(run(workers, name), expected)
    assert not found, found[:3]
