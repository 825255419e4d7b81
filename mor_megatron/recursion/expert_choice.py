"""Expert-choice routing: each recursion picks its tokens among those the previous one kept (MoR paper, sec. 2.2.1).

    for each recursion r:
        a = router_r(h)                     # logits of the tokens still active
        keep the k_r best (capacity), or those with sigmoid(a) >= 0.5 (threshold)
        h[t] += g_t * block(h[kept])[t]     # the others pass unchanged

Training selects by capacity. The threshold is causal and is what inference uses; the auxiliary loss teaches it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from mor_megatron.recursion.context import Z_LOSS, RoutingContext
from mor_megatron.recursion.losses import selection_loss, z_loss
from mor_megatron.recursion.plan import default_capacities
from mor_megatron.recursion.routers import GatingSettings, Router, resolve_router, score
from mor_megatron.recursion.routing import ACTIVE, Active, Incoming, Index, RoutingMethod, Stream, kept
from mor_megatron.recursion.setting import Change, setting

AUX_LOSS = "aux_loss"
"""Binary cross entropy towards the selection, summed over recursions."""
SELECTION_ACCURACY = "selection_accuracy"
"""How often the causal threshold agrees with the selection, mean over recursions."""


@dataclass(frozen=True)
class ExpertChoiceSettings(GatingSettings):
    """Settings of expert-choice routing."""

    capacity: tuple[float, ...] | None = None
    """expert_choice: fraction of tokens kept at each recursion, non-increasing; default (Nr-r)/Nr."""
    capacity_warmup_iters: int = setting(0, least=0, change=Change.REPORTED, in_export=False)
    """Iterations over which capacities fall from 1 to their value along a cosine."""
    router_objective: Literal["aux_loss", "aux_router"] = "aux_loss"
    """expert_choice: what learns the causal 0.5 threshold: the router itself, or a second, detached router."""
    router_aux_loss_coeff: float = setting(0.001, least=0, change=Change.REPORTED)
    """expert_choice: coefficient of the binary cross entropy towards the top-k selection (sum over recursions)."""
    router_aux_lr_mult: float = setting(
        10.0,
        least=0,
        read_with=("--router-objective aux_router", lambda settings: settings.router_objective == "aux_router"),
        change=Change.REPORTED,
        in_export=False,
    )
    """Learning-rate multiplier of the auxiliary router (router-objective aux_router)."""
    router_aux_loss_per_microbatch: bool = setting(False, change=Change.REPORTED, in_export=False)
    """Authors' scaling: sum the auxiliary loss over micro-batches instead of averaging it, so that its effective
    coefficient grows with gradient accumulation."""


class ExpertChoice(RoutingMethod):
    """A router for each recursion."""

    name = "expert_choice"
    about = "expert-choice routing: before each recursion a router decides which tokens go on"
    Settings = ExpertChoiceSettings
    looks_ahead = True

    @classmethod
    def resolve(cls, settings: ExpertChoiceSettings, num_recursions: int) -> ExpertChoiceSettings:
        """With score function, alpha and capacities filled in.

        Raises:
            ValueError: the score function is not one of expert-choice, or the capacities are none.
        """
        router = resolve_router(settings, ("sigmoid", "tanh", "none"), cls.name)
        capacity = settings.capacity or default_capacities(num_recursions)
        _check_capacity(capacity, num_recursions)
        return replace(settings, capacity=capacity, **router)

    @classmethod
    def capacities(cls, settings: ExpertChoiceSettings, num_recursions: int) -> tuple[float, ...]:
        """The capacities that are set, or (Nr-r)/Nr."""
        return tuple(settings.capacity or default_capacities(num_recursions))

    @classmethod
    def static_from(cls, settings: ExpertChoiceSettings) -> int:
        """The end of the capacities' warm-up."""
        return settings.capacity_warmup_iters

    @classmethod
    def warnings(cls, settings: ExpertChoiceSettings) -> list[str]:
        """The threshold may be left untrained, or the routers that select."""
        found = []
        if not settings.router_aux_loss_coeff:
            found.append(
                "router-aux-loss-coeff=0 leaves the causal threshold untrained, so that threshold evaluation and "
                "generation select at random: use a value above 0"
            )
        detached = settings.router_objective == "aux_router" and not settings.router_z_loss_coeff
        if detached and settings.router_gating == "additive":
            found.append(
                "router-gating=additive with router-objective=aux_router leaves the routers that select without a "
                "gradient: use --router-gating weighted or --router-objective aux_loss"
            )
        return found

    @classmethod
    def untrained(cls, settings: ExpertChoiceSettings) -> str | None:
        """Without a gate, a router has the gradients of its losses only."""
        if settings.router_gating != "additive" or settings.router_aux_loss_coeff or settings.router_z_loss_coeff:
            return None
        return (
            "router-gating=additive without router losses gives routers no gradient: use --router-gating weighted, or "
            "--router-aux-loss-coeff above 0"
        )

    def metric_names(self) -> tuple[str, ...]:
        """Losses and accuracy of the selection, and the tokens of each recursion."""
        z = (Z_LOSS,) if self.settings.router_z_loss_coeff > 0.0 else ()
        return (AUX_LOSS, SELECTION_ACCURACY, *z, *super().metric_names())

    @property
    def threshold_routers(self) -> Sequence[nn.Module]:
        """The auxiliary routers if there are any, otherwise the routers."""
        return self.aux_routers or self.routers

    def flops_per_token(self, parameters: int, fractions: Sequence[float]) -> float:
        """The router of a recursion reads the tokens that the one before kept."""
        candidates = (1.0, *fractions[:-1])
        return 2.0 * parameters * sum(candidates) / len(candidates)

    def build(self, hidden_size: int, dtype: torch.dtype) -> None:
        """One router a recursion, and with aux_router a second one."""
        settings, count = self.settings, self.plan.num_recursions
        self.routers = nn.ModuleList(Router(settings, hidden_size, 1, dtype) for _ in range(count))
        self.aux_routers = None
        if settings.router_objective == "aux_router":
            self.aux_routers = nn.ModuleList(Router(settings, hidden_size, 1, dtype) for _ in range(count))
            for parameter in self.aux_routers.parameters():
                parameter.lr_mult = settings.router_aux_lr_mult

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Select among the candidates and take out their rows."""
        candidates, layout = stream.active, self.layout
        x = layout.gather(stream.hidden, candidates)  # [.., H]
        logits = layout.collect(self.routers[r](x), candidates)  # [.., 1]
        threshold_logits = logits
        if self.aux_routers is not None:
            threshold_logits = layout.collect(self.aux_routers[r](x.detach()), candidates)
        active, index = self._select(r, logits.detach(), threshold_logits.detach(), candidates, context)
        if self.training and context.losses != "none":
            x = self._add_losses(r, x, logits, threshold_logits, index, context)
        context.record(f"router_logits_{r}", logits)
        context.decide(ACTIVE.format(r), lambda: layout.mask(active))
        gate = None
        if self.weighs:
            gate = layout.at(score(logits, self.settings), index)
        return replace(stream, active=active, rows=layout.take(x, candidates, index), gate=gate)

    def _select(
        self, r: int, logits: Tensor, threshold_logits: Tensor, candidates: Active, context: RoutingContext
    ) -> tuple[Active, Index | None]:
        """The tokens that recursion r keeps, and their places among the candidates."""
        # A recursion of capacity 1 keeps every token in training, and so it must by threshold.
        if context.fixed_depth is not None or self.plan.capacities[r] == 1.0:
            return candidates, None
        if context.selection == "capacity":
            return self.layout.best(candidates, logits.squeeze(-1), self._capacity(r, context))
        return self.layout.keep(candidates, threshold_logits.squeeze(-1) >= context.threshold_logit)

    def _capacity(self, r: int, context: RoutingContext) -> float:
        """In training, capacities fall from 1 along a cosine during the first `capacity_warmup_iters` iterations."""
        capacity, warmup = self.plan.capacities[r], self.settings.capacity_warmup_iters
        if self.training and warmup > 0:
            progress = min(1.0, context.iteration / warmup)
            capacity += (1.0 - capacity) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return capacity

    def _add_losses(
        self,
        r: int,
        x: Tensor,
        logits: Tensor,
        threshold_logits: Tensor,
        index: Index | None,
        context: RoutingContext,
    ) -> Tensor:
        """x with this recursion's router losses (docs/mor.md, sec. 3.2)."""
        settings = self.settings
        if index is None:
            target = torch.ones_like(threshold_logits)
        else:
            target = torch.zeros_like(threshold_logits)
            target.view(-1).index_fill_(0, index.view(-1), 1.0)
        aux = selection_loss(threshold_logits, target)
        accuracy = ((threshold_logits >= 0.0) == target.bool()).float().mean()
        context.report(AUX_LOSS, aux)
        context.report(SELECTION_ACCURACY, accuracy / self.plan.num_recursions)
        context.record(f"aux_loss_{r}", aux)
        context.record(f"selection_accuracy_{r}", accuracy)
        x = context.add_loss(x, aux, settings.router_aux_loss_coeff, settings.router_aux_loss_per_microbatch)
        if settings.router_z_loss_coeff > 0.0:
            z = z_loss(logits)
            context.report(Z_LOSS, z)
            x = context.add_loss(x, z, settings.router_z_loss_coeff)
        return x

    def incoming(self, r, tokens, choice, context) -> Incoming:
        """A capacity says how many rows come; only the threshold of evaluation leaves it open."""
        length, batch_size = tokens.shape
        if context.fixed_depth is not None:
            return Incoming(tokens.shape if r < context.fixed_depth else (0, 1), decides=False)
        if self.plan.capacities[r] == 1.0:
            return Incoming(tokens.shape, decides=False)
        if context.selection == "threshold":
            return Incoming((tokens.count, 1), decides=True)
        rows = kept(self._capacity(r, context), length)
        return Incoming((rows, batch_size), decides=rows < length)

    def receive(self, r, tokens, choice, decision, context):
        """The mask tells which; without one, all tokens are active, or none behind the fixed depth."""
        if decision is None:
            is_open = r < context.depth(self.plan.num_recursions)
            return tokens if is_open else self.layout.none(tokens), choice
        regular, lengths = context.selection == "capacity", None
        if regular:
            lengths = (kept(self._capacity(r, context), tokens.shape[0]),) * tokens.shape[1]
        return self.layout.keep(tokens, decision > 0.5, lengths, regular)[0], choice


def _check_capacity(capacity: tuple[float, ...], count: int) -> None:
    shown = f"capacity={' '.join(f'{value:g}' for value in capacity)}"
    usual = " ".join(f"{value:.3g}" for value in default_capacities(count))
    if len(capacity) != count:
        raise ValueError(
            f"{shown} has {len(capacity)} values for num-recursions={count}: give {count}, such as {usual}"
        )
    if not all(0 < value <= 1 for value in capacity):
        raise ValueError(f"{shown} leaves the range above 0 to 1: use fractions of the tokens, such as {usual}")
    if capacity[0] != 1:
        raise ValueError(f"{shown} does not start with 1, but the first recursion takes every token: use {usual}")
    if any(later > earlier for earlier, later in pairwise(capacity)):
        raise ValueError(f"{shown} increases, but a recursion selects among the tokens of the one before: use {usual}")
