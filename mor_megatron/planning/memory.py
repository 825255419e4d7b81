"""Bytes that a rank holds from one iteration to the next: weights, gradients, optimizer state.

Activations come on top; they depend on sequence, micro-batch and recomputation, and are not estimated here. Bytes of
one parameter, with D data-parallel ranks and w = 2 bytes a weight in a bf16 or fp16 run, else 4:

| ZeRO | weights | gradients | moments (AdamW; SGD half) | fp32 copy to update |
|------|---------|-----------|---------------------------|---------------------|
| 0    | w       | 4         | 8                         | 4 if w is 2, else 0 |
| 1    | w       | 4         | 8/D                       | 4/D                 |
| 2    | w       | 4/D       | 8/D                       | 4/D                 |
| 3    | w/D     | 4/D       | 8/D                       | 4/D                 |

These are the modes of training/engine.py; a test measures them on real engines. DeepSpeed pads what it divides to a
few elements more.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_megatron.config.layout import data_parallel_size
from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import layer_parameters, padded_vocab_size, router_parameters
from mor_megatron.planning.stages import PipelinePlan


@dataclass(frozen=True)
class RankState:
    """What one rank holds."""

    parameters: int
    """Weights that it works with, in number; under ZeRO-3 it stores 1/D of them."""
    weights: int
    """Bytes."""
    gradients: int
    """Bytes, all fp32."""
    optimizer: int
    """Bytes of moments and fp32 copies; in CPU memory with --optimizer-cpu-offload."""

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer


def rank_parameters(config: Config, pipeline: PipelinePlan, stage: int) -> int:
    """Weights on each tensor-parallel rank of a pipeline stage, vocabulary padding included.

    Matrices, embedding and head are divided among tensor-parallel ranks; norms and routers are whole on each. The first
    stage has embedding and routers, the last the head; a tied head is a weight of its own only if they are two ranks.
    """
    tp, hidden = config.parallel.tensor_model_parallel_size, config.model.hidden_size
    padded = padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by, tp)
    is_first, is_last = stage == 0, stage == pipeline.num_stages - 1
    count = len(pipeline.physical_layers(stage)) * layer_parameters(config, tp)
    if is_first:
        count += padded // tp * hidden + router_parameters(config)
    if is_last:
        count += hidden  # final norm
        if config.model.untie_embeddings_and_output_weights or not is_first:
            count += padded // tp * hidden
    return count


def rank_state(config: Config, parameters: int, world_size: int) -> RankState:
    """Bytes for a number of parameters, by the table above."""
    training = config.training
    shards = [data_parallel_size(config, world_size) if training.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimizer_shards, gradient_shards, weight_shards = shards
    half = training.precision != "fp32"
    moments = 8 if config.optimizer.optimizer == "adam" else 4
    copy = 4 if half or training.zero_stage > 0 else 0
    return RankState(
        parameters,
        weights=(2 if half else 4) * parameters // weight_shards,
        gradients=4 * parameters // gradient_shards,
        optimizer=(moments + copy) * parameters // optimizer_shards,
    )
