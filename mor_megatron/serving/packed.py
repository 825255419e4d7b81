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
        compiled, (self.outputs, self.inputs) = library(), linear.weight.shape
        self.bias = linear.bias
        self.packed = torch.empty(compiled.packed_size(self.outputs, self.inputs))
        # What `forward` needs, once: it is called for every few rows.
        self._multiply, self._address = compiled.packed_linear, self.packed.data_ptr()
        compiled.pack(linear.weight.detach().contiguous().data_ptr(), self.outputs, self.inputs, self._address)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        rows = x.shape[0]
        x, y = x.contiguous(), x.new_empty(rows, self.outputs)
        self._multiply(x.data_ptr(), rows, self._address, self.outputs, self.inputs, y.data_ptr())
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
