"""The job of a worker for one cell of the table, and the comparison of two results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from full_state import gather_buffers, gather_parameters
from megatron.core import parallel_state
from table import RUN, SEQ_LENGTH, STEPS, VOCABULARY
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.recursion.routers import score
from mor_megatron.recursion.routing import TIE
from mor_megatron.training.engine import Engine, build_engine
from mor_megatron.training.train_step import StepReport, train_step

FP32_LAYOUT_TOL = 1e-5
"""Largest relative difference between two layouts over all fp32 steps. They add the same numbers in another order:
1e-7 for a sum, tens of sums deep, and updates that feed on each other."""
FP32_ROUNDING = STEPS * 2.0**-24
"""What rounding a weight after each update may move it, relative to its size: no agreement can be expected below."""
BF16_LOSS_TOL = 2e-3
"""bf16 keeps 8 bits: a product summed in another order differs by 2^-9 of itself, and a loss averages over many."""
BF16_NORM_TOL = 5e-3
"""The gradient's norm in the first step. Later ones are those of other weights: rounding moves some by a bf16 step."""
DECISION_MARGIN = 5e-6
"""Router logits of two layouts differ by some 1e-7 at the last step; see `Margins`."""


class Margins:
    """The closest decision of all routers of a model: how near another token, or another depth, was to being chosen.

    A layout changes router logits by 1e-7. A decision closer than that may fall either way, which is no fault of the
    layout: with some seeds it happens, and those are passed over. Ties are no close decisions: position decides them,
    alike in every layout. Close is a logit on the edge of the band within which logits are tied.
    """

    def __init__(self, model: MoRModel):
        self.smallest = math.inf
        self.ties = 0
        """Selections with more than one token at the cut."""
        self.recursion = model.run_config.recursion
        self.model = model
        for r, router in enumerate(getattr(model.router, "routers", ())):
            router.register_forward_hook(partial(self._of_selection, r))
        if self.recursion.routing == "token_choice":
            model.router.router.register_forward_hook(self._of_depth)

    def _of_selection(self, r: int, router: nn.Module, args: tuple[Tensor], logits: Tensor) -> None:
        kept = int(self.recursion.capacity[r] * SEQ_LENGTH)
        if kept < logits.shape[0]:
            logits = logits.detach().squeeze(-1)
            distance = (logits - logits.topk(kept, dim=0).values[-1]).abs()
            band = TIE * (1.0 + logits.abs().mean(0))
            self.ties += int(((distance <= band).sum(0) > 1).sum())
            self._note((distance - band).abs())

    def _of_depth(self, router: nn.Module, args: tuple[Tensor], logits: Tensor) -> None:
        scores = score(logits.detach(), self.recursion)
        best = (scores + self.model.router.balance_bias).topk(2, dim=-1).values
        self._note(best[..., 0] - best[..., 1])

    def _note(self, margins: Tensor) -> None:
        self.smallest = min(self.smallest, margins.min().item())


@dataclass
class Result:
    """What a run leaves, as rank 0 sees it; the tensors are those of the whole model."""

    seed: int
    reports: list[StepReport]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    buffers: dict[str, Tensor]
    norm: float
    """`weights_norm` at the end."""
    storages: dict[str, int] = field(default_factory=dict)
    """This rank's parameter elements, each storage once: built, wrapped. Bytes of a teacher."""
    margin: float = math.inf
    """The closest routing decision; only looked at where one process has the whole model."""
    ties: int = 0
    """Selections that position decided; likewise."""


def train(config: Config, fault: Callable[[nn.Module], None] | None = None) -> Result:
    """A few steps in the layout of `config`; collective.

    Args:
        fault: spoils the model before it is wrapped, to see whether the comparison notices.
    """
    initialize_distributed(config)
    model = build_model(config)
    initial = gather_parameters(model)
    if config.distillation.distill_from is not None:
        from mor_megatron.huggingface.teacher import (
            load_teacher,
        )  # imports transformers, which takes each rank a second

        model.distillation = load_teacher(model, config)
    if fault is not None:
        fault(model)
    storages = {"built": unique_elements(model)}
    margins = Margins(model) if dist.get_world_size() == 1 else None
    engine = build_engine(model, config)
    storages["wrapped"] = unique_elements(engine.module)
    if model.distillation is not None:
        storages["teacher"] = sum(weight.nbytes for weight in model.distillation.teacher.parameters())
    reports = run_steps(engine, config)
    final, buffers = gather_parameters(engine.module), gather_buffers(engine.module)
    seed = config.training.seed
    result = Result(seed, reports, initial, final, buffers, engine.weights_norm(), storages)
    if margins is not None:
        result.margin, result.ties = margins.smallest, margins.ties
    return result


def run_steps(engine: Engine, config: Config, first: int = 1, count: int = STEPS) -> list[StepReport]:
    """Iterations `first` .. `first + count - 1` on the samples that belong to them."""
    engine.module.train()
    steps = range(first, first + count)
    return [train_step(engine, my_batches(config, step), config, step, config.optimizer.lr) for step in steps]


def step_with_a_fault(config: Config, victim: int, where: Literal["loss", "gradient"]) -> dict:
    """A healthy step, one with a loss or a gradient on one rank that is not finite, a healthy one; what came of it."""
    if config.training.fp16:
        get_accelerator().is_fp16_supported = lambda: True  # PyTorch computes fp16 on any CPU, slowly
    initialize_distributed(config)
    engine = build_engine(build_model(config), config)
    engine.module.train()
    run_steps(engine, config, count=1)
    before = gather_parameters(engine.module)
    hook = None
    if dist.get_rank() == victim:
        if where == "loss":
            hook = engine.module.register_forward_hook(lambda module, args, losses: losses * math.nan)
        else:
            weight = [p for name, p in engine.module.named_parameters() if name.endswith("linear_fc1.weight")][-1]
            hook = weight.register_hook(lambda gradient: gradient * math.inf)
    report = train_step(engine, my_batches(config, 2), config, 2, 0.1)
    if hook is not None:
        hook.remove()
    after = gather_parameters(engine.module)
    return {
        "applied": report.applied,
        "overflow": report.overflow,
        "faulty": report.faulty_ranks,
        "unchanged": all(torch.equal(after[name], value) for name, value in before.items()),
        "scale": engine.loss_scale,
        "then": run_steps(engine, config, first=3, count=1)[0].applied,
    }


def global_batch(size: int, step: int) -> Batch:
    """`size` sequences of one step; the number of counted tokens falls from one end of the batch to the other.

    Every other sequence begins with a run of one token, as tables and blank lines do: router logits are equal there.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (size, SEQ_LENGTH + 1), generator=generator)
    tokens[::2, :RUN] = tokens[::2, :1]
    counted = torch.linspace(SEQ_LENGTH, 1, size).long() if step % 2 else torch.full((size,), SEQ_LENGTH)
    mask = (torch.arange(SEQ_LENGTH) < counted.unsqueeze(1)).float()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)


def my_batches(config: Config, step: int) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches: a contiguous share, so that its masks differ from the others'."""
    batch = global_batch(config.training.global_batch_size, step)
    share = config.training.global_batch_size // parallel_state.get_data_parallel_world_size()
    begin = share * parallel_state.get_data_parallel_rank()
    size = config.training.micro_batch_size
    for i in range(begin, begin + share, size):
        yield Batch(*(x[i : i + size].clone() for x in (batch.tokens, batch.labels, batch.loss_mask)))


def unique_elements(model: nn.Module) -> int:
    """Elements of all parameters, told apart by where they start; a ZeRO-3 partition counts as the whole."""
    return sum({id(p) if hasattr(p, "ds_id") else p.data_ptr(): _numel(p) for p in model.parameters()}.values())


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def differences(
    got: Result,
    expected: Result,
    tolerance: float = FP32_LAYOUT_TOL,
    trained: Callable[[str], bool] = lambda name: True,
) -> list[tuple[str, float]]:
    """What differs by more than the tolerance, and by how much, in the order in which it came about.

    Numbers are compared by |a - b| / |b|, parameters and buffers by max|a - b| / max|b|. Weights hardly move in a few
    steps, so what training changed in them is compared too, by (max|a - b| - rounding) / max|change|. Weights that are
    not `trained` do not change.
    """
    found: list[tuple[str, float]] = []

    def note(name: str, error: float) -> None:
        if not error <= tolerance:
            found.append((name, error))

    _same_names("parameters", got.final, expected.final)
    _same_names("buffers", got.buffers, expected.buffers)
    for name, value in expected.initial.items():
        note(f"initial {name}", 0.0 if torch.equal(got.initial[name], value) else math.inf)
    for step, (a, b) in enumerate(zip(got.reports, expected.reports, strict=True), 1):
        _same_names(f"metrics of step {step}", a.routing, b.routing)
        numbers = {"lm_loss": (a.lm_loss, b.lm_loss)}
        numbers |= {name: (a.routing[name], b.routing[name]) for name in b.routing}
        if b.divergence is not None:
            numbers["divergence"] = a.divergence, b.divergence
        numbers["grad_norm"] = (a.grad_norm, b.grad_norm)
        for name, (x, y) in numbers.items():
            note(f"step {step}: {name}", abs(x - y) / abs(y) if x != y and y else abs(x - y))
        note(f"step {step}: applied", 0.0 if a.applied and b.applied else math.inf)
    norm = math.sqrt(sum(value.double().square().sum().item() for value in expected.final.values()))
    note("norm of the weights", abs(got.norm - norm) / norm)
    for name, value in expected.final.items():
        size, error = _largest(value), _largest(got.final[name].double() - value.double())
        change = _largest(value.double() - expected.initial[name].double())
        if not trained(name):
            note(f"frozen {name}", max(error, change))
            continue
        assert change > 0, f"{name} was not trained"
        note(name, error / size)
        note(f"change of {name}", max(0.0, error - FP32_ROUNDING * size) / change)
    for name, value in expected.buffers.items():
        note(name, _largest(got.buffers[name].double() - value.double()) / max(_largest(value), 1e-30))
    return found


def assert_close_in_bf16(got: Result, expected: Result) -> None:
    """Weights as they begin, losses, and the gradient's norm in the first step, as close as bf16 can have them."""
    for name, value in expected.initial.items():
        assert torch.equal(got.initial[name], value), name
    for step, (a, b) in enumerate(zip(got.reports, expected.reports, strict=True), 1):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=BF16_LOSS_TOL), f"step {step}"
        if b.divergence is not None:  # log-probabilities, as the loss
            assert a.divergence == pytest.approx(b.divergence, abs=BF16_LOSS_TOL * b.lm_loss), f"step {step}"
    assert got.reports[0].grad_norm == pytest.approx(expected.reports[0].grad_norm, rel=BF16_NORM_TOL)


def describe(found: list[tuple[str, float]]) -> str:
    """The first and the largest difference in one line."""
    worst = max(found, key=lambda item: item[1])
    return f"{found[0][0]} differs by {found[0][1]:.2g}; {len(found)} differ, {worst[0]} most, by {worst[1]:.2g}"


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _same_names(what: str, a: dict, b: dict) -> None:
    assert a.keys() == b.keys(), f"{what} differ: {sorted(a.keys() ^ b.keys())}"
