"""The Triton kernels, run by Triton's interpreter, equal the plain functions that define them."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import outputs_and_gradients
from torch import Tensor

from mor_megatron.model import elementwise
from mor_megatron.model.distillation import Mixture, distilled_losses, losses_of

MODEL = Path(elementwise.__file__).parent
INTERPRETER = Path(__file__).with_name("interpreted.py")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # against fp64; of the largest; bf16 has 8 bits


def learned(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def turned(x: Tensor) -> Tensor:
    """The same values, the first two dims exchanged in memory."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = learned(*shape).detach()
    return angle.cos(), angle.sin()


def some(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int64)


CASES: dict[str, tuple[str, tuple]] = {
    "norm": ("rms_norm", (learned(7, 3, 20), learned(20), 1e-5)),
    "norm of wide rows": ("rms_norm", (learned(3, 1, 2500), learned(2500), 1e-5)),
    "norm of no rows": ("rms_norm", (learned(0, 1, 20), learned(20), 1e-5)),
    "norm, turned": ("rms_norm", (turned(learned(5, 4, 33)), learned(33), 1e-5)),
    "sum and norm": ("add_norm", (learned(7, 3, 20), learned(7, 3, 20), learned(20), 1e-5)),
    "stream and norm": ("add_norm", (learned(7, 3, 20), None, learned(20), 1e-5)),
    "sum and norm of no rows": ("add_norm", (learned(0, 1, 20), learned(0, 1, 20), learned(20), 1e-5)),
    "sum and norm, turned": ("add_norm", (turned(learned(5, 4, 33)), learned(5, 4, 33), learned(33), 1e-5)),
    "swiglu": ("swiglu", (learned(5, 3, 2 * 1100),)),
    "swiglu of no rows": ("swiglu", (learned(0, 1, 12),)),
    "swiglu, turned": ("swiglu", (turned(learned(5, 3, 2 * 7)),)),
    "rotate": ("rotate", (learned(5, 3, 2, 6), *angles(5, 1, 1, 3))),
    "rotate ragged rows": ("rotate", (learned(7, 1, 3, 16), *angles(7, 1, 1, 8))),
    "rotate, turned": ("rotate", (turned(learned(5, 3, 2, 6)), *angles(5, 3, 1, 3))),
    "split": ("split_rotate", (learned(5, 3, 2, 5, 6), *angles(5, 3, 1, 1, 3))),
    "split, many heads": ("split_rotate", (learned(3, 1, 9, 3, 256), *angles(3, 1, 1, 1, 128))),
    "split of no rows": ("split_rotate", (learned(0, 1, 2, 3, 6), *angles(0, 1, 1, 1, 3))),
    "split, turned": ("split_rotate", (turned(learned(4, 3, 2, 3, 6)), *angles(4, 1, 1, 1, 3))),
    "add": ("add_rows", (learned(7, 20), learned(3, 20), learned(3, 1), some(4, 0, 6))),
    "add wide rows": ("add_rows", (learned(3, 1500), learned(2, 1500), learned(2, 1), some(2, 0))),
    "add without gate": ("add_rows", (learned(7, 20), learned(3, 20), None, some(4, 0, 6))),
    "add all": ("add_rows", (learned(7, 20), learned(7, 20), learned(7, 1), None)),
    "add all without gate": ("add_rows", (learned(7, 20), learned(7, 20), None, None)),
    "loss": ("cross_entropy", (learned(5, 64), some(0, 57, 60, 3, 9), learned(5), 61)),
    "loss over several blocks": ("cross_entropy", (learned(3, 9000), some(8999, 0, 5000), learned(3), 9000)),
    "loss of another rank's labels": ("cross_entropy", (learned(4, 64), some(-9, 64, 61, 7), learned(4), 61)),
    "loss without weights": ("cross_entropy", (learned(5, 64), some(0, 57, 60, 3, 9), None, 64)),
    "distilled": ("distilled", (learned(5, 64), learned(5, 64), some(0, 57, 60, 3, 9), learned(5), 61, 2.0, 0.3)),
    "distilled over several blocks": (
        "distilled",
        (learned(3, 9000), learned(3, 9000) * 2.0, some(8999, 0, 5000), learned(3), 9000, 0.5, 0.7),
    ),
    "distilled, another rank's labels": (
        "distilled",
        (learned(4, 64), learned(4, 64).flip(0), some(-9, 64, 61, 7), learned(4), 61, 1.0, 0.5),
    ),
    "add nothing": ("add_rows", (learned(7, 20), learned(0, 20), learned(0, 1), some())),
}


def cast(inputs: tuple, dtype: torch.dtype) -> tuple:
    """Floating-point tensors in another type, in the same places of memory."""

    def one(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return tuple(one(x) for x in inputs)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, torch.dtype], list[Tensor] | str]:
    """What the kernels give for each case, as they are named."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (requirements-dev.txt)")
    cases, results = (tmp_path_factory.mktemp("fused") / name for name in ("cases", "results"))
    each = {
        (case, dtype): (name, cast(inputs, dtype), "turned" in case)
        for case, (name, inputs) in CASES.items()
        for dtype in TOLERANCE
    }
    torch.save(each, cases)
    files = [MODEL / "fused.py", MODEL / "fused_loss.py"]
    subprocess.run([sys.executable, INTERPRETER, cases, results, *files], check=True, timeout=300)
    return torch.load(results)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels(found, case, dtype):
    ours = found[case, dtype]
    assert not isinstance(ours, str), ours
    name, inputs = CASES[case]
    rounded = cast(cast(inputs, dtype), torch.float64)
    if name == "cross_entropy":
        ours, expected = ours[: 1 if inputs[2] is None else 2], exact_loss(*rounded)
    elif name == "distilled":
        ours, expected = [losses_of(ours[0], Mixture(*inputs[-2:])), ours[1]], exact_distilled(*rounded)
    else:
        expected = outputs_and_gradients(getattr(elementwise.PLAIN, name), rounded, "turned" in case)
        assert all(a.dtype == dtype for a in ours)
    for a, b in zip(ours, expected, strict=True):
        scale = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * scale)


def exact_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, real: int) -> list[Tensor]:
    """Losses, and the gradient of the logits for the weighted sum; of a label elsewhere, the part that is here."""
    logits = torch.nn.functional.pad(logits[:, :real], (0, logits.shape[1] - real), value=-torch.inf)
    at_label = torch.arange(logits.shape[1]) == labels.where(labels < real, -1).unsqueeze(1)
    predicted = logits.where(at_label, 0.0).sum(1)
    losses = logits.logsumexp(1) - predicted
    if weights is None:
        return [losses.detach()]
    return [losses.detach(), (weights.unsqueeze(1) * (logits.softmax(1) - at_label.double())).detach()]


def exact_distilled(logits, teacher, labels, weights, real, temperature, share) -> list[Tensor]:
    """Loss, cross entropy and divergence, and the gradient of the logits, by the plain function."""
    logits, mixture = logits.detach().clone(), Mixture(temperature, share)
    losses = distilled_losses(
        logits, teacher.detach(), labels, weights.detach().float(), real, mixture, lambda own: own
    )
    return [losses.double(), logits]


def test_which_is_chosen(caplog):
    assert elementwise.implementation("cpu") is elementwise.HAND_WRITTEN
    if torch.cuda.is_available():
        return
    with caplog.at_level(logging.WARNING):  # as with an installation of CUDA that does not work
        assert elementwise.implementation.__wrapped__("cuda") is elementwise.HAND_WRITTEN
    (record,) = caplog.records
    assert record.message.startswith("element-wise work is not fused: ")
