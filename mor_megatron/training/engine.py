"""The DeepSpeed engine: which of its modes a run needs, and who drives it.

DeepSpeed does ZeRO, fp32 master weights and the reduction over data-parallel ranks. The classes in `modes/` make every
mode keep the same promises: fp32 gradient sums, over recursions as over micro-batches, reduced as fp32; the global norm
of the whole model, summed in fp64, before clipping; no update from anything that is not finite.

| run       | ZeRO | driver   | class     | DeepSpeed's optimizer         | gradients accumulate in | reduced     |
|-----------|------|----------|-----------|-------------------------------|-------------------------|-------------|
| fp32      | 0    | schedule | Fp32      | none: torch's own             | `.grad`                 | before step |
| fp32      | 1    | schedule | Zero12    | DeepSpeedZeroOptimizer        | `.grad`                 | in step     |
| bf16      | 0    | schedule | Bf16      | FP16_UnfusedOptimizer         | `.grad`, fp32           | before step |
| bf16      | 1    | schedule | Bf16Zero1 | BF16_Optimizer                | `.grad`, in flat fp32   | before step |
| fp16      | 1    | engine   | Zero12    | DeepSpeedZeroOptimizer        | `.grad_accum`, fp32     | in step     |
| any       | 2    | engine   | Zero12    | DeepSpeedZeroOptimizer        | this rank's shard, fp32 | in backward |
| any       | 3    | engine   | Zero3     | DeepSpeedZeroOptimizer_Stage3 | this rank's shard, fp32 | in backward |
| offloaded | 1    | engine   | Zero12    | its fp32 state in CPU memory  | as fp16                 | in step     |
| offloaded | 2, 3 | engine   | as above  | its fp32 state in CPU memory  | as above                | in backward |

Where the schedule drives, each rank looks at its loss and its whole gradient before anything is reduced, so that the
rank that broke is known. Where the engine drives, gradients are mixed with other ranks' as they arise: each rank looks
at its loss before the step, which names the rank, and the step looks at the global norm, which does not.

ZeRO 3 gathers a module's weights before it runs. Weights that another module reads (the embedding as head, the query
part of a fused projection, a router's list) are gathered where they are read: DeepSpeed notices.

fp16: the loss and the router losses are multiplied by the loss scale. A norm that is not finite is an overflow: no
rank updates, and the scale falls.
"""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.training.modes.base import Engine
from mor_megatron.training.modes.sharded import Zero12
from mor_megatron.training.modes.whole import Bf16, Bf16Zero1, Fp32
from mor_megatron.training.modes.wrapping import wrap
from mor_megatron.training.modes.zero3 import Zero3
from mor_megatron.training.optimizer import build_optimizer
from mor_megatron.training.trained import choose_trained

Driver = Literal["schedule", "engine"]


def choose_driver(config: Config) -> Driver:
    """Who runs forward and backward: DeepSpeed where its hooks are needed, else Megatron-core's schedule."""
    training = config.training
    needs_hooks = training.zero_stage >= 2 or training.fp16 or training.optimizer_cpu_offload
    return "engine" if needs_hooks else "schedule"


def choose_mode(config: Config) -> type[Engine]:
    """The class of the run's engine, by the table above."""
    zero, bf16 = config.training.zero_stage, config.training.bf16
    if zero == 3:
        return Zero3
    if zero == 0:
        return Bf16 if bf16 else Fp32
    return Bf16Zero1 if bf16 and choose_driver(config) == "schedule" else Zero12


def build_engine(model: nn.Module, config: Config) -> Engine:
    """Wrap the model and its optimizer.

    The caller owns gradient accumulation: any number of backward passes, then `Engine.step`. Weights are broadcast from
    data-parallel rank 0.

    Raises:
        ValueError: DeepSpeed settings that contradict the flags, or something that this machine does not have.
    """
    choose_trained(model, config)
    engine = choose_mode(config)(wrap(model, build_optimizer(model, config.optimizer), config))
    if choose_driver(config) == "engine" and config.parallel.sequence_parallel:
        _reduce_over_sequence_shards(model)
    return engine


def _reduce_over_sequence_shards(model: nn.Module) -> None:
    """Sum gradients of weights that each tensor-parallel rank applied to its shard of the sequence.

    A hook, because DeepSpeed reduces over data-parallel ranks as soon as a gradient is accumulated.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def reduce(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in model.parameters():
        if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(reduce)
