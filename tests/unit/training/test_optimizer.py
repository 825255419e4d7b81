"""Parameter groups and their learning rates."""

import pytest
import torch
from torch import nn

from mor_megatron.config.schema import OptimizerConfig
from mor_megatron.training.optimizer import build_optimizer, parameter_groups, set_learning_rate, uses_fused_adam


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.linear = nn.Linear(4, 3)
        self.auxiliary = nn.Linear(4, 1, bias=False)
        self.auxiliary.weight.lr_mult = 10.0
        self.adapter = nn.Linear(4, 2, bias=False)
        self.adapter.weight.lr_mult, self.adapter.weight.weight_decay = 3.0, 0.02
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_norms_and_biases_are_not_decayed_and_lr_mult_is_a_group():
    net = Net()
    groups = parameter_groups(net, weight_decay=0.1)
    got = [(group["weight_decay"], group["lr_mult"], [id(p) for p in group["params"]]) for group in groups]
    assert got == [
        (0.1, 1.0, [id(net.linear.weight)]),
        (0.02, 3.0, [id(net.adapter.weight)]),
        (0.1, 10.0, [id(net.auxiliary.weight)]),
        (0.0, 1.0, [id(net.norm.weight), id(net.linear.bias)]),
    ]


def test_learning_rate_is_multiplied():
    optimizer = build_optimizer(Net(), OptimizerConfig())
    set_learning_rate(optimizer.param_groups, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.5, 5.0, 0.5]


def test_decay_is_decoupled_and_spares_norms():
    """With a zero gradient, AdamW multiplies decayed weights by 1 - lr * wd and leaves the others."""
    net = Net()
    optimizer = build_optimizer(net, OptimizerConfig(weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer.param_groups, 0.5)
    optimizer.step()
    torch.testing.assert_close(net.linear.weight, before["linear.weight"] * 0.95)
    torch.testing.assert_close(net.auxiliary.weight, before["auxiliary.weight"] * 0.5)
    assert torch.equal(net.norm.weight, before["norm.weight"])
    assert torch.equal(net.linear.bias, before["linear.bias"])


def test_step_matches_adamw_by_hand():
    """Two steps of the update in Loshchilov & Hutter (2019), with the paper's betas."""
    net = nn.Linear(3, 2, bias=False)
    config = OptimizerConfig(weight_decay=0.1)
    optimizer = build_optimizer(net, config)
    weight = net.weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, lr in ((1, 0.1), (2, 0.05)):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        net.weight.grad = gradient
        set_learning_rate(optimizer.param_groups, lr)
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        weight = weight * (1 - lr * 0.1)
        weight -= lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(net.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", ["auto", "on", "off"])
def test_a_fused_step_is_the_same_step(fused):
    config = OptimizerConfig(fused_optimizer=fused, weight_decay=0.1)
    assert uses_fused_adam(config) == (fused != "off")  # PyTorch has fused AdamW for CPUs and CUDA
    torch.manual_seed(0)
    net = Net()
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    reference = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained.items()}
    optimizer = build_optimizer(net, config)
    plain = torch.optim.AdamW(reference.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=False)
    assert {group["fused"] for group in optimizer.param_groups} == {fused != "off"}
    for group in optimizer.param_groups:
        group["weight_decay"], group["lr_mult"] = 0.0, 1.0
    for name, parameter in trained.items():
        parameter.grad = torch.randn_like(parameter)
        reference[name].grad = parameter.grad.clone()
    set_learning_rate(optimizer.param_groups, 0.1)
    optimizer.step()
    plain.step()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, reference[name], rtol=1e-6, atol=1e-7)


def test_a_missing_fused_adam_is_noticed(monkeypatch):
    adam = torch.optim.AdamW

    def without_fused(*args, fused=False, **kwargs):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return adam(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    assert not uses_fused_adam(OptimizerConfig())
    with pytest.raises(ValueError, match="fused-optimizer=on, but cpu has no fused AdamW: use auto or off"):
        uses_fused_adam(OptimizerConfig(fused_optimizer="on"))
