"""--deterministic-mode: what it chooses in PyTorch and Megatron-core, and that a step passes with it."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from test_train_step import EXPERT, cut, global_batch, make_config, make_engine

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.recursion.context import TOKENS_PER_RECURSION
from mor_megatron.training.train_step import train_step

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def deterministic(monkeypatch):
    """The configuration of a small run in the mode, which has begun; the process is as before when it is over."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    config = make_config()
    config = replace(config, training=replace(config.training, deterministic_mode=True))
    initialize_distributed(config)
    yield config
    initialize_distributed(Config())


def test_every_choice_of_kernels_is_a_deterministic_one(deterministic):
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention would warn, and stay as it is"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Ring"
    engine = make_engine(deterministic)
    assert engine.module.embedding.word_embeddings.deterministic_mode
    report = train_step(engine, cut(global_batch(), 2), deterministic, 1, 0.1)
    initialize_distributed(Config())
    assert not torch.are_deterministic_algorithms_enabled(), "a run without the flag chooses freely"
    usual = make_config()
    assert report.grad_norm == pytest.approx(
        train_step(make_engine(usual), cut(global_batch(), 2), usual, 1, 0.1).grad_norm, rel=1e-6
    )


def test_token_choice_needs_no_sum_that_cuda_has_no_deterministic_kernel_for(deterministic, monkeypatch):
    cumsum = torch.Tensor.cumsum

    def refusing(tensor, *options):
        assert not tensor.is_floating_point(), "cumsum_cuda_kernel does not have a deterministic implementation"
        return cumsum(tensor, *options)

    monkeypatch.setattr(torch.Tensor, "cumsum", refusing)
    recursion = replace(EXPERT, routing="token_choice", router_z_loss_coeff=0.0)
    config = make_config(recursion=recursion)
    report = train_step(make_engine(config), cut(global_batch(), 2), config, 1, 0.1)
    assert report.routing[TOKENS_PER_RECURSION.format(0)] == pytest.approx(1.0)
