"""Gradients of tied weights in one place, added where they are.

Autograd adds up the contributions of all uses of a weight, and adds the sum to `.grad` when the last of them has come.
In the backward pass of a block of Nr recursions, the sums of the whole block would be alive beside `.grad`. So each
use of a weight is a leaf of its own, whose gradient is added to the weight's `.grad` as soon as it is computed. On
CUDA, the product that computes the gradient of a linear layer adds it.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor, nn

from mor_megatron.model.products import add_product, adds_in_fp32


def accumulate_each_use(model: nn.Module) -> None:
    """Let every call of a module of `model` add the gradients of the module's own weights straight to their `.grad`.

    A weight that is read outside of its module's call (the embedding as head) is that use by itself. A hook on a weight
    sees the contributions one by one.
    """
    products_add = _products_add()
    for module in model.modules():
        if any(weight.requires_grad for weight in module.parameters(recurse=False)):
            _own_leaf_in_each_call(module, products_add)


class ProductsThatAdd:
    """What Megatron-core takes from Apex, by PyTorch alone."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, total: Tensor) -> None:
        """total [out, in] += gradient [n, out] and input [n, in] of a linear layer, multiplied."""
        add_product(total, grad.t(), x)


def _own_leaf_in_each_call(module: nn.Module, products_add: bool) -> None:
    weights: list[dict[str, nn.Parameter | None]] = []  # those of the calls under way
    once = isinstance(module, (ColumnParallelLinear, RowParallelLinear))

    def begin(module: nn.Module, args: tuple) -> None:
        weights.append(dict(module._parameters))
        if torch.is_grad_enabled():
            uses = {name: _use(w, once) for name, w in weights[-1].items() if _is_trained(w)}
            module._parameters.update(uses)
            if once and products_add:
                _let_product_add(module)

    def end(module: nn.Module, args: tuple, output: object) -> None:
        module._parameters.update(weights.pop())
        if once:
            module.gradient_accumulation_fusion = False

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)


def _products_add() -> bool:
    return torch.cuda.is_available() and adds_in_fp32()


def _let_product_add(module: ColumnParallelLinear | RowParallelLinear) -> None:
    """Have Megatron-core add the weight's gradient to `main_grad`; autograd then gets none."""
    leaf = module.weight
    if leaf is not None and leaf.grad is not None and not leaf._backward_hooks:
        layers.fused_weight_gradient_mlp_cuda = ProductsThatAdd
        leaf.main_grad = leaf.grad
        module.gradient_accumulation_fusion = True


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
