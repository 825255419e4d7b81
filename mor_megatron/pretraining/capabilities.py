"""What this machine and these settings were found to allow, printed once at the start of a run."""

from __future__ import annotations

from importlib.metadata import version

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from mor_megatron.config.deepspeed_settings import overlaps_reduction
from mor_megatron.config.schema import Config
from mor_megatron.distributed.cpu import device
from mor_megatron.model.elementwise import HAND_WRITTEN, implementation
from mor_megatron.model.kernels import attention_kernels, needs_masks, uses_transformer_engine
from mor_megatron.pipeline.schedule import overlaps_messages
from mor_megatron.training.cuda_graph import uses_cuda_graph
from mor_megatron.training.engine import choose_driver
from mor_megatron.training.optimizer import uses_fused_adam


def capabilities(config: Config) -> dict[str, str]:
    """Name -> what is used, after `initialize_distributed`. A new capability adds its entry here.

    Raises:
        ValueError: a flag forces what is not there.
    """
    training, cuda = config.training, torch.cuda.is_available()
    optimizer = "SGD"
    if config.optimizer.optimizer == "adam":
        optimizer = "fused AdamW" if uses_fused_adam(config.optimizer) else "AdamW"
    if training.optimizer_cpu_offload:
        optimizer += " in CPU memory"
    found = {
        "device": torch.cuda.get_device_name() if cuda else device().type,
        "communication": dist.get_backend(),
        "precision": _precision(config),
        "layers": "Megatron-core",
        **_attention(config),
        "element-wise": "PyTorch" if implementation("cuda" if cuda else "cpu") is HAND_WRITTEN else "Triton",
        "optimizer": optimizer,
        "gradient reduction": "overlapped" if overlaps_reduction(config, cuda) else "after backward",
        "micro-batches driven by": {"schedule": "Megatron-core", "engine": "DeepSpeed"}[choose_driver(config)],
    }
    if uses_transformer_engine(config):
        found["layers"] = f"Transformer Engine {version('transformer-engine')}"
    if training.deterministic_mode:
        found["kernels"] = "deterministic"
    if uses_cuda_graph(config):
        found["micro-batches driven by"] = "CUDA graph"
    if config.parallel.pipeline_model_parallel_size > 1:
        found["pipeline messages"] = "overlapped" if overlaps_messages(config) else "waited for"
    return found


def _attention(config: Config) -> dict[str, str]:
    """One entry for each kind of shape; on a CPU there is one way for all."""
    kernels = attention_kernels(config)
    if kernels is None:
        return {"attention": "PyTorch"}
    names = {SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.FLASH_ATTENTION: "flash"}
    found = {"attention": names.get(kernels.fixed[0], "PyTorch")}
    if config.routing_method.routes:
        ragged = "range attention" if kernels.no_ranges is None else _or_padded("varlen_attn", kernels.no_varlen)
        found["attention of ragged rows"] = ragged
    if needs_masks(config):
        found["attention under masks"] = _or_padded("range attention", kernels.no_ranges)
    return found


def _or_padded(library: str, obstacle: str | None) -> str:
    return library if obstacle is None else f"scaled-dot-product in a frame ({obstacle})"


def _precision(config: Config) -> str:
    training = config.training
    if training.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"bf16=True, but {torch.cuda.get_device_name()} has no bf16: use --fp16, or fp32")
    return training.precision


def capability_line(config: Config) -> str:
    """`capabilities` as one line for the log."""
    return "using " + ", ".join(f"{name}: {value}" for name, value in capabilities(config).items())
