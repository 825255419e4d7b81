"""Who goes how deep: the routers of a MoR model, on packed rows.

    expert-choice   before each recursion, tokens still active are kept or left behind
    token-choice    before the first recursion, each token picks its depth

Inference decides by what is known when a token arrives (a threshold, an argmax), so that decoding token by token is
the same function as one pass over the whole text. Training with labels may keep the best of a whole sequence instead,
as pretraining does. This file travels with an exported model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .configuration_mor import MoRConfig
from .rows_mor import Rows

TIE = 1e-5
"""Logits count as equal within TIE * (1 + their mean size in the sequence): repeated tokens have equal hidden states
but for rounding, and rounding depends on the device."""

Block = Callable[[int, Tensor, Rows, Tensor], Tensor]
"""block(recursion, hidden [T', H], rows, stream [T, H]) -> [T', H]: one pass of the shared layers over some rows; the
others' state is in the residual stream."""


@dataclass
class Orders:
    """What one call asks of the routing, and what comes of it.

    Raises:
        ValueError: a value is out of range, or means nothing to this kind of model.
    """

    config: MoRConfig
    depth: int | None = None
    """Recursions of every token; None lets the router decide."""
    threshold: float = 0.5
    """expert_choice: go on if the sigmoid of the logit is at least this."""
    selection: str = "threshold"
    """expert_choice: threshold, or capacity: the best of the whole sequence, which looks ahead."""
    with_losses: bool = False
    loss: Tensor | None = field(default=None, init=False)
    """Router losses times their coefficients."""

    def __post_init__(self):
        count = self.config.num_recursions
        if self.depth is not None and not 1 <= self.depth <= count:
            raise ValueError(f"depth={self.depth} must be between 1 and num_recursions={count}")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"router_threshold={self.threshold} must be between 0 and 1")
        if self.threshold != 0.5 and self.config.routing != "expert_choice":
            raise ValueError(
                f"router_threshold={self.threshold} needs routing=expert_choice, this model has "
                f"routing={self.config.routing}: leave it out"
            )
        if self.selection not in ("threshold", "capacity"):
            raise ValueError(f"selection={self.selection} is unknown: use threshold or capacity")

    @property
    def num_recursions(self) -> int:
        """Recursions to run."""
        return self.depth or self.config.num_recursions

    @property
    def threshold_logit(self) -> float:
        """The logit whose sigmoid is the threshold."""
        if self.threshold in (0.0, 1.0):
            return math.copysign(math.inf, self.threshold - 0.5)
        return math.log(self.threshold / (1.0 - self.threshold))

    def add_loss(self, loss: Tensor, coefficient: float) -> None:
        """Take one router loss into account."""
        if self.with_losses and coefficient > 0.0:
            self.loss = coefficient * loss if self.loss is None else self.loss + coefficient * loss


class MoRFloat32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever its input is: in bf16, scores of many tokens are equal.

    A class of its own also for tools that find what they quantise by its class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out] in fp32."""
        return F.linear(x.float(), self.weight.float())


class MoRRouter(nn.Module):
    """Linear (H -> out) or MLP (H -> 2H, GELU, 2H -> out) router on the raw residual stream, in fp32."""

    def __init__(self, config: MoRConfig, num_outputs: int):
        super().__init__()
        self.temperature = config.router_temperature
        width = config.hidden_size
        self.inner = None
        if config.router_type == "mlp":
            self.inner = MoRFloat32Linear(width, 2 * width, bias=False)
            width *= 2
        self.out = MoRFloat32Linear(width, num_outputs, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, out]."""
        with maybe_autocast(device_type=hidden.device.type, enabled=False):
            x = hidden.float()
            if self.temperature != 1.0:
                x = x / self.temperature
            return self.out(x if self.inner is None else F.gelu(self.inner(x)))


class MoRExpertChoice(nn.Module):
    """A router for each recursion; `h[t] += gate_t * block(h[kept])[t]`."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.config = config
        self.routers = nn.ModuleList(MoRRouter(config, 1) for _ in range(config.num_recursions))
        self.aux_routers = None
        if config.router_objective == "aux_router":
            self.aux_routers = nn.ModuleList(MoRRouter(config, 1) for _ in range(config.num_recursions))

    def forward(self, hidden: Tensor, rows: Rows, block: Block, orders: Orders) -> tuple[Tensor, Tensor]:
        """Residual stream [T, H] -> the same after all recursions, and the recursions that each token passed [T]."""
        depth = torch.zeros(len(rows), dtype=torch.int8, device=hidden.device)
        active = rows  # those still going on
        for r in range(orders.num_recursions):
            x = active.take(hidden)
            logits = self.routers[r](x).squeeze(1)
            decisive = logits if self.aux_routers is None else self.aux_routers[r](x.detach()).squeeze(1)
            keep = self._keep(r, logits.detach(), decisive.detach(), active, rows, orders)
            if orders.with_losses:
                self._add_losses(logits, decisive, keep, orders)
            if keep is not None and len(keep) < len(active):
                active, x, logits = active.select(keep), x[keep], logits[keep]
            if len(active) == 0:
                break
            hidden = active.put(hidden, self._combine(x, block(r, x, active, hidden), logits))
            depth = active.put(depth, active.take(depth) + 1)
        return hidden, depth

    def _keep(
        self, r: int, logits: Tensor, decisive: Tensor, active: Rows, everything: Rows, orders: Orders
    ) -> Tensor | None:
        """[T'] which of the active rows pass recursion r, ascending; None: all of them."""
        # Where training lets all tokens pass, the router has never learnt to stop one.
        if orders.depth is not None or self.config.capacity[r] == 1.0:
            return None
        if orders.selection == "threshold":
            return (decisive >= orders.threshold_logit).nonzero().squeeze(1)
        wanted = [max(1, int(self.config.capacity[r] * everything.lengths[b])) for b in active.present]
        padded = active.pad(logits.nan_to_num(), fill=-math.inf)
        return active.unpad(best(padded, torch.tensor(wanted, device=logits.device))).nonzero().squeeze(1)

    def _combine(self, x: Tensor, update: Tensor, logits: Tensor) -> Tensor:
        if self.config.router_gating == "additive":
            return x + update
        gate = gate_of(logits, self.config).unsqueeze(1)
        return torch.addcmul(x, update, gate.to(x.dtype))

    def _add_losses(self, logits: Tensor, decisive: Tensor, keep: Tensor | None, orders: Orders) -> None:
        if keep is None:
            target = torch.ones_like(decisive)
        else:
            target = torch.zeros_like(decisive).index_fill_(0, keep, 1.0)
        orders.add_loss(F.binary_cross_entropy_with_logits(decisive, target), self.config.router_aux_loss_coef)
        orders.add_loss(logits.square().mean(), self.config.router_z_loss_coef)


class MoRTokenChoice(nn.Module):
    """One router; a token passes recursions 0..e and leaves with `x + gate * y`, x being the input of the first."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.config = config
        self.router = MoRRouter(config, config.num_recursions)
        # Of loss-free balancing: added to the scores for the choice, never to the gate.
        self.register_buffer("balance_bias", torch.zeros(config.num_recursions, dtype=torch.float32))

    def forward(self, hidden: Tensor, rows: Rows, block: Block, orders: Orders) -> tuple[Tensor, Tensor]:
        """Residual stream [T, H] -> the same after all recursions, and the recursions that each token passed [T]."""
        logits = self.router(hidden)
        scores = gate_of(logits, self.config)
        if orders.depth is not None:
            choice = torch.full((len(rows),), orders.depth - 1, device=hidden.device)
        else:
            biased = scores.detach()
            if self.config.router_balance == "loss_free":
                biased = biased + self.balance_bias
            choice = biased.argmax(1)
        if orders.with_losses:
            self._add_losses(logits, scores, choice, rows, orders)
        gate = scores.gather(1, choice.unsqueeze(1)).to(hidden.dtype)
        if self.config.router_gating == "additive":
            gate = torch.ones_like(gate)
        active, y = rows, hidden
        for r in range(orders.num_recursions):
            y = block(r, y, active, hidden)
            going = active.take(choice) > r
            leaves, stays = ((~going).nonzero().squeeze(1), going.nonzero().squeeze(1))
            if len(leaves) == 0:
                continue
            out = active.places(leaves)
            hidden = hidden.index_copy(0, out, torch.addcmul(hidden[out], y[leaves], gate[out]))
            if len(stays) == 0:
                break
            active, y = active.select(stays), y[stays]
        return hidden, (choice + 1).to(torch.int8)

    def _add_losses(self, logits: Tensor, scores: Tensor, choice: Tensor, rows: Rows, orders: Orders) -> None:
        config = self.config
        if config.router_balance == "loss":
            chosen = F.one_hot(choice, config.num_recursions).to(scores.dtype)
            if config.router_balance_scope == "sequence":
                products = (rows.per_sequence(scores) * rows.per_sequence(chosen)).sum(1).mean()
            else:
                products = (scores.mean(0) * chosen.mean(0)).sum()
            orders.add_loss(config.num_recursions * products, config.router_balance_coef)
        orders.add_loss(torch.logsumexp(logits, dim=1).square().mean(), config.router_z_loss_coef)


def best(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mask of the highest scores of each sequence, [B, L]; among equal ones at the cut, the earlier tokens.

    Args:
        scores: [B, L], -inf at padding.
        wanted: how many of each sequence, [B], at least 1.
    """
    real = scores != -math.inf
    size = scores.masked_fill(~real, 0.0).abs().sum(1, keepdim=True) / real.sum(1, keepdim=True)
    wanted = wanted.unsqueeze(1).minimum(real.sum(1, keepdim=True))
    cut, band = scores.sort(dim=1, descending=True).values.gather(1, wanted - 1), TIE * (1.0 + size)
    above = scores > cut + band
    tied = (scores >= cut - band) & ~above
    return above | (tied & (tied.cumsum(1) <= wanted - above.sum(1, keepdim=True)))


def gate_of(logits: Tensor, config: MoRConfig) -> Tensor:
    """alpha times sigmoid, tanh or softmax (last dim) of fp32 logits; `none`: the logits themselves."""
    if config.router_func == "none":
        return logits
    if config.router_func == "softmax":
        return config.router_alpha * torch.softmax(logits, dim=-1)
    return config.router_alpha * (torch.sigmoid(logits) if config.router_func == "sigmoid" else torch.tanh(logits))


ROUTING = {"expert_choice": MoRExpertChoice, "token_choice": MoRTokenChoice}

__all__ = ["ROUTING", "MoRExpertChoice", "MoRFloat32Linear", "MoRRouter", "MoRTokenChoice", "Orders"]
