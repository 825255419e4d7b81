"""Token-choice routing: each token picks its depth once, before the first recursion (docs/mor.md, sec. 4).

    p = softmax(router(x));  e_t = argmax p_t                 # depth of token t, 0-based
    y = x;  for each recursion r:  y[t] = block(y)[t]  where e_t >= r
    out[t] = x[t] + p_t[e_t] * y[t]

Depths depend on the token's own state only, so the routing is causal and the same in training and inference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.recursion.context import MEAN_DEPTH, TOKENS_PER_RECURSION, Z_LOSS, RoutingContext
from mor_megatron.recursion.host import OnHost
from mor_megatron.recursion.losses import balance_loss, z_loss
from mor_megatron.recursion.plan import default_capacities
from mor_megatron.recursion.routers import GatingSettings, Router, resolve_router, score
from mor_megatron.recursion.routing import Incoming, RoutingMethod, Stream
from mor_megatron.recursion.setting import Change, setting

BALANCE_LOSS = "balance_loss"
"""Balancing loss, 1 at uniform depths."""
DEPTH_FRACTION = "depth_fraction_{}"
"""Fraction of tokens that leave after exactly this recursion (0-based)."""

_WITH_LOSS = ("--router-balance loss", lambda settings: settings.router_balance == "loss")


@dataclass(frozen=True)
class TokenChoiceSettings(GatingSettings):
    """Settings of token-choice routing."""

    router_balance: Literal["loss", "loss_free", "none"] = setting("loss", change=Change.REPORTED)
    """token_choice: balance depths by a loss, by a bias without gradient, or not at all."""
    router_balance_coeff: float = setting(0.1, least=0, read_with=_WITH_LOSS, change=Change.REPORTED)
    """token_choice: coefficient of the balancing loss."""
    router_balance_scope: Literal["sequence", "microbatch"] = setting(
        "sequence", read_with=_WITH_LOSS, change=Change.REPORTED
    )
    """token_choice: over what the balancing loss counts depths. sequence does not depend on how a batch is cut;
    microbatch is the authors'."""
    router_bias_update_rate: float = setting(
        0.001,
        least=0,
        read_with=("--router-balance loss_free", lambda settings: settings.router_balance == "loss_free"),
        change=Change.REPORTED,
        in_export=False,
    )
    """token_choice: step of the loss-free bias."""
    router_balance_warmup_iters: int = setting(0, least=0, change=Change.REPORTED, in_export=False)
    """token_choice: first iterations in which every token takes full depth."""


@dataclass(frozen=True)
class Depths:
    """How deep each token goes. All sizes of all recursions follow from it, and come to the host in one copy."""

    depth: Tensor
    """0-based, one for each token of the micro-batch."""
    counts: Tensor
    """[B, Nr]: tokens of each sequence at each depth."""
    on_host: OnHost | None

    def lengths(self, least: int, below: int | None = None) -> tuple[int, ...] | None:
        """Tokens of each sequence whose depth is at least `least`, and below `below`, if the host may know."""
        if self.on_host is None:
            return None
        return tuple(sum(counts[least:below]) for counts in self.on_host.values)


class TokenChoice(RoutingMethod):
    """One router."""

    name = "token_choice"
    about = "token-choice routing: a router picks the number of recursions of each token"
    Settings = TokenChoiceSettings

    @classmethod
    def resolve(cls, settings: TokenChoiceSettings, num_recursions: int) -> TokenChoiceSettings:
        """With score function and alpha filled in.

        Raises:
            ValueError: the score function is not one of token-choice.
        """
        return replace(settings, **resolve_router(settings, ("softmax", "sigmoid"), cls.name))

    @classmethod
    def warnings(cls, settings: TokenChoiceSettings) -> list[str]:
        """The router may be left without a gradient."""
        reason = cls.untrained(settings)
        return [] if reason is None else [reason]

    @classmethod
    def untrained(cls, settings: TokenChoiceSettings) -> str | None:
        """Without a gate, the router has the gradients of its losses only."""
        balanced = settings.router_balance == "loss" and settings.router_balance_coeff > 0
        if settings.router_gating != "additive" or balanced or settings.router_z_loss_coeff:
            return None
        return (
            "router-gating=additive without a balancing loss leaves the depth router without a gradient: use "
            "--router-gating weighted or --router-balance loss"
        )

    def metric_names(self) -> tuple[str, ...]:
        """Losses, and the tokens and exits of each recursion."""
        settings, count = self.settings, self.plan.num_recursions
        names = [BALANCE_LOSS] if settings.router_balance == "loss" else []
        names += [Z_LOSS] if settings.router_z_loss_coeff > 0.0 else []
        names += [name.format(r) for name in (TOKENS_PER_RECURSION, DEPTH_FRACTION) for r in range(count)]
        return (*names, MEAN_DEPTH)

    def planned_fractions(self) -> tuple[float, ...]:
        """Of balanced depths."""
        return default_capacities(self.plan.num_recursions)

    def build(self, hidden_size: int, dtype: torch.dtype) -> None:
        """The router, and the bias of loss-free balancing."""
        count = self.plan.num_recursions
        self.router = Router(self.settings, hidden_size, count, dtype)
        # Added to the scores for the choice, never to the weight (docs/mor.md, sec. 4)
        self.register_buffer("balance_bias", torch.zeros(count, dtype=torch.float32))

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Before the first recursion, choose depths; later there is nothing to do."""
        if r > 0:
            return stream
        hidden, tokens = stream.hidden, stream.tokens
        logits = self.layout.collect(self.router(hidden), tokens)  # [.., Nr]
        scores = score(logits, self.settings)
        depth = self._choose(scores.detach(), context)  # [..]
        choice = self._announced(depth, tokens)
        context.record("router_logits", logits)
        context.decide("depth", lambda: depth)
        y = hidden
        if self.training and context.losses != "none":
            y = self._add_losses(y, logits, scores, choice, stream, context)
        gate = None
        if self.weighs:
            gate = scores.gather(-1, depth.unsqueeze(-1))  # [.., 1]
        return replace(stream, rows=y, gate=gate, choice=choice)

    def close(self, r: int, stream: Stream) -> Stream:
        """Tokens of depth r leave for good; the others stay in the rows."""
        layout, active, y = self.layout, stream.active, stream.rows
        depth = layout.of(stream.choice.depth, active)
        leaving, out = layout.keep(active, depth == r, stream.choice.lengths(r, r + 1))
        staying, stay = layout.keep(active, depth > r, stream.choice.lengths(r + 1))
        hidden, gates = stream.hidden, (None, None)
        if stream.gate is not None:
            gates = layout.at(stream.gate, out), layout.at(stream.gate, stay)
        if leaving.count > 0:
            hidden = self.combine(hidden, layout.take(y, active, out), gates[0], leaving)
        return replace(stream, active=staying, hidden=hidden, rows=layout.take(y, active, stay), gate=gates[1])

    def after_step(self, metrics: dict[str, Tensor | float], iteration: int) -> None:
        """Loss-free balancing by the depths of the global batch."""
        settings = self.settings
        # In the warm-up every token was sent to full depth: the fractions say nothing about the router.
        if settings.router_balance == "loss_free" and iteration > settings.router_balance_warmup_iters:
            fractions = [float(metrics[DEPTH_FRACTION.format(r)]) for r in range(self.plan.num_recursions)]
            self.update_bias(torch.tensor(fractions))

    @torch.no_grad()
    def update_bias(self, depth_fractions: Tensor) -> None:
        """Loss-free balancing, once per iteration: b_i += u * sign(mean - fraction_i) (docs/mor.md, sec. 4).

        Args:
            depth_fractions: fraction of the global batch's tokens at each depth, [Nr].
        """
        fractions = depth_fractions.to(self.balance_bias)
        self.balance_bias += self.settings.router_bias_update_rate * torch.sign(fractions.mean() - fractions)

    def _choose(self, scores: Tensor, context: RoutingContext) -> Tensor:
        count = self.plan.num_recursions
        if context.fixed_depth is not None:
            return torch.full_like(scores[..., 0], context.depth(count) - 1, dtype=torch.long)
        if self.training and context.iteration <= self.settings.router_balance_warmup_iters:
            return torch.full_like(scores[..., 0], count - 1, dtype=torch.long)
        if self.settings.router_balance == "loss_free":
            scores = scores + self.balance_bias
        return scores.argmax(-1)

    def _announced(self, depth: Tensor, tokens: Any) -> Depths:
        counts = self.layout.counts(depth, tokens, self.plan.num_recursions)
        return Depths(depth, counts, self.layout.to_host(counts, tokens))

    def report_tokens(self, r: int, stream: Stream, context: RoutingContext) -> None:
        """The depths say all of it at once."""
        if r > 0 or context.metrics is None:
            return
        fractions = stream.choice.counts.sum(0).float() / stream.tokens.count
        # Not by cumsum, which on CUDA has no deterministic kernel for floats.
        reaching = torch.stack([*accumulate(fractions.double().flip(0))]).flip(0).float()
        for r in range(self.plan.num_recursions):
            context.report(DEPTH_FRACTION.format(r), fractions[r])
            context.report(TOKENS_PER_RECURSION.format(r), reaching[r])
        context.report(MEAN_DEPTH, reaching.sum())

    def _add_losses(
        self, x: Tensor, logits: Tensor, scores: Tensor, choice: Depths, stream: Stream, context: RoutingContext
    ) -> Tensor:
        settings = self.settings
        if settings.router_balance == "loss":
            per_sequence = settings.router_balance_scope == "sequence"
            chosen = F.one_hot(choice.depth, self.plan.num_recursions).to(scores.dtype)  # [.., Nr]
            means = [self.layout.means(values, stream.tokens, per_sequence) for values in (scores, chosen)]
            balance = balance_loss(*means)
            context.report(BALANCE_LOSS, balance)
            x = context.add_loss(x, balance, settings.router_balance_coeff)
        if settings.router_z_loss_coeff > 0.0:
            z = z_loss(logits)
            context.report(Z_LOSS, z)
            x = context.add_loss(x, z, settings.router_z_loss_coeff)
        return x

    def incoming(self, r, tokens, choice, context) -> Incoming:
        """The depths come once, and say how many rows each later recursion has."""
        if r == 0:
            return Incoming(tokens.shape, decides=True)
        return Incoming((sum(choice.lengths(r)), 1), decides=False)

    def decision(self, stream: Stream) -> Tensor:
        """The depths."""
        return stream.choice.depth

    def receive(self, r, tokens, choice, decision, context):
        """All tokens pass recursion 0; later ones those that are deep enough."""
        if r == 0:
            return tokens, self._announced(decision.round().long(), tokens)
        return self.layout.keep(tokens, choice.depth >= r, choice.lengths(r))[0], choice
