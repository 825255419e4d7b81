"""Assembles the whole model from tensor-parallel shards, pipeline stages and ZeRO-3 partitions.

The result has the names and shapes of one process without parallelism, so it can be exported and compared. It is not a
checkpoint: it has no optimizer state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.sharding import join
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.model.stored_names import EMBEDDING, HEAD


def gather_parameters(model: MoRModel) -> dict[str, Tensor]:
    """Every parameter of the whole model, as if one process held it; collective over all ranks.

    Args:
        model: this rank's part; the bare model, also of one that DeepSpeed has wrapped (`engine.module`).
    Returns:
        On global rank 0: name -> full tensor on the CPU, vocabulary without padding; a tied head is not listed. On
        other ranks nothing, so that a large model exists once.
    Raises:
        ValueError: a copy of the tied embedding differs from its original.
    """
    return _gather(model, model.named_parameters(), lambda parameter: parameter.detach())


def gather_gradients(model: MoRModel) -> dict[str, Tensor]:
    """The same of what lies in `.grad`, None read as zeros; for ZeRO 0 and 1, where a rank has whole gradients."""

    def gradient(parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    return _gather(model, model.named_parameters(), gradient)


def gather_buffers(model: MoRModel) -> dict[str, Tensor]:
    """The same of buffers that belong to the model's state (the balancing bias), which are never cut."""
    persistent = model.state_dict(keep_vars=True).keys()
    return _gather(model, ((n, b) for n, b in model.named_buffers() if n in persistent), lambda buffer: buffer)


def _gather(
    model: MoRModel, named: Iterable[tuple[str, Tensor]], read: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    stage: dict[str, Tensor] = {}
    for name, tensor in named:
        with _unpartitioned(tensor):
            whole = _over_tensor_parallel(tensor, read(tensor))
        if name in (EMBEDDING, HEAD):
            whole = whole[: model.vocab_size]
        stage[name] = whole.cpu()
    united = _over_pipeline(stage)
    if HEAD in united and model.tied:
        if not torch.equal(united[HEAD], united[EMBEDDING]):
            raise ValueError(f"{HEAD}, a copy of {EMBEDDING} on the last pipeline rank, differs from it")
        del united[HEAD]
    return united


@contextlib.contextmanager
def _unpartitioned(tensor: Tensor) -> Iterator[None]:
    """The parameter in full, should ZeRO-3 hold it in partitions; collective over data-parallel ranks."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    with deepspeed.zero.GatheredParameters([tensor]):
        yield


def _over_tensor_parallel(tensor: Tensor, value: Tensor) -> Tensor:
    """The whole of `value`, cut as its parameter says; collective over tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    if not getattr(tensor, "tensor_model_parallel", False) or dist.get_world_size(group) == 1:
        return value.clone()
    shards = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, value.contiguous(), group=group)
    return join(shards, tensor.partition_dim, tensor.partition_stride)


def _over_pipeline(stage: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all pipeline ranks, on global rank 0; one at a time, so that no second copy of a stage exists."""
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:  # another tensor- or data-parallel rank of the same stages
        return {}
    contents: list[list[tuple[str, torch.Size, torch.dtype]]] = [[] for _ in ranks]
    dist.all_gather_object(contents, [(name, t.shape, t.dtype) for name, t in stage.items()], group=group)
    if dist.get_rank() != 0:
        for tensor in stage.values():
            dist.send(tensor.to(device()), 0, group=group)
        return {}
    for rank, content in zip(ranks, contents, strict=True):
        if rank == 0:
            continue
        for name, shape, dtype in content:
            assert name not in stage, f"{name} lies on two pipeline ranks"
            received = torch.empty(shape, dtype=dtype, device=device())
            dist.recv(received, rank, group=group)
            stage[name] = received.cpu()
    return stage
