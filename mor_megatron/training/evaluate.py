"""Validation loss in the two named ways of selecting tokens.

`topk` is the authors' whole-sequence selection, which sees later tokens; `threshold` is causal, and what generation
uses. Only expert-choice routing tells them apart; for any other model one pass gives both numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.parallel.cpu import device
from mor_megatron.parallel.schedule import MakeContext, run_schedule
from mor_megatron.recursion.context import RoutingContext, Selection
from mor_megatron.training.train_step import count_tokens, gather_values, masked_sum, num_microbatches

VALIDATION_LOSSES: dict[str, Selection] = {
    "validation_loss_topk": "capacity",
    "validation_loss_threshold": "threshold",
}
"""Metric name -> how tokens are selected."""
FIXED_DEPTH_LOSS = "validation_loss_depth_{}"
"""Metric of every token at one depth, counted from 1 (`--eval-fixed-depths`); causal."""


def evaluate(model: MoRModel, batches: Iterator[Batch], config: Config, iteration: int) -> dict[str, float]:
    """Mean cross entropy (nats a token) over `eval_iters` global batches; collective over all ranks.

    Args:
        model: the bare model; left in training mode.
        batches: this rank's validation micro-batches, from the first on: every evaluation sees the same ones.
        iteration: iterations completed.
    Returns:
        The keys of `VALIDATION_LOSSES`, and of `FIXED_DEPTH_LOSS` if asked for.
    """
    orders = _orders(config)
    loss_sums = {name: torch.zeros((), dtype=torch.float64, device=device()) for name in orders}
    tokens = torch.zeros((), dtype=torch.float64, device=device())
    model.eval()
    with torch.no_grad():
        for _ in range(config.training.eval_iters):
            micro_batches = [next(batches).to(device()) for _ in range(num_microbatches(config))]
            tokens += sum(count_tokens(batch) for batch in micro_batches)
            for name, loss_sum in loss_sums.items():
                _add_losses(model, micro_batches, partial(RoutingContext, iteration, **orders[name]), loss_sum)
    model.train()
    mine = torch.stack([tokens, *loss_sums.values()])
    if not model.is_last_stage or parallel_state.get_tensor_model_parallel_rank() > 0:
        mine.zero_()  # tokens and losses of a micro-batch are counted once, where its losses are
    rows = gather_values(mine, dist.group.WORLD)
    total_tokens, *totals = (sum(column) for column in zip(*rows, strict=True))
    means = {name: total / max(1.0, total_tokens) for name, total in zip(loss_sums, totals, strict=True)}
    topk = means["validation_loss_topk"]
    return {name: means.get(name, topk) for name in VALIDATION_LOSSES} | means


def _orders(config: Config) -> dict[str, dict]:
    """Metric name -> what its `RoutingContext` is told; without expert-choice one selection serves both names."""
    names = list(VALIDATION_LOSSES) if config.recursion.routing == "expert_choice" else ["validation_loss_topk"]
    orders: dict[str, dict] = {name: {"selection": VALIDATION_LOSSES[name]} for name in names}
    if config.training.eval_fixed_depths:
        depths = range(1, config.recursion.num_recursions + 1)
        orders |= {FIXED_DEPTH_LOSS.format(depth): {"fixed_depth": depth} for depth in depths}
    return orders


def _add_losses(model: MoRModel, micro_batches: list[Batch], make_context: MakeContext, loss_sum: torch.Tensor) -> None:
    def add(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        total = masked_sum(losses, batch)
        loss_sum.add_(total)
        return total

    run_schedule(model, micro_batches, make_context, add, forward_only=True)
