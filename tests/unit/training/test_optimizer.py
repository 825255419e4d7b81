"""Parameter groups and their rates."""

import torch
from torch import nn

from mor_megatron.config.schema import OptimizerConfig
from mor_megatron.training.optimizer import build_optimizer, parameter_groups, set_learning_rate


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.linear = nn.Linear(4, 3)
        self.auxiliary = nn.Linear(4, 1, bias=False)
        self.auxiliary.weight.lr_mult = 10.0
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_norms_and_biases_are_not_decayed_and_lr_mult_is_a_group():
    net = Net()
    groups = parameter_groups(net, weight_decay=0.1)
    got = [(group["weight_decay"], group["lr_mult"], [id(p) for p in group["params"]]) for group in groups]
    assert got == [
        (0.1, 1.0, [id(net.linear.weight)]),
        (0.1, 10.0, [id(net.auxiliary.weight)]),
        (0.0, 1.0, [id(net.norm.weight), id(net.linear.bias)]),
    ]


def test_learning_rate_is_multiplied():
    optimizer = build_optimizer(Net(), OptimizerConfig())
    set_learning_rate(optimizer.param_groups, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0, 0.5]


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
