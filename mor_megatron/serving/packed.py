"""Linear layers whose weights are packed once, for a CPU in fp32 with one thread.

PyTorch's products pack a weight in every call, which costs as much as the product itself if there are few rows.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from mor_megatron.serving.kernel import library

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer with a copy of its weight, packed. Later changes of the weight have no effect on it.

    Args:
        linear: fp32, on a CPU.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self._library = library()
        shape = self.out_features, self.in_features
        self.packed = torch.empty(self._library.packed_size(*shape))
        self._library.pack(linear.weight.detach().contiguous().data_ptr(), *shape, self.packed.data_ptr())

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        shape = self.out_features, self.in_features
        self._library.packed_linear(x.data_ptr(), len(x), self.packed.data_ptr(), *shape, y.data_ptr())
        return y if self.bias is None else y.add_(self.bias)


def shared_copy(model: Model) -> Model:
    """A copy of the modules, with the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def pack(model: Model) -> Model:
    """A copy of a model with packed linear layers; it has everything else in common with the model.

    Subclasses of `nn.Linear` stay as they are: they compute something else.
    """
    model = shared_copy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, PackedLinear(module))
    return model
