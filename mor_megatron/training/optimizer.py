"""Parameter groups and the torch optimizer that DeepSpeed wraps."""

from __future__ import annotations

import torch
from torch import nn

from mor_megatron.config.schema import OptimizerConfig
from mor_megatron.distributed.cpu import device


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters split by decay and learning-rate multiplier.

    Norm weights and biases are not decayed: one-dimensional parameters, and those with an attribute `is_norm`. A
    parameter with an attribute `lr_mult` (the auxiliary router, adapters) joins a group of that rate, and with
    `weight_decay` (adapters) one of that decay. Each group carries `lr_mult` for `set_learning_rate`.

    Returns:
        Groups in a fixed order (decayed before not decayed, then by multiplier and decay), parameters in the model's
        order, so that a checkpoint's optimizer state fits the same model again. Of a model that is wholly frozen, as a
        pipeline stage may be, one group of a weight that is not the model's: DeepSpeed wraps no optimizer of none.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim <= 1 or getattr(parameter, "is_norm", False)
            decay = 0.0 if undecayed else getattr(parameter, "weight_decay", weight_decay)
            groups.setdefault((undecayed, getattr(parameter, "lr_mult", 1.0), decay), []).append(parameter)
    if not groups:
        (like, *_) = model.parameters()
        nothing = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        nothing.grad_dtype = None  # any
        groups[True, 1.0, 0.0] = [nothing]
    return [
        {"params": parameters, "weight_decay": decay, "lr_mult": lr_mult}
        for (_, lr_mult, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum, at rate 0.

    `set_learning_rate` gives every step its rate; DeepSpeed may take one before the first, on gradients of zero.

    Raises:
        ValueError: a fused AdamW is asked for, and this build of PyTorch has none for the device.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=uses_fused_adam(config))


def uses_fused_adam(config: OptimizerConfig) -> bool:
    """Whether AdamW is one kernel a step (CPU and CUDA have it), as `--fused-optimizer` and this machine say.

    Raises:
        ValueError: it is asked for and not there.
    """
    if config.fused_optimizer == "off":
        return False
    try:
        torch.optim.AdamW([nn.Parameter(torch.zeros(1, device=device()))], fused=True)
    except RuntimeError as error:
        if config.fused_optimizer == "on":
            raise ValueError(f"fused-optimizer=on, but {device().type} has no fused AdamW: use auto or off") from error
        return False
    return True


def set_learning_rate(param_groups: list[dict], lr: float) -> None:
    """Give each group `lr` times its multiplier for the next step."""
    for group in param_groups:
        group["lr"] = lr * group["lr_mult"]
