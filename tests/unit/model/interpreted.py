"""Runs functions of the files of Triton kernels in Triton's interpreter: `interpreted.py CASES RESULTS FILE...`.

A process of its own, because Triton decides when it is imported whether it interprets; and without the package, which
would take longer to import than all cases take.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from triton.runtime import interpreter


def outputs_and_gradients(function, inputs: tuple, strided: bool) -> list[Tensor]:
    """What the function gives, and the gradients of its inputs for a fixed weighting of that.

    Args:
        strided: gradients of the outputs arrive with their first two dims exchanged in memory.
    """
    inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    found = function(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    if not any(out.requires_grad for out in outputs):
        return [*outputs]
    total = 0.0
    for out in outputs:
        seen = out.transpose(0, 1) if strided else out
        weights = torch.linspace(-1.0, 1.0, seen.numel(), dtype=torch.float64).to(out.dtype).view(seen.shape)
        total = total + (seen * weights).sum()
    total.backward()
    return [*(out.detach() for out in outputs), *(x.grad for x in inputs if getattr(x, "requires_grad", False))]


def number_from_one_element(tensor, scope, patch=interpreter._patch_lang_tensor) -> None:
    """The interpreter's numbers are arrays of one element, which NumPy 2.4 converts to no integer by itself."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = number_from_one_element


def losses_and_gradients(function, inputs: tuple) -> list[Tensor]:
    """Cross entropy by a rank that has the whole vocabulary, and what the logits became."""
    logits, labels, weights, real = inputs
    logits = logits.detach().clone()
    weights = None if weights is None else weights.detach().float()
    return [function(logits, labels, weights, real, lambda *own: own), logits]


def statistics_and_gradients(function, inputs: tuple) -> list[Tensor]:
    """What `distilled` returns, and what the logits became."""
    logits, teacher, labels, weights, real, *mixture = inputs
    logits, weights = logits.detach().clone(), weights.detach().float()
    return [function(logits, teacher.detach(), labels, weights, real, *mixture, lambda own: own), logits]


def main(cases: str, results: str, *files: str) -> None:
    """One result for each case: tensors, or the text of what was raised."""
    functions, found = {}, {}
    for path in files:
        spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        functions |= vars(module)
    for key, (name, inputs, strided) in torch.load(cases, weights_only=False).items():
        try:
            if name == "stored":
                found[key] = [functions["store_rows"](*inputs), *inputs[-2:]]
            elif name == "cross_entropy":
                found[key] = losses_and_gradients(functions[name], inputs)
            elif name == "distilled":
                found[key] = statistics_and_gradients(functions[name], inputs)
            else:
                found[key] = outputs_and_gradients(functions[name], inputs, strided)
        except Exception:
            found[key] = traceback.format_exc()
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
