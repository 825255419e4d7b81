"""Token-choice routing: each token picks its depth once, before the first recursion (docs/mor.md, sec. 4).

    p = softmax(router(x));  e_t = argmax p_t                 # depth of token t, 0-based
    y = x;  for each recursion r:  y[t] = block(y)[t]  where e_t >= r
    out[t] = x[t] + p_t[e_t] * y[t]

Depths depend on the token's own state only, so the routing is causal and the same in training and inference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mor_megatron.config.schema import RecursionConfig
from mor_megatron.recursion import context as names
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import LocalRows, select_mask, take_rows
from mor_megatron.recursion.losses import attach_loss, balance_loss, z_loss
from mor_megatron.recursion.plan import RecursionPlan
from mor_megatron.recursion.routers import Router, score
from mor_megatron.recursion.stream import Stream


class TokenChoice(nn.Module):
    """One router, and what happens before the first recursion and after each.

    Args:
        config: routing settings.
        plan: gives Nr.
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
        self.router = make_router(plan.num_recursions)
        # Loss-free balancing: added to the scores for the choice, never to the weight (docs/mor.md, sec. 4)
        self.register_buffer("balance_bias", torch.zeros(plan.num_recursions, dtype=torch.float32))

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Before the first recursion, choose depths and report metrics to `context`; later there is nothing to do."""
        if r > 0:
            return stream
        context.metrics.clear()
        hidden, everything = stream.hidden, stream.active
        logits = self.rows.collect(self.router(hidden), everything)  # [S, B, Nr]
        scores = score(logits, self.config.router_func, self.config.router_alpha)
        depth = self._choose(scores.detach(), context)  # [S, B]
        context.record("router_logits", logits)
        context.decide("depth", depth)
        self._report_depths(depth, context)
        y = hidden
        if self.training:
            y = self._attach_losses(y, logits, scores, depth, context)
        gate = None
        if self.config.router_gating == "weighted":
            gate = scores.gather(-1, depth.unsqueeze(-1))  # [S, B, 1]
        return replace(stream, rows=y, gate=gate, depth=depth)

    def close(self, r: int, stream: Stream) -> Stream:
        """Tokens of depth r leave for good; the others stay in the rows."""
        active, y = stream.active, stream.rows
        depth = stream.depth if active.rows is None else stream.depth.view(-1)[active.rows]
        out, stay = select_mask(depth == r), select_mask(depth > r)
        hidden, gates = stream.hidden, (None, None)
        if stream.gate is not None:
            gates = take_rows(stream.gate, out), take_rows(stream.gate, stay)
        if out.numel() > 0:
            leaving = active.take(out, ragged=True)
            hidden = self.rows.combine(hidden, self.rows.take(y, active, out), gates[0], leaving)
        rows = self.rows.take(y, active, stay)
        return replace(stream, active=active.take(stay, ragged=True), hidden=hidden, rows=rows, gate=gates[1])

    @torch.no_grad()
    def update_bias(self, depth_fractions: Tensor) -> None:
        """Loss-free balancing, once per iteration: b_i += u * sign(mean - fraction_i) (docs/mor.md, sec. 4).

        Args:
            depth_fractions: fraction of the global batch's tokens at each depth, [Nr].
        """
        fractions = depth_fractions.to(self.balance_bias)
        self.balance_bias += self.config.router_bias_update_rate * torch.sign(fractions.mean() - fractions)

    def _choose(self, scores: Tensor, context: RoutingContext) -> Tensor:
        num_recursions = self.plan.num_recursions
        if context.fixed_depth is not None:
            return torch.full_like(scores[..., 0], context.depth(num_recursions) - 1, dtype=torch.long)
        if self.training and context.iteration <= self.config.router_balance_warmup_iters:
            return torch.full_like(scores[..., 0], num_recursions - 1, dtype=torch.long)
        if self.config.router_balance == "loss_free":
            scores = scores + self.balance_bias
        return scores.argmax(-1)

    def _report_depths(self, depth: Tensor, context: RoutingContext) -> None:
        fractions = torch.bincount(depth.view(-1), minlength=self.plan.num_recursions).float() / depth.numel()
        reaching = fractions.flip(0).cumsum(0).flip(0)
        for r in range(self.plan.num_recursions):
            context.report(names.DEPTH_FRACTION.format(r), fractions[r])
            context.report(names.TOKENS_PER_RECURSION.format(r), reaching[r])
        context.report(names.MEAN_DEPTH, reaching.sum())

    def _attach_losses(
        self, x: Tensor, logits: Tensor, scores: Tensor, depth: Tensor, context: RoutingContext
    ) -> Tensor:
        config = self.config
        if config.router_balance == "loss":
            balance = balance_loss(scores, depth, self.plan.num_recursions, config.router_balance_scope)
            context.report(names.BALANCE_LOSS, balance)
            x = attach_loss(x, balance, context.loss_factor(config.router_balance_coeff))
        if config.router_z_loss_coeff > 0.0:
            z = z_loss(logits)
            context.report(names.Z_LOSS, z)
            x = attach_loss(x, z, context.loss_factor(config.router_z_loss_coeff))
        return x
