"""Megatron-core's parallel state as the `mpu` object that DeepSpeed asks about groups, ranks and sizes."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class ModelParallelUnit:
    """Answers with Megatron-core's functions, and with the few that only DeepSpeed's interface has.

    "Model parallel" is tensor times pipeline. There is deliberately no `initialize_sequence_parallel`: DeepSpeed takes
    its presence for its own sequence parallelism.
    """

    def __getattr__(self, name: str):
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor x pipeline group."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor x pipeline group."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of this process's data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
