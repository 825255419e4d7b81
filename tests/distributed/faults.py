"""Plausible errors of a parallel implementation, planted in a model: the comparison must detect each of them."""

from __future__ import annotations

from itertools import groupby

from torch import Tensor

from mor_megatron.model.mor_model import MoRModel
from mor_megatron.recursion.plan import VirtualLayer


def without_one_recursion(model: MoRModel) -> None:
    """The second use of a tied layer adds nothing to its gradient; forward and all other gradients stay."""
    run = model.run_layers

    def spoiled(layers: tuple[VirtualLayer, ...], rows: Tensor, *rest) -> Tensor:
        for recursion, group in groupby(layers, key=lambda layer: layer.recursion):
            group = tuple(group)
            weights = [weight for layer in group for weight in model.layers[layer.physical].parameters()]
            for weight in weights:
                weight.requires_grad_(recursion != 1)
            rows = run(group, rows, *rest)
            for weight in weights:
                weight.requires_grad_(True)
        return rows

    model.run_layers = spoiled


def adapters_without_one_recursion(model: MoRModel) -> None:
    """The second recursion adds nothing to the gradients of its own adapters."""

    def without(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[1] = 0.0
        return gradient

    for name, weight in model.named_parameters():
        if ".adapters." in name:
            weight.register_hook(without)


def doubled_norm_gradient(model: MoRModel) -> None:
    """One replicated weight's gradient is summed over two tensor-parallel ranks that each had the whole of it."""
    layer = model.layers[min(int(number) for number in model.layers)]
    layer.pre_mlp_layernorm.weight.register_hook(lambda gradient: 2 * gradient)


def unreduced_norm_gradient(model: MoRModel) -> None:
    """One norm weight is forgotten when gradients are summed over the ranks of sequence parallelism."""
    model.final_layernorm.weight.sequence_parallel = False


def unreduced_router_gradient(model: MoRModel) -> None:
    """The same of a router of one output."""
    model.router.routers[1].out.weight.sequence_parallel = False


def unreduced_adapter_gradients(model: MoRModel) -> None:
    """The same of the factors of adapters that all tensor-parallel ranks have."""
    for name, weight in model.named_parameters():
        if ".adapters." in name:
            weight.sequence_parallel = False


def copy_counted_twice(model: MoRModel) -> None:
    """The tied embedding enters the global norm on both ends of the pipeline."""
    if model.is_last_stage:
        model.output_layer.weight.is_tied_copy = False
