"""Validation loss in the two named ways of selecting tokens.

`topk` is the authors' whole-sequence selection, which sees later tokens; `threshold` is causal, and what generation
uses. Only expert-choice routing tells them apart; for any other model one pass gives both numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.cpu import device
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.pipeline.schedule import MakeContext, run_schedule
from mor_megatron.recursion.context import RoutingContext, Selection
from mor_megatron.training.metrics import CORPUS_LOSS, FIXED_DEPTH_LOSS, THRESHOLD_LOSS, TOPK_LOSS
from mor_megatron.training.train_step import count_tokens, gather_values, masked_sum, num_microbatches

VALIDATION_LOSSES: dict[str, Selection] = {TOPK_LOSS: "capacity", THRESHOLD_LOSS: "threshold"}
"""Metric name -> how tokens are selected."""


def evaluate(
    model: MoRModel, batches: Iterator[Batch], config: Config, iteration: int, corpora: Sequence[str] = ()
) -> dict[str, float | None]:
    """Mean cross entropy (nats a token) over `eval_iters` global batches; collective over all ranks.

    Args:
        model: the bare model; left in training mode.
        batches: this rank's validation micro-batches, from the first on: every evaluation sees the same ones.
        iteration: iterations completed.
        corpora: names of the corpora that `Batch.corpus_ids` numbers; of several, each is reported by itself, too.
    Returns:
        The keys of `VALIDATION_LOSSES`, and of `FIXED_DEPTH_LOSS` if asked for; with several corpora those of
        `CORPUS_LOSS`, None for one that no sample of these batches is from.
    """
    options = _options(config)
    parts = len(corpora) if len(corpora) > 1 else 0
    sums = {name: _Sums(parts) for name in options}
    tokens = _Sums(parts)
    model.eval()
    with torch.no_grad():
        for _ in range(config.training.eval_iters):
            micro_batches = [next(batches).to(device()) for _ in range(num_microbatches(config))]
            for batch in micro_batches:
                tokens.total += count_tokens(batch)
                tokens.add_parts(torch.ones_like(batch.tokens, dtype=torch.float32), batch)
            for name, option in options.items():
                _add_losses(model, micro_batches, partial(RoutingContext, iteration, **option), sums[name])
    model.train()
    mine = torch.cat([tokens.vector(), *(each.vector() for each in sums.values())])
    if not model.is_last_stage or parallel_state.get_tensor_model_parallel_rank() > 0:
        mine.zero_()  # tokens and losses of a micro-batch are counted once, where its losses are
    columns = [sum(column) for column in zip(*gather_values(mine, dist.group.WORLD), strict=True)]
    counts, *totals = (columns[i : i + 1 + parts] for i in range(0, len(columns), 1 + parts))
    by_name = dict(zip(options, totals, strict=True))
    means = {name: total[0] / max(1.0, counts[0]) for name, total in by_name.items()}
    losses: dict[str, float | None] = {name: means.get(name, means[TOPK_LOSS]) for name in VALIDATION_LOSSES} | means
    for i, corpus in enumerate(corpora if parts else (), 1):
        for name in VALIDATION_LOSSES:
            total = by_name.get(name, by_name[TOPK_LOSS])[i]
            losses[CORPUS_LOSS.format(name, corpus)] = total / counts[i] if counts[i] else None
    return losses


class _Sums:
    """A sum over all batches, and over the samples of each of several corpora, fp64."""

    def __init__(self, parts: int):
        self.total = torch.zeros((), dtype=torch.float64, device=device())
        self.parts = torch.zeros(parts, dtype=torch.float64, device=device())

    def add_parts(self, values: torch.Tensor, batch: Batch) -> None:
        """Add counted values, [B, S], to the corpora of their samples."""
        if len(self.parts):
            values = values if batch.loss_mask is None else values * batch.loss_mask
            self.parts.index_add_(0, batch.corpus_ids, values.sum(1, dtype=torch.float64))

    def vector(self) -> torch.Tensor:
        return torch.cat([self.total.view(1), self.parts])


def _options(config: Config) -> dict[str, dict]:
    """Metric name -> what its `RoutingContext` is told; without expert-choice one selection serves both names."""
    names = list(VALIDATION_LOSSES) if config.routing_method.looks_ahead else [TOPK_LOSS]
    options: dict[str, dict] = {name: {"selection": VALIDATION_LOSSES[name]} for name in names}
    if config.training.eval_fixed_depths:
        depths = range(1, config.recursion.num_recursions + 1)
        options |= {FIXED_DEPTH_LOSS.format(depth): {"fixed_depth": depth} for depth in depths}
    return options


def _add_losses(model: MoRModel, micro_batches: list[Batch], make_context: MakeContext, sums: _Sums) -> None:
    def add(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        total = masked_sum(losses, batch)
        sums.total += total
        sums.add_parts(losses, batch)
        return total

    run_schedule(model, micro_batches, len(micro_batches), make_context, add, forward_only=True)
