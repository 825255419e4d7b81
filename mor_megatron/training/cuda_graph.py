"""Forward and backward pass of a micro-batch as one CUDA graph (`--enable-cuda-graph`).

The kernels of a small model take less time than Python needs to launch them one by one. A graph is captured from one
micro-batch and launched at once for each later one, on the same memory: the batch is copied into the graph's buffers,
gradients are added to the optimizer's, and what is reported is copied out. Nothing else may differ between
micro-batches, which `config/cuda_graph.py` sees to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.recursion.context import RoutingContext

EAGER_STEPS = 3
"""Iterations before the capture, in which kernels are compiled and chosen; Megatron-LM's cuda-graph-warmup-steps."""

Pass = Callable[[Batch, RoutingContext, Tensor], Tensor]
"""A micro-batch's forward and backward: the batch, its context, the factor of its loss (0-d fp64) -> the sum of its
losses, 0-d fp64, detached."""


def uses_cuda_graph(config: Config) -> bool:
    """Whether `--enable-cuda-graph` is given.

    Raises:
        ValueError: it is, and this machine has no CUDA.
    """
    wanted = config.training.enable_cuda_graph
    if wanted and not torch.cuda.is_available():
        raise ValueError("enable-cuda-graph=True, but this machine has no CUDA: leave --enable-cuda-graph out")
    return wanted


class MicroBatchGraph:
    """Runs micro-batches as `run` does, from one graph.

    Args:
        model: whose shapes stand still from an iteration on.
        run: what is captured. It adds to gradients that stay where they are, and leaves metrics in the context.
    """

    def __init__(self, model: MoRModel, run: Pass):
        assert uses_cuda_graph(model.run_config)
        self.run = run
        self.static_from = model.router.static_from(model.router.settings)
        self._eager_steps = 0
        self._key: tuple | None = None

    def is_ready(self, iteration: int) -> bool:
        """Whether this iteration's micro-batches are to be run here; asked once an iteration."""
        if iteration >= self.static_from:
            self._eager_steps += 1
        return self._eager_steps > EAGER_STEPS

    def __call__(self, batch: Batch, context: RoutingContext, scale: Tensor) -> Tensor:
        """As `run`. The sum that is returned holds until the next call."""
        key = tuple(None if x is None else (x.shape, x.dtype) for x in vars(batch).values()), context.router_loss_scale
        if key != self._key:
            self._capture(batch, context, scale)
            self._key = key
        for buffer, value in zip(vars(self._batch).values(), vars(batch).values(), strict=True):
            if buffer is not None:
                buffer.copy_(value, non_blocking=True)
        self._scale.copy_(scale)
        self._replay()
        context.metrics = {name: value.clone() for name, value in self._metrics.items()}
        return self._loss_sum

    def _capture(self, batch: Batch, context: RoutingContext, scale: Tensor) -> None:
        self._replay = self._loss_sum = self._metrics = None  # an older graph's memory is free for the new one
        self._batch = Batch(*(None if x is None else x.clone() for x in vars(batch).values()))
        self._scale = scale.clone()
        own = replace(context, metrics={})

        def body() -> None:
            self._loss_sum = self.run(self._batch, own, self._scale)

        self._replay = capture(body)
        self._metrics = own.metrics


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record the work that `body` gives to the GPU, without doing it; what is returned does it."""
    graph = torch.cuda.CUDAGraph()
    # On the stream of the model's gradients. Other threads, such as NCCL's and the loader's, may go on as they like.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        body()
    return graph.replay
