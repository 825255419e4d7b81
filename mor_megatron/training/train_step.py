"""One iteration: all micro-batches forward and backward, one optimizer step.

Two drivers run the micro-batches, and give equal results where both can:
- "schedule": Megatron-core's forward-backward function, for any pipeline, with ZeRO 0 and 1;
- "engine": DeepSpeed's own forward and backward of each micro-batch, for what needs its hooks (`choose_driver`).

Nothing depends on how a global batch is cut into micro-batches and ranks: loss and gradient are sums over all its
tokens divided by their number, counted before the first forward; router losses are means over micro-batches and ranks.

The host waits for the device twice: for the report, one copy of all that the ranks exchange, and for the norm. In some
modes, DeepSpeed's step looks at the norm once or twice more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.consistency import check_decision
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.replicated import reduce_replicated
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.pipeline.schedule import run_schedule
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.cuda_graph import MicroBatchGraph
from mor_megatron.training.engine import Driver, Engine, choose_driver
from mor_megatron.training.sections import UNTIMED, Sections


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
    divergence: float | None = None
    """Mean KL(teacher || model) over the counted tokens, at the temperature of distillation; None without a teacher."""
    loss_scale: float = 1.0
    """What losses were multiplied by in the backward pass; 1 but for fp16."""
    overflow: bool = False
    """fp16: not applied because the loss scale was too high; it will give way, and nothing is at fault."""


def num_microbatches(config: Config) -> int:
    """Micro-batches of one rank in one iteration."""
    per_pass = config.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    assert config.training.global_batch_size % per_pass == 0
    return config.training.global_batch_size // per_pass


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    config: Config,
    iteration: int,
    lr: float,
    driver: Driver | None = None,
    sections: Sections = UNTIMED,
) -> StepReport:
    """Run one iteration on this rank's next micro-batches; collective over data-parallel ranks.

    Args:
        engine: from `build_engine`, in training mode.
        batches: this rank's micro-batches, on the CPU; `num_microbatches(config)` are taken, each when it is needed.
        iteration: number of this iteration, from 1.
        lr: its learning rate.
        driver: who runs the micro-batches; default `choose_driver(config)`.
        sections: where the time of each part is added up.
    Raises:
        RoutingMismatchError: `check_routing_consistency` found tensor-parallel ranks that route differently.
    """
    driver, model = driver or choose_driver(config), engine.module
    count = num_microbatches(config)
    with sections("batch-generator"):
        taken, counted = _counted(batches, count)
    tokens = _global_token_count(counted)
    ranks = tokens.new_full((), parallel_state.get_data_parallel_world_size())
    micro_batches = _on_device(taken, sections)
    every = config.parallel.check_routing_consistency
    forward = _Forward(
        model,
        iteration,
        count=count,
        gradient_scale=ranks / tokens,
        loss_scale=engine.loss_scale,
        checks_routing=every is not None and iteration % every == 0,
    )

    if driver == "schedule":
        graph = _graph(engine, config)
        with sections("forward-backward"):
            if graph is not None and graph.is_ready(iteration):
                for batch in micro_batches:
                    forward.loss_sum += graph(batch, forward.context(), forward.gradient_scale)
            else:
                run_schedule(model, micro_batches, count, forward.context, forward.loss)
        with sections("all-grads-sync"):
            reduce_replicated(engine.gradients(), model.config.sequence_parallel, model.tied_weight)
        healthy = engine.gradients_are_finite()
    else:
        with sections("forward-backward"):
            for batch in micro_batches:
                engine.backward(forward.loss(engine.forward(batch, forward.context()), batch))
        healthy = True  # gradients are other ranks' as well by now: the step looks at them

    report = forward.reduce(tokens, healthy)
    if report.faulty_ranks:
        engine.discard()
        return report
    outcome = engine.step(lr, config.optimizer.clip_grad, sections)
    if outcome.applied:
        model.after_step(report.routing, iteration)
    return replace(report, grad_norm=outcome.grad_norm, applied=outcome.applied, overflow=outcome.overflow)


def _graph(engine: Engine, config: Config) -> MicroBatchGraph | None:
    if config.training.enable_cuda_graph and engine.graph is None:
        engine.graph = MicroBatchGraph(engine.module, partial(_run, engine.module))
    return engine.graph


def _run(model: MoRModel, batch: Batch, context: RoutingContext, scale: Tensor) -> Tensor:
    """What the schedule does with a micro-batch, for a graph; the sum of its losses."""
    loss_sum = masked_sum(model(batch, context), batch)
    (loss_sum * scale).backward()
    return loss_sum.detach()


class _Forward:
    """The loss of each micro-batch, and what all of them report."""

    def __init__(
        self,
        model: MoRModel,
        iteration: int,
        *,
        count: int,
        gradient_scale: Tensor,
        loss_scale: float,
        checks_routing: bool,
    ):
        self.model = model
        self.iteration = iteration
        self.count = count
        self.gradient_scale = gradient_scale
        self.loss_scale = loss_scale
        self.checks_routing = checks_routing
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device())
        self.divergence_sum = torch.zeros_like(self.loss_sum)
        self.contexts: list[RoutingContext] = []

    def context(self) -> RoutingContext:
        scales = {"router_loss_scale": 1.0 / self.count, "loss_scale": self.loss_scale}
        check = None
        if self.checks_routing:
            check = partial(check_decision, f"iteration {self.iteration}, micro-batch {len(self.contexts)}")
        self.contexts.append(RoutingContext(self.iteration, **scales, on_decision=check))
        return self.contexts[-1]

    def loss(self, losses: Tensor, batch: Batch) -> Tensor:
        """[B, S], or [3, B, S] with a teacher, -> the scalar to call backward on.

        DeepSpeed averages over ranks, hence their number in the scale."""
        if losses.dim() == 2:
            loss_sum = masked_sum(losses, batch)
            self.loss_sum += loss_sum.detach()
            return loss_sum * self.gradient_scale
        minimized, cross_entropy, divergence = (masked_sum(part, batch) for part in losses)
        self.loss_sum += cross_entropy.detach()
        self.divergence_sum += divergence.detach()
        return minimized * self.gradient_scale

    def reduce(self, tokens: Tensor, healthy: Tensor | bool) -> StepReport:
        """Gather every rank's sums, so that all ranks see the same numbers and know whose are not finite.

        Losses are known to the last ranks of the pipelines, router metrics to the first ones.
        """
        names = self.model.run_config.routing_method.metric_names()
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        has_loss, has_routing = counts and self.model.is_last_stage, counts and self.model.is_first_stage
        routing = [self.loss_sum.new_zeros(())] * len(names)
        if has_routing:
            routing = [torch.stack([c.metrics[name] for c in self.contexts]).double().mean() for name in names]
        is_healthy = ((self.loss_sum + self.divergence_sum).isfinite() & healthy).double()
        flags = (self.loss_sum.new_full((), flag) for flag in (has_loss, has_routing))
        mine = torch.stack([is_healthy, *flags, tokens, self.loss_sum, self.divergence_sum, *routing])
        ranks = [_RankResult(*row[:6], routing=row[6:]) for row in gather_values(mine, dist.group.WORLD)]
        columns = list(zip(*(rank.routing for rank in ranks if rank.has_routing), strict=True))
        losses = [rank for rank in ranks if rank.has_loss]
        has_teacher = self.model.run_config.distillation.distill_from is not None
        return StepReport(
            lm_loss=sum(rank.loss_sum for rank in losses) / ranks[0].tokens,
            divergence=sum(rank.divergence_sum for rank in losses) / ranks[0].tokens if has_teacher else None,
            grad_norm=math.inf,
            applied=False,
            faulty_ranks=tuple(number for number, rank in enumerate(ranks) if not rank.is_healthy),
            routing={name: sum(column) / len(column) for name, column in zip(names, columns, strict=True)},
            loss_scale=self.loss_scale,
        )


class _RankResult(NamedTuple):
    """What one rank adds to the report, as the floats that ranks exchange; flags are 0 or 1."""

    is_healthy: float
    """Its loss, and its gradient where that is its own, are finite."""
    has_loss: float
    has_routing: float
    tokens: float
    """Of the global batch, the same on all."""
    loss_sum: float
    divergence_sum: float
    routing: list[float]
    """Router metrics, means over its micro-batches."""


def masked_sum(losses: Tensor, batch: Batch) -> Tensor:
    """Sum of the counted tokens' losses [B, S] in fp64, so that its grouping does not show."""
    if batch.loss_mask is not None:
        losses = losses * batch.loss_mask
    return losses.sum(dtype=torch.float64)


def count_tokens(batch: Batch) -> Tensor:
    """Tokens of a micro-batch that count in the loss, 0-d fp64."""
    if batch.loss_mask is not None:
        return batch.loss_mask.sum(dtype=torch.float64)
    return torch.full((), batch.tokens.numel(), dtype=torch.float64, device=batch.tokens.device)


def gather_values(values: Tensor, group: dist.ProcessGroup) -> list[list[float]]:
    """A small 1-d tensor of every rank of a group, in rank order, as floats."""
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, values, group=group)
    return torch.stack(rows).tolist()


def _counted(batches: Iterator[Batch], count: int) -> tuple[Iterator[Batch], float]:
    """The next micro-batches, and their tokens that count. All are fetched here only if masks decide which do."""
    first = next(batches)
    if first.loss_mask is None:
        return chain([first], islice(batches, count - 1)), first.tokens.numel() * count
    taken = [first, *islice(batches, count - 1)]
    return iter(taken), sum(float(count_tokens(batch)) for batch in taken)


def _on_device(batches: Iterator[Batch], sections: Sections) -> Iterator[Batch]:
    """Micro-batches on the device. From pinned memory, a copy is enqueued behind the micro-batch that computes."""
    while True:
        with sections("batch-generator"):
            batch = next(batches, None)
            if batch is None:
                return
            batch = batch.to(device())
        yield batch


def _global_token_count(counted: float) -> Tensor:
    """The sum of what data-parallel ranks have counted, 0-d fp64."""
    total = torch.full((), counted, dtype=torch.float64, device=device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    # At least one: an iteration whose every token is masked has loss 0 and gradient 0.
    return total.clamp_(min=1.0)
