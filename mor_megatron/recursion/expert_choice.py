"""Expert-choice routing: each recursion picks its tokens among those the previous one kept (MoR paper, sec. 2.2.1).

    for each recursion r:
        a = router_r(h)                     # logits of the tokens still active
        keep the k_r best (capacity), or those with sigmoid(a) >= 0.5 (threshold)
        h[t] += g_t * block(h[kept])[t]     # the others pass unchanged

Training selects by capacity. The threshold is causal and is what inference uses; the auxiliary loss teaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mor_megatron.config.schema import RecursionConfig
from mor_megatron.recursion import context as names
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows, select_mask, select_topk, take_rows
from mor_megatron.recursion.losses import attach_loss, selection_loss, z_loss
from mor_megatron.recursion.plan import RecursionPlan
from mor_megatron.recursion.routers import Router, score
from mor_megatron.recursion.stream import Stream


def kept_tokens(
    config: RecursionConfig, plan: RecursionPlan, r: int, seq_length: int, context: RoutingContext, training: bool
) -> int:
    """k_r, the tokens of a sequence that recursion r keeps by capacity.

    In training, capacities fall from 1 along a cosine during the first `capacity_warmup_iters` iterations.
    """
    capacity = plan.capacities[r]
    if training and config.capacity_warmup_iters > 0:
        progress = min(1.0, context.iteration / config.capacity_warmup_iters)
        capacity += (1.0 - capacity) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return max(1, int(capacity * seq_length))


class ExpertChoice(nn.Module):
    """Routers of all recursions, and what happens before and after the block.

    Args:
        config: routing settings.
        plan: gives Nr and the capacities.
        make_router: number of outputs -> Router.
        rows: moves rows between the residual stream and the compact tensors.
    """

    def __init__(
        self,
        config: RecursionConfig,
        plan: RecursionPlan,
        make_router: Callable[[int], Router],
        rows: LocalRows | None = None,
    ):
        super().__init__()
        self.config = config
        self.plan = plan
        self.rows = rows or LocalRows()
        self.routers = nn.ModuleList(make_router(1) for _ in range(plan.num_recursions))
        self.aux_routers = None
        if config.router_objective == "aux_router":
            self.aux_routers = nn.ModuleList(make_router(1) for _ in range(plan.num_recursions))
            for parameter in self.aux_routers.parameters():
                parameter.lr_mult = config.router_aux_lr_mult

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Select among the candidates and take out their rows; reports metrics to `context`."""
        candidates, hidden = stream.active, stream.hidden
        if r == 0:
            context.metrics.clear()
        if r >= context.depth(self.plan.num_recursions):
            return self._take(stream, candidates.none(hidden.device), hidden[:0], None)
        x = self.rows.gather(hidden, candidates)  # [k_prev, B, H]
        logits = self.rows.collect(self.routers[r](x), candidates)  # [k_prev, B, 1]
        threshold_logits = logits
        if self.aux_routers is not None:
            threshold_logits = self.rows.collect(self.aux_routers[r](x.detach()), candidates)
        local = self._select(r, logits.detach(), threshold_logits.detach(), candidates, context)
        if self.training and context.selection == "capacity":
            x = self._attach_losses(r, x, logits, threshold_logits, local, context)
        active = candidates
        if local is not None:
            active = active.take(local, ragged=context.selection == "threshold")
        context.record(f"router_logits_{r}", logits)
        context.decide(f"active_{r}", active.mask())
        self._count(r, active, context, hidden.device)
        gate = None
        if self.config.router_gating == "weighted":
            gate = take_rows(score(logits, self.config.router_func, self.config.router_alpha), local)
        return self._take(stream, active, self.rows.take(x, candidates, local), gate)

    def close(self, r: int, stream: Stream) -> Stream:
        """Bring the rows back; the active tokens are the candidates of the next recursion."""
        return stream.merged(self.rows)

    def _select(
        self, r: int, logits: Tensor, threshold_logits: Tensor, candidates: ActiveTokens, context: RoutingContext
    ) -> Tensor | None:
        """Which candidates recursion r keeps, as flat local indexes; None keeps all."""
        if context.fixed_depth is not None:
            return None
        if context.selection == "capacity":
            k = kept_tokens(self.config, self.plan, r, candidates.seq_length, context, self.training)
            return None if k == logits.shape[0] else select_topk(logits.squeeze(-1), k)
        # A recursion of capacity 1 keeps everyone in training, so it must keep everyone here.
        if self.plan.capacities[r] == 1.0:
            return None
        return select_mask(threshold_logits.squeeze(-1) >= 0.0)  # sigmoid >= 0.5

    def _attach_losses(
        self,
        r: int,
        x: Tensor,
        logits: Tensor,
        threshold_logits: Tensor,
        local: Tensor | None,
        context: RoutingContext,
    ) -> Tensor:
        """x with this recursion's router losses attached (docs/mor.md, sec. 3.2)."""
        config = self.config
        if local is None:
            target = torch.ones_like(threshold_logits)
        else:
            target = torch.zeros_like(threshold_logits)
            target.view(-1)[local.view(-1)] = 1.0
        aux = selection_loss(threshold_logits, target)
        accuracy = ((threshold_logits >= 0.0) == target.bool()).float().mean()
        context.report(names.AUX_LOSS, aux)
        context.report(names.SELECTION_ACCURACY, accuracy / self.plan.num_recursions)
        context.record(f"aux_loss_{r}", aux)
        context.record(f"selection_accuracy_{r}", accuracy)
        factor = context.loss_factor(config.router_aux_loss_coeff, config.router_aux_loss_per_microbatch)
        x = attach_loss(x, aux, factor)
        if config.router_z_loss_coeff > 0.0:
            z = z_loss(logits)
            context.report(names.Z_LOSS, z)
            x = attach_loss(x, z, context.loss_factor(config.router_z_loss_coeff))
        return x

    @staticmethod
    def _take(stream: Stream, active: ActiveTokens, rows: Tensor, gate: Tensor | None) -> Stream:
        return replace(stream, active=active, rows=rows, gate=gate)

    @staticmethod
    def _count(r: int, active: ActiveTokens, context: RoutingContext, device: torch.device) -> None:
        fraction = torch.tensor(active.count / (active.seq_length * active.batch_size), device=device)
        context.report(names.TOKENS_PER_RECURSION.format(r), fraction)
        context.report(names.MEAN_DEPTH, fraction)
