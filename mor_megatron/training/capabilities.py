"""What this machine and these settings were found to allow, printed once at the start of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mor_megatron.config.deepspeed_settings import overlaps_reduction
from mor_megatron.config.schema import Config
from mor_megatron.parallel.cpu import device
from mor_megatron.training.engine import choose_driver
from mor_megatron.training.optimizer import uses_fused_adam


def capabilities(config: Config) -> dict[str, str]:
    """Name -> what is used, after `initialize_distributed`. A new capability adds its entry here.

    Raises:
        ValueError: a flag forces what is not there.
    """
    cuda = torch.cuda.is_available()
    optimizer = "SGD"
    if config.optimizer.optimizer == "adam":
        optimizer = "fused AdamW" if uses_fused_adam(config.optimizer) else "AdamW"
    if config.training.optimizer_cpu_offload:
        optimizer += " in CPU memory"
    return {
        "device": torch.cuda.get_device_name() if cuda else device().type,
        "communication": dist.get_backend(),
        "optimizer": optimizer,
        "gradient reduction": "overlapped" if overlaps_reduction(config, cuda) else "after backward",
        "micro-batches driven by": {"schedule": "Megatron-core", "engine": "DeepSpeed"}[choose_driver(config)],
    }


def capability_line(config: Config) -> str:
    """`capabilities` as one line for the log."""
    return "using " + ", ".join(f"{name}: {value}" for name, value in capabilities(config).items())
