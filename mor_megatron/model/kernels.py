"""Which kernels and optional GPU libraries a model is built from: what the flags ask for, and what this machine has.

`tools/gpu_check.py` checks them; docs/gpu.md has what came of it on an H100. Transformer Engine is reasoned from its
sources (2.11) and those of Megatron-core 0.16.1, and not run.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend

from mor_megatron.config.schema import Config
from mor_megatron.distributed.gpu import LIBRARIES, check_gpu
from mor_megatron.distributed.libraries import NAMES, why_not
from mor_megatron.model.attention_by_shape import AttentionByShape, AttentionKernels
from mor_megatron.model.attention_check import LAYER, Heads, errors, expected, outputs_and_gradients, random_case
from mor_megatron.recursion.dispatch import ActiveTokens
from mor_megatron.recursion.routing import kept

REGULAR = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""Values of `--attention-backend` that name a kernel for regular rows."""
OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CUDNN_FIRST = (9, 10)
"""Major compute capabilities, Hopper's and Blackwell's, on which cuDNN is the faster one."""
CUDNN_RIGHT = 91501
"""Before cuDNN 9.15.1, gradients are wrong where 128 does not divide the number of rows (pytorch issue 169849)."""
WITHOUT = {
    "cudnn": "use --attention-backend flash",
    "flash": LIBRARIES,
    "varlen_attn": "use --attention-backend sdpa",
    "range attention": "use --attention-backend sdpa",
}
"""How to run without a kernel."""
ROUNDING = 0.05
"""Error of bf16, relative to the largest value, is below 0.01; of an attention that is not the right one, above 0.1."""


def attention_kernels(config: Config) -> AttentionKernels | None:
    """What core attention runs on this machine's GPU (`--attention-backend`); None on a CPU, which has one way.

    Every kernel is tried once, forward and backward. One that fails or computes something else is not used, and the
    reason reported.

    Raises:
        ValueError: a kernel is asked for and cannot be had here, or crashes the GPU.
    """
    wanted, plan, length = config.training.attention_backend, config.plan, config.data.seq_length
    if not torch.cuda.is_available():
        if wanted in REGULAR:
            raise ValueError(f"attention-backend={wanted}, but this machine has no CUDA: use auto or sdpa")
        return None
    heads = _heads(config)
    prefers_flash = wanted != "cudnn" and torch.cuda.get_device_capability()[0] not in CUDNN_FIRST
    names = [name for name in REGULAR if name == "flash" or not (wanted == "flash" or prefers_flash)]
    obstacles = {name: _why_not_regular(name, heads) for name in names}
    if obstacles.get(wanted) is not None:
        raise ValueError(f"attention-backend={wanted}, but {obstacles[wanted]}: use auto or sdpa")
    taken = [name for name in names if obstacles[name] is None]
    no_varlen = no_ranges = None
    if wanted == "sdpa":
        no_varlen = no_ranges = "attention-backend=sdpa"
    elif config.training.precision == "fp32":
        no_varlen = no_ranges = "fp32"
    else:
        if config.routing_method.routes or needs_masks(config):
            no_ranges = tried("range attention", heads)
        if config.routing_method.routes and no_ranges is not None:
            no_varlen = tried("varlen_attn", heads)
    return AttentionKernels(
        fixed=(*(REGULAR[name] for name in taken), *OTHERS),
        rows=frozenset({length, *(kept(capacity, length) for capacity in plan.capacities)}),
        no_varlen=no_varlen,
        no_ranges=no_ranges,
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


def _heads(config: Config) -> Heads:
    """Core attention of a rank."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    return Heads(
        model.num_attention_heads // ranks,
        max(1, model.key_value_heads // ranks),
        model.kv_channels or model.hidden_size // model.num_attention_heads,
        config.training.dtype,
        "cuda",
    )


def _why_not_regular(name: str, heads: Heads) -> str | None:
    """Why PyTorch would not, or should not, give plain causal attention to this kernel."""
    if name == "cudnn" and (torch.backends.cudnn.version() or 0) < CUDNN_RIGHT:
        return f"its version {torch.backends.cudnn.version()} is older than {CUDNN_RIGHT}"
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic"
    rows = (
        torch.empty(250, 2, n, heads.width, dtype=heads.dtype, device="cuda", requires_grad=True)
        for n in (heads.heads, heads.groups)
    )
    query, key = (x.permute(1, 2, 0, 3) for x in rows)
    parameters = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, heads.heads != heads.groups)
    if not getattr(torch.backends.cuda, f"can_use_{name}_attention")(parameters):
        words = f"{heads.heads} heads of width {heads.width} in {heads.dtype}"
        return f"{torch.cuda.get_device_name()} has none for {words}"
    return tried(name, heads)


@lru_cache
def tried(name: str, heads: Heads) -> str | None:
    """What goes wrong where this kernel attends, forward and backward, in one line; or None.

    Args:
        name: a key of `WITHOUT`.
    Raises:
        ValueError: it has crashed the GPU.
    """
    length, batch, most = 300, 3, 250  # not a multiple of any tile
    rows = torch.arange(length * batch, device=heads.device).view(length, batch)
    if name in REGULAR:
        kernels = AttentionKernels((REGULAR[name],), frozenset({most}))
        active = ActiveTokens(length, batch, rows[-most:])
    else:
        kernels = AttentionKernels((), frozenset())
        ragged = (rows[::3, 0], rows[-most:, 2])  # none of the second sequence
        active = ActiveTokens(length, batch, torch.cat(ragged).unsqueeze(1), (len(ragged[0]), 0, most))
    masked = name == "range attention"
    documents = torch.arange(length, device=heads.device).div(70, rounding_mode="floor").expand(batch, -1)
    try:
        pattern, inputs = random_case(heads, active, masked, documents if masked else None)
        found = outputs_and_gradients(AttentionByShape(*LAYER, kernels=kernels), pattern, inputs)
        off = errors(found, expected(pattern, inputs))
    except Exception as error:  # a compiler, a driver, a library: each has its own
        check_gpu(name, WITHOUT[name])
        return f"{name} fails with {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if all(each < ROUNDING for each in off):  # and so no NaN
        return None
    return f"{name} is wrong here, by {', '.join(f'{each:.2g}' for each in off)} of the largest value"
