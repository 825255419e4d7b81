"""Which optional GPU libraries a model is built from: what the flags ask for, and what this machine has.

Reasoned from the sources of flash-attn 2.8.3, Transformer Engine 2.11 and Megatron-core 0.16.1, and not run: no
machine with a GPU was at hand. `tools/gpu_check.py` checks it.
"""

from __future__ import annotations

import torch

from mor_megatron.config.schema import Config
from mor_megatron.config.validate import FLASH_LARGEST_HEAD
from mor_megatron.distributed.libraries import NAMES, why_not


def uses_flash_attention(config: Config) -> bool:
    """Whether plainly causal attention goes through flash-attn (`--attention-backend`).

    Raises:
        ValueError: it is asked for and cannot be had here.
    """
    return _choose("attention-backend", config.training.attention_backend, "flash", "sdpa", _no_flash(config))


def uses_transformer_engine(config: Config) -> bool:
    """Whether linear layers and norms are Transformer Engine's (`--transformer-impl`).

    Raises:
        ValueError: they are asked for and cannot be had here.
    """
    wanted, obstacle = config.training.transformer_impl, _no_transformer_engine(config)
    if wanted == "auto" and config.training.zero_stage == 3:
        return False  # its modules are untested with weights that DeepSpeed partitions between uses
    return _choose("transformer-impl", wanted, "transformer_engine", "local", obstacle)


def _choose(flag: str, value: str, library: str, fallback: str, obstacle: str | None) -> bool:
    if value == library and obstacle is not None:
        raise ValueError(f"{flag}={library}, but {obstacle}: use auto or {fallback}, or see requirements-gpu.txt")
    return value != fallback and obstacle is None


def _no_flash(config: Config) -> str | None:
    """What stands against flash-attn, or None."""
    if config.training.precision == "fp32":
        return "this run computes in fp32"
    if config.model.kv_channels > FLASH_LARGEST_HEAD:
        return f"kv-channels={config.model.kv_channels} is above {FLASH_LARGEST_HEAD}"
    if not torch.cuda.is_available():
        return "this machine has no CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere (sm80)"
    return _no_library("flash_attn")


def _no_transformer_engine(config: Config) -> str | None:
    """What stands against Transformer Engine, or None."""
    if config.training.precision == "fp32":
        return "this run computes in fp32, which its products round to TF32"
    if not torch.cuda.is_available():
        return "this machine has no CUDA"
    return _no_library("transformer_engine")


def _no_library(package: str) -> str | None:
    reason = why_not(package)
    return None if reason is None else f"{NAMES[package]} cannot be imported ({reason})"
