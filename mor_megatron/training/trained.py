"""Which weights a run trains (`--freeze`), and how fast adapters learn."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mor_megatron.config.schema import Config
from mor_megatron.model.layer_spec import RecursionRMSNorm
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.recursion.relaxation import Adapters, RecursionEmbedding


def choose_trained(model: MoRModel, config: Config) -> None:
    """Freeze what `config` wants frozen, and mark adapters for `optimizer.parameter_groups`; before a model is wrapped.

    Raises:
        ValueError: nothing is left to train.
    """
    optimizer = config.optimizer
    for parameter in _weights(model, Adapters):
        parameter.lr_mult = optimizer.lora_lr_mult
        if optimizer.lora_weight_decay is not None:
            parameter.weight_decay = optimizer.lora_weight_decay
    if optimizer.freeze == "none":
        return
    trained = set(model.router.parameters())
    if model.is_first_stage and optimizer.freeze == "all-but-routers" and not trained:
        raise ValueError(
            f"freeze={optimizer.freeze} leaves nothing to train: {config.recursion.routing} has no weights"
        )
    if optimizer.freeze == "base":
        trained.update(_weights(model, (Adapters, RecursionRMSNorm, RecursionEmbedding)))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def _weights(model: nn.Module, kinds: type | tuple[type, ...]) -> Iterator[nn.Parameter]:
    """Of the modules of these kinds."""
    return (weight for module in model.modules() if isinstance(module, kinds) for weight in module.parameters())
