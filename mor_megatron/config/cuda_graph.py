"""Which runs can have CUDA graphs (`--enable-cuda-graph`): those whose micro-batches differ in nothing but data."""

from __future__ import annotations

from mor_megatron.config.schema import Config
from mor_megatron.recursion.methods import method_of


def check_cuda_graph(config: Config) -> None:
    """Refuse a CUDA graph of a micro-batch that would not be the same for every other one.

    Raises:
        ValueError: with the setting that stands against it.
    """
    obstacle = _obstacle(config) if config.training.enable_cuda_graph else None
    if obstacle is not None:
        raise ValueError(f"enable-cuda-graph=True does not go with {obstacle}, or leave --enable-cuda-graph out")


def _obstacle(config: Config) -> str | None:
    training, parallel, routing = config.training, config.parallel, config.recursion.routing
    for name, size in vars(parallel).items():
        if name in ("tensor_model_parallel_size", "pipeline_model_parallel_size") and size > 1:
            return f"{name.replace('_', '-')}={size}, whose messages would be part of it: use 1"
    method = method_of(routing)
    if method.static_from(config.recursion) is None:
        return f"routing={routing}, which runs another number of tokens in each micro-batch: use expert_choice or none"
    if config.distillation.distill_from is not None:
        return f"distill-from={config.distillation.distill_from}, whose teacher runs beside it: drop it"
    if config.data.reset_attention_mask:
        return "reset-attention-mask=True, whose masks depend on the documents of a micro-batch: drop it"
    if training.zero_stage != 1 or not training.bf16 or training.optimizer_cpu_offload:
        found = f"zero-stage={training.zero_stage} and precision {training.precision}"
        if training.optimizer_cpu_offload:
            found = "optimizer-cpu-offload=True"
        return f"{found}, where gradients do not stay in one place: use --bf16 --zero-stage 1 on the device"
    return None
