"""The small learned routers: hidden state in, logits out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RouterWeights(nn.ParameterList):
    """The matrices of a router, [[out, H]] or [[2H, H], [out, 2H]], and their product with what they are called with.

    A module, so that whoever takes care of weights by their modules (ZeRO 3, offload) sees when these are used.
    """

    __call__ = nn.Module.__call__  # a ParameterList refuses to be called

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., out] in fp32, with GELU between."""
        if len(self) == 2:
            x = F.gelu(F.linear(x, self[0]))
        # The last product in fp32: bf16 logits would tie at the top-k cut (docs/mor.md, sec. 3.1).
        return F.linear(x.float(), self[-1].float())


class Router(nn.Module):
    """Linear (H -> out) or MLP (H -> 2H, GELU, 2H -> out) router without biases (docs/mor.md, sec. 3.1).

    Its weights are for the caller to fill.

    Args:
        kind: `linear` or `mlp`.
        hidden_size: H.
        num_outputs: 1 for expert-choice, Nr for token-choice.
        temperature: the input is divided by it.
        dtype: parameter type.
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        num_outputs: int,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.temperature = temperature
        sizes = [(num_outputs, hidden_size)]
        if kind == "mlp":
            sizes = [(2 * hidden_size, hidden_size), (num_outputs, 2 * hidden_size)]
        self.weights = RouterWeights(nn.Parameter(torch.empty(*size, dtype=dtype)) for size in sizes)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [.., out] in fp32, of hidden [.., H]. No norm before it: routers read the raw residual stream."""
        return self.weights(hidden if self.temperature == 1.0 else hidden / self.temperature)


def score(logits: Tensor, func: str, alpha: float) -> Tensor:
    """Gate of router logits: alpha times sigmoid, tanh or softmax (last dim); `none` is the logits, without alpha."""
    if func == "sigmoid":
        return alpha * torch.sigmoid(logits)
    if func == "tanh":
        return alpha * torch.tanh(logits)
    if func == "softmax":
        return alpha * torch.softmax(logits, dim=-1)
    assert func == "none", f"router_func={func}: validate the configuration first"
    return logits
