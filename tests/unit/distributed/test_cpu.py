"""Megatron-core's tensor and sequence parallelism on the CPU equals two plain matrix products."""

from __future__ import annotations

import pytest
import torch
from linears import problem, run

from mor_megatron.config.schema import Config, ModelConfig, ParallelConfig
from mor_megatron.config.validate import validate


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_parallel_linears(workers, sequence_parallel):
    config = Config(
        model=ModelConfig(hidden_size=8, ffn_hidden_size=12, num_attention_heads=2),
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel),
    )
    x, weight, first, second = problem()
    for tensor in (x, first, second):
        tensor.requires_grad_()
    y = x @ first.T @ second.T
    (y * weight).sum().backward()

    ranks = workers.run(2, ("linears", 2, 1), run, validate(config, 2))
    outputs, inputs, ups, downs = zip(*ranks, strict=True)
    if sequence_parallel:
        outputs, inputs = [torch.cat(outputs)], [torch.cat(inputs)]
    for output, gradient in zip(outputs, inputs, strict=True):
        torch.testing.assert_close(output, y.detach())
        torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close(torch.cat(ups, 0), first.grad)
    torch.testing.assert_close(torch.cat(downs, 1), second.grad)
