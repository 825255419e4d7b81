"""Parameter slices: the elements of named parameters that one rank updates, wherever DeepSpeed keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mor_megatron.model.stored_names import stored_parameters


@dataclass(frozen=True)
class ParameterSlice:
    """Consecutive elements of a parameter that this rank updates, or of a frozen one."""

    name: str
    """Its stored name."""
    parameter: nn.Parameter
    offset: int
    """First element, in this rank's tensor-parallel shard, flattened."""
    length: int
    updated: Tensor
    """What the optimizer updates: fp32, the parameter itself or a partition with other parameters. Of a frozen one,
    what this rank holds, in the type of the run."""
    begin: int
    """Where the slice begins in `updated`, flattened."""

    def within(self, tensor: Tensor) -> Tensor:
        """The slice in a tensor that is laid out like `updated`, a view [length]."""
        return tensor.detach().view(-1).narrow(0, self.begin, self.length)


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Under their stored names."""
    return ((name, parameter) for name, parameter in stored_parameters(module) if parameter.requires_grad)


def slices_of_partitions(module: nn.Module, partitions: list[Tensor]) -> Iterator[ParameterSlice]:
    """What lies of each trained parameter in this rank's flat fp32 partitions, one a parameter group (ZeRO 1 and 2)."""
    for name, parameter in trained_parameters(module):
        mapping = parameter._hp_mapping
        if mapping is None:  # wholly in other ranks' partitions
            continue
        shard, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
        updated = partitions[mapping.param_group_index]
        yield ParameterSlice(name, parameter, shard.start, shard.numel, updated, partition.start)
