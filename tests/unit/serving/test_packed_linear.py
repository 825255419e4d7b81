"""Packed linear layers compute what PyTorch's do."""

from __future__ import annotations

import pytest
import torch
from serving_models import model_of
from torch import nn

from mor_megatron.serving import kernel
from mor_megatron.serving.engine import Engine
from mor_megatron.serving.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(
    kernel.choose("auto", torch.float32, torch.device("cpu")) is None, reason="there is no C++ compiler"
)


@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(16, 24, False), (33, 100, True), (20, 96, False), (5, 1, True)]
)
@torch.inference_mode()
def test_product_is_that_of_pytorch(inputs, outputs, bias):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias)
    packed, x = PackedLinear(linear), torch.randn(37, inputs)
    for rows in (0, 1, 3, 8, 15, 37):
        result = packed(x[:rows])
        torch.testing.assert_close(result, linear(x[:rows]), atol=1e-5, rtol=0)
        assert torch.equal(result, packed(x)[:rows]), "depends on the rows beside it"


@torch.inference_mode()
def test_engine_packs_a_copy():
    model = model_of("expert_bias_scaled")
    before = [type(module) for module in model.modules()]
    packed = Engine(model).runner.model
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert [type(module) for module in model.modules()] == before
    assert packed.model.embed_tokens.weight is model.model.embed_tokens.weight


def test_subclasses_stay():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3))
    assert [type(module) for module in pack(model)] == [PackedLinear, Doubled]
