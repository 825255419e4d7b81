"""The small learned routers: hidden state in, logits out; and what a router's settings are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_megatron.recursion.setting import Change, setting

DEFAULT_ALPHA = {"sigmoid": 0.1, "tanh": 0.1, "softmax": 1.0, "none": 1.0}
"""Router function -> its default `router_alpha`."""


@dataclass(frozen=True)
class RouterSettings:
    """Settings of a `Router` and of its scores."""

    router_type: Literal["linear", "mlp"] = "linear"
    """linear: H->out; mlp: H->2H, GELU, 2H->out. Neither has biases."""
    router_func: Literal["sigmoid", "tanh", "softmax", "none"] | None = None
    """Score function; default sigmoid (expert_choice) or softmax (token_choice)."""
    router_alpha: float | None = setting(
        None, above=0, read_with=("a --router-func other than none", lambda settings: _has_alpha(settings))
    )
    """Scale of the gate; default 0.1, or 1.0 for softmax."""
    router_temperature: float = setting(1.0, above=0)
    """The router reads hidden / temperature."""


@dataclass(frozen=True)
class GatingSettings(RouterSettings):
    """Settings of a method whose gate is optional and whose router has a loss of its own."""

    router_gating: Literal["weighted", "additive", "residual"] = "weighted"
    """weighted: h + g*y; additive: h + y (the router then learns from its own losses only); residual: h + g*(y - h),
    which with a gate of 1 is y, as without routing (for up-training)."""
    router_z_loss_coeff: float = setting(0.0, least=0, change=Change.REPORTED)
    """Coefficient of the router z-loss, mean(logsumexp(logits)^2)."""


def _has_alpha(settings: RouterSettings) -> bool:
    return settings.router_func != "none" or settings.router_alpha == DEFAULT_ALPHA["none"]


def resolve_router(settings: RouterSettings, allowed: tuple[str, ...], method: str) -> dict[str, str | float]:
    """The score function and alpha that `settings` mean.

    Args:
        allowed: score functions of the routing method, its default first.
        method: name of the routing method, for messages.
    Raises:
        ValueError: the score function is not one of them.
    """
    func = settings.router_func or allowed[0]
    if func not in allowed:
        raise ValueError(f"router-func={func} does not go with routing={method}: use {' or '.join(allowed)}")
    return {"router_func": func, "router_alpha": settings.router_alpha or DEFAULT_ALPHA[func]}


class RouterLinear(nn.Linear):
    """A linear layer without bias that computes in the type of its weight, or in fp32, whatever its input is.

    A class of its own also for tools that choose by class what they quantise. Its weight is for the model to fill.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, in_fp32: bool):
        super().__init__(inputs, outputs, bias=False, dtype=dtype)
        self.in_fp32 = in_fp32

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        dtype = torch.float32 if self.in_fp32 else self.weight.dtype
        return F.linear(x.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Linear (H -> out) or MLP (H -> 2H, GELU, 2H -> out) router without biases (docs/mor.md, sec. 3.1).

    Args:
        settings: give its kind, and the temperature by which its input is divided.
        hidden_size: H.
        num_outputs: 1 for expert-choice, Nr for token-choice.
        dtype: parameter type.
    """

    def __init__(self, settings: RouterSettings, hidden_size: int, num_outputs: int, dtype: torch.dtype):
        super().__init__()
        self.temperature = settings.router_temperature
        self.inner, width = None, hidden_size
        if settings.router_type == "mlp":
            self.inner, width = RouterLinear(hidden_size, 2 * hidden_size, dtype, in_fp32=False), 2 * hidden_size
        # In fp32: bf16 logits would tie at the top-k cut (docs/mor.md, sec. 3.1).
        self.out = RouterLinear(width, num_outputs, dtype, in_fp32=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [.., out] in fp32, of hidden [.., H]. No norm before it: routers read the raw residual stream."""
        if torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):
                return self._logits(hidden)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, self.out.weight.dtype))  # an export keeps routers in fp32
        if self.temperature != 1.0:
            x = x / self.temperature
        return self.out(x if self.inner is None else F.gelu(self.inner(x)))


def score(logits: Tensor, settings: RouterSettings) -> Tensor:
    """Gate of router logits: alpha times sigmoid, tanh or softmax (last dim); `none` is the logits, without alpha."""
    func, alpha = settings.router_func, settings.router_alpha
    if func == "sigmoid":
        return alpha * torch.sigmoid(logits)
    if func == "tanh":
        return alpha * torch.tanh(logits)
    if func == "softmax":
        return alpha * torch.softmax(logits, dim=-1)
    assert func == "none", f"router_func={func}: resolve the settings first"
    return logits
