"""Which kernels and optional GPU libraries a model is built from: what the flags ask for, and what this machine has.

Reasoned from the sources of PyTorch 2.11 and 2.13, Transformer Engine 2.11 and Megatron-core 0.16.1, and not run: no
machine with a GPU was at hand. `tools/gpu_check.py` checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend

from mor_megatron.config.schema import Config
from mor_megatron.distributed.libraries import NAMES, why_not
from mor_megatron.model.attention_by_shape import AttentionKernels, flex, varlen
from mor_megatron.model.frame import Frame
from mor_megatron.recursion.dispatch import ActiveTokens
from mor_megatron.recursion.routing import kept

REGULAR = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""Values of `--attention-backend` that name a kernel for regular rows."""
OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CUDNN_FIRST = (9, 10)
"""Major compute capabilities, Hopper's and Blackwell's, on which cuDNN is the faster one."""
CUDNN_RIGHT = 91501
"""Before cuDNN 9.15.1, gradients are wrong where 128 does not divide the number of rows (pytorch issue 169849)."""


def attention_kernels(config: Config) -> AttentionKernels | None:
    """What core attention runs on this machine's GPU (`--attention-backend`); None on a CPU, which has one way.

    Every kernel is tried once, forward and backward: a library that fails is then not used, and the reason reported.

    Raises:
        ValueError: a kernel is asked for and cannot be had here.
    """
    wanted, plan, length = config.training.attention_backend, config.plan, config.data.seq_length
    if not torch.cuda.is_available():
        if wanted in REGULAR:
            raise ValueError(f"attention-backend={wanted}, but this machine has no CUDA: use auto or sdpa")
        return None
    shape = _head_shape(config)
    obstacles = {name: _why_not_regular(name, *shape) for name in REGULAR}
    if obstacles.get(wanted) is not None:
        raise ValueError(f"attention-backend={wanted}, but {obstacles[wanted]}: use auto or sdpa")
    taken = [name for name in REGULAR if obstacles[name] is None]
    if wanted == "flash" or (wanted != "cudnn" and torch.cuda.get_device_capability()[0] not in CUDNN_FIRST):
        taken = [name for name in taken if name != "cudnn"]
    no_varlen = no_flex = None
    if wanted == "sdpa":
        no_varlen = no_flex = "attention-backend=sdpa"
    elif config.training.precision == "fp32":
        no_varlen = no_flex = "fp32"
    else:
        no_varlen = _why_not_varlen(*shape)
        if needs_masks(config):
            rows = min(kept(capacity, length) for capacity in plan.capacities)
            no_flex = _why_not_flex(*shape, config.training.micro_batch_size, length, rows)
    return AttentionKernels(
        fixed=(*(REGULAR[name] for name in taken), *OTHERS),
        rows=frozenset({length, *(kept(capacity, length) for capacity in plan.capacities)}),
        no_varlen=no_varlen,
        no_flex=no_flex,
    )


def needs_masks(config: Config) -> bool:
    """Whether rows attend to more than themselves, or to less."""
    shares = config.plan.kv_mode != "caching" and config.routing_method.routes
    return shares or config.data.reset_attention_mask


def uses_transformer_engine(config: Config) -> bool:
    """Whether linear layers and norms are Transformer Engine's (`--transformer-impl`).

    Raises:
        ValueError: they are asked for and cannot be had here.
    """
    wanted, obstacle = config.training.transformer_impl, _no_transformer_engine(config)
    if wanted == "auto" and config.training.zero_stage == 3:
        return False  # its modules are untested with weights that DeepSpeed partitions between uses
    if wanted == "transformer_engine" and obstacle is not None:
        raise ValueError(f"transformer-impl={wanted}, but {obstacle}: use auto or local, or see requirements-gpu.txt")
    return wanted != "local" and obstacle is None


def _no_transformer_engine(config: Config) -> str | None:
    """What stands against Transformer Engine, or None."""
    if config.training.precision == "fp32":
        return "this run computes in fp32, which its products round to TF32"
    if not torch.cuda.is_available():
        return "this machine has no CUDA"
    reason = why_not("transformer_engine")
    return None if reason is None else f"{NAMES['transformer_engine']} cannot be imported ({reason})"


def _head_shape(config: Config) -> tuple[torch.dtype, int, int, int]:
    """Type, query heads and key heads of a rank, and their width."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    return config.training.dtype, model.num_attention_heads // ranks, max(1, model.key_value_heads // ranks), width


def _why_not_regular(name: str, dtype: torch.dtype, heads: int, groups: int, width: int) -> str | None:
    """Why PyTorch would not, or should not, give plain causal attention to this kernel."""
    if name == "cudnn" and (torch.backends.cudnn.version() or 0) < CUDNN_RIGHT:
        return f"its version {torch.backends.cudnn.version()} is older than {CUDNN_RIGHT}"
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic"
    rows = (torch.empty(250, 2, n, width, dtype=dtype, device="cuda", requires_grad=True) for n in (heads, groups))
    query, key = (x.permute(1, 2, 0, 3) for x in rows)
    parameters = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, heads != groups)
    if getattr(torch.backends.cuda, f"can_use_{name}_attention")(parameters):
        return None
    return f"{torch.cuda.get_device_name()} has none for {heads} heads of width {width} in {dtype}"


@lru_cache
def _why_not_varlen(dtype: torch.dtype, heads: int, groups: int, width: int) -> str | None:
    def attend() -> None:
        cu_seqlens = torch.tensor([0, 100, 100, 256], dtype=torch.int32, device="cuda")
        parts = (
            torch.randn(256, n, width, dtype=dtype, device="cuda", requires_grad=True) for n in (heads, groups, groups)
        )
        varlen(*parts, cu_seqlens, longest=512).sum().backward()

    return _failure("varlen_attn", attend)


@lru_cache
def _why_not_flex(
    dtype: torch.dtype, heads: int, groups: int, width: int, batch: int, length: int, rows: int
) -> str | None:
    """With the model's shapes, so that the first step finds its kernels compiled."""

    def attend() -> None:
        active = ActiveTokens(length, batch, torch.arange(rows * batch, device="cuda").view(rows, batch))
        frame = Frame(active, None, keys_of_all=True)
        parts = (
            torch.randn(n, batch, h, width, dtype=dtype, device="cuda", requires_grad=True).permute(1, 2, 0, 3)
            for n, h in ((frame.length, heads), (length, groups), (length, groups))
        )
        flex(*parts, frame.block_mask).sum().backward()

    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    return _failure("FlexAttention", attend)


def _failure(name: str, attend: Callable[[], None]) -> str | None:
    """The first line of what goes wrong, or None."""
    try:
        with torch.enable_grad():
            attend()
        torch.cuda.synchronize()
    except Exception as error:  # a compiler, a driver, a library: each has its own
        reason = next(iter(str(error).splitlines()), "")
        return f"{name} fails with {type(error).__name__}: {reason}"
    return None
