"""One iteration: all micro-batches forward and backward, one optimizer step.

Two drivers run the micro-batches, and give equal results where both can:
- "schedule": Megatron-core's forward-backward function, for any pipeline, with ZeRO 0 and 1;
- "engine": DeepSpeed's own forward and backward of each micro-batch, for what needs its hooks.

Nothing depends on how a global batch is cut into micro-batches and ranks: loss and gradient are sums over all its
tokens divided by their number, counted before the first forward; router losses are means over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.parallel.cpu import device
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.engine import Engine, apply_step, discard_gradients, gradients_are_finite

Driver = Literal["schedule", "engine"]


@dataclass(frozen=True)
class StepReport:
    """What one iteration did, equal on every rank."""

    lm_loss: float
    """Mean cross entropy over the counted tokens of the global batch, nats."""
    grad_norm: float
    """Global L2 norm before clipping; inf when the step was not applied."""
    applied: bool
    """False: something was not finite, and weights, optimizer and balancing bias are untouched."""
    faulty_ranks: tuple[int, ...]
    """Global ranks whose own loss or gradient was not finite; empty if only their sum overflowed."""
    routing: dict[str, float]
    """Router metrics (names in `recursion.context`), means over the global batch."""


def num_microbatches(config: Config) -> int:
    """Micro-batches of one rank in one iteration."""
    per_pass = config.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    assert config.training.global_batch_size % per_pass == 0
    return config.training.global_batch_size // per_pass


def train_step(
    engine: Engine, batches: Iterator[Batch], config: Config, iteration: int, lr: float, driver: Driver = "schedule"
) -> StepReport:
    """Run one iteration on this rank's next micro-batches; collective over data-parallel ranks.

    Args:
        engine: from `build_engine`, in training mode.
        batches: this rank's micro-batches; `num_microbatches(config)` are taken.
        iteration: number of this iteration, from 1.
        lr: its learning rate.
    """
    count = num_microbatches(config)
    micro_batches = [next(batches).to(device()) for _ in range(count)]
    tokens = _global_token_count(micro_batches)
    forward = _Forward(iteration, gradient_scale=parallel_state.get_data_parallel_world_size() / tokens, count=count)

    if driver == "schedule":
        # The bare module: DeepSpeed's forward would add hooks for a backward that it does not run.
        run_schedule(engine.module, micro_batches, forward.context, forward.loss)
    else:
        for batch in micro_batches:
            engine.backward(forward.loss(engine(batch, forward.context()), batch))

    report = forward.reduce(tokens, healthy=gradients_are_finite(engine))
    if report.faulty_ranks:
        discard_gradients(engine)
        return report
    grad_norm, applied = apply_step(engine, lr, config.optimizer.clip_grad)
    if applied:
        engine.module.finish_iteration(report.routing, iteration)
    return StepReport(report.lm_loss, grad_norm, applied, (), report.routing)


class _Forward:
    """The loss of each micro-batch, and what all of them report."""

    def __init__(self, iteration: int, gradient_scale: float, count: int):
        self.iteration = iteration
        self.gradient_scale = gradient_scale
        self.count = count
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device())
        self.contexts: list[RoutingContext] = []

    def context(self) -> RoutingContext:
        self.contexts.append(RoutingContext(iteration=self.iteration, router_loss_scale=1.0 / self.count))
        return self.contexts[-1]

    def loss(self, losses: Tensor, batch: Batch) -> Tensor:
        """[B, S] -> the scalar to call backward on. DeepSpeed averages over ranks, hence their number in the scale."""
        loss_sum = masked_sum(losses, batch)
        self.loss_sum += loss_sum.detach()
        return loss_sum * self.gradient_scale

    def reduce(self, tokens: int, healthy: bool) -> StepReport:
        """Gather every rank's sums, so that all ranks see the same numbers and know whose are not finite."""
        names = list(self.contexts[0].metrics)
        routing = [torch.stack([c.metrics[name] for c in self.contexts]).double().mean() for name in names]
        healthy = healthy and bool(torch.isfinite(self.loss_sum))
        flag = self.loss_sum.new_tensor(float(healthy))
        mine = torch.stack([flag, self.loss_sum, *routing])
        rows = gather_over_data_parallel(mine)
        ranks = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        faulty = tuple(rank for rank, row in zip(ranks, rows, strict=True) if row[0] == 0.0)
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        loss = means[1] * len(rows) / tokens
        return StepReport(loss, float("inf"), False, faulty, dict(zip(names, means[2:], strict=True)))


def masked_sum(losses: Tensor, batch: Batch) -> Tensor:
    """Sum of the counted tokens' losses [B, S] in fp64, so that its grouping does not show."""
    if batch.loss_mask is not None:
        losses = losses * batch.loss_mask
    return losses.sum(dtype=torch.float64)


def count_tokens(batch: Batch) -> Tensor:
    """Tokens of a micro-batch that count in the loss, 0-d fp64."""
    counted = batch.tokens.numel() if batch.loss_mask is None else batch.loss_mask.sum(dtype=torch.float64)
    return torch.as_tensor(counted, dtype=torch.float64, device=batch.tokens.device)


def gather_over_data_parallel(values: Tensor) -> list[list[float]]:
    """A small 1-d tensor of every data-parallel rank, in rank order, as floats."""
    group = parallel_state.get_data_parallel_group()
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, values, group=group)
    return torch.stack(rows).tolist()


def _global_token_count(micro_batches: list[Batch]) -> float:
    local = torch.stack([count_tokens(batch) for batch in micro_batches]).sum()
    # At least one: an iteration whose every token is masked has loss 0 and gradient 0.
    return max(1.0, sum(row[0] for row in gather_over_data_parallel(local.view(1))))


def run_schedule(
    model: nn.Module,
    micro_batches: list[Batch],
    make_context: Callable[[], RoutingContext],
    loss: Callable[[Tensor, Batch], Tensor],
    forward_only: bool = False,
) -> None:
    """Run micro-batches through Megatron-core's schedule for the pipeline at hand.

    Args:
        make_context: gives each micro-batch its orders.
        loss: per-token losses [B, S] and their batch -> the scalar to call backward on, used as it is.
    """

    def forward_step(iterator: Iterator[Batch], model: nn.Module):
        batch = next(iterator)

        def loss_function(losses: Tensor):
            # Also a token count, which the schedule adds up for who wants it, and what it collects.
            return loss(losses, batch), torch.zeros((), dtype=torch.int), {}

        return model(batch, make_context()), loss_function

    rows, columns = micro_batches[0].tokens.shape
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=columns,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
