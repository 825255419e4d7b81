"""Gradients of tied weights in one place, added where they are.

Autograd adds up the contributions of all uses of a weight, and adds the sum to `.grad` when the last of them has come.
In the backward pass of a block of Nr recursions, the sums of the whole block would be alive beside `.grad`, and each
addition would fill new memory. So each use of a weight is a leaf of its own, whose gradient is added to the weight's
`.grad` as soon as it is computed.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


def accumulate_each_use(model: nn.Module) -> None:
    """Let every call of a module of `model` add the gradients of the module's own weights straight to their `.grad`.

    A weight that is read outside of its module's call (the embedding as head) is that use by itself. A hook on a weight
    sees the contributions one by one.
    """
    for module in model.modules():
        if any(weight.requires_grad for weight in module.parameters(recurse=False)):
            _own_leaf_in_each_call(module)


def _own_leaf_in_each_call(module: nn.Module) -> None:
    weights: list[dict[str, nn.Parameter | None]] = []  # those of the calls under way
    once = isinstance(module, (ColumnParallelLinear, RowParallelLinear))

    def begin(module: nn.Module, args: tuple) -> None:
        weights.append(dict(module._parameters))
        if torch.is_grad_enabled():
            uses = {name: _use(w, once) for name, w in weights[-1].items() if _is_trained(w)}
            module._parameters.update(uses)

    def end(module: nn.Module, args: tuple, output: object) -> None:
        module._parameters.update(weights.pop())

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)


def _is_trained(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad


def _use(weight: Tensor, once: bool) -> Tensor:
    """A leaf with the weight's storage, whose gradient goes to the weight's `.grad`.

    Args:
        once: a single operation reads the leaf, so that its 16-bit gradient can be added as it is. Several would be
            summed first, which takes fp32.
    """
    leaf = weight.detach().requires_grad_()
    in_place = weight.grad is not None
    leaf.grad_dtype = None if once and in_place else weight.grad_dtype
    if in_place:
        leaf.grad = weight.grad
    else:
        leaf.register_post_accumulate_grad_hook(partial(_hand_over, weight))
    for hook in (weight._backward_hooks or {}).values():
        leaf.register_hook(hook)
    return leaf


def _hand_over(weight: Tensor, leaf: Tensor) -> None:
    if weight.grad is None:
        weight.grad = leaf.grad
    else:
        weight.grad.add_(leaf.grad)
    leaf.grad = None
