"""Models divided among ranks reproduce the authors' numbers: losses, router losses and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from authors import gradients_of, load_case, model_of
from full_state import gather_gradients
from test_reference import GRADIENT_TOL, LOSS_TOL
from torch import Tensor

from mor_megatron.config.schema import ParallelConfig
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.distributed.replicated import reduce_replicated
from mor_megatron.pipeline.schedule import run_schedule
from mor_megatron.recursion.context import Z_LOSS, RoutingContext
from mor_megatron.recursion.expert_choice import AUX_LOSS
from mor_megatron.recursion.token_choice import BALANCE_LOSS

LAYOUTS = {  # tensor parallel, pipeline parallel, sequence parallel
    "tp2": (2, 1, False),
    "tp2-sp": (2, 1, True),
    "pp2": (1, 2, False),
    "tp2-pp2": (2, 2, False),
}
QUICK = {("mor_expert_nr3", "pp2"), ("mor_token_nr3_softmax_balance_zloss", "tp2-pp2")}


@dataclass
class Numbers:
    """What a rank has: the last of a pipeline the loss, the first one the metrics, global rank 0 the gradients."""

    loss: float | None
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def pytest_generate_tests(metafunc):
    files = sorted(Path(metafunc.config.getoption("--reference-dir")).glob("*.safetensors"))
    metafunc.parametrize(
        ("path", "layout"),
        [
            pytest.param(path, name, id=f"{name}-{path.stem}", marks=marks(path.stem, name))
            for name, (_, stages, _) in LAYOUTS.items()
            for path in files
            if load_case(path).config.plan.block_size >= stages
        ],
    )


def marks(case: str, layout: str) -> tuple:
    return () if (case, layout) in QUICK else (pytest.mark.slow,)


def run_case(path: Path, layout: str) -> Numbers:
    tensor, stages, sequence_parallel = LAYOUTS[layout]
    case = load_case(path)
    parallel = ParallelConfig(tensor, sequence_parallel, stages)
    case = replace(case, config=replace(case.config, parallel=parallel))
    initialize_distributed(case.config)
    model = model_of(case)
    ids = case["input_ids"].long()
    # A ring wants as many micro-batches as ranks: the same one again, each with its share of the loss.
    count = stages
    contexts: list[RoutingContext] = []
    losses: list[Tensor] = []

    def make_context() -> RoutingContext:
        contexts.append(RoutingContext(router_loss_scale=1.0 / count))
        return contexts[-1]

    def loss(per_token: Tensor, batch: Batch) -> Tensor:
        losses.append(per_token[:, :-1].sum() / ids.numel() / count)
        return losses[-1]

    run_schedule(model, [Batch(ids, labels=ids.roll(-1, dims=1))] * count, count, make_context, loss)
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    reduce_replicated(gradients, model.config.sequence_parallel, model.tied_weight)
    gradients = gradients_of(case, gather_gradients(model), model)
    total = float(torch.stack(losses).sum()) if losses else None
    return Numbers(total, {name: float(value) for name, value in contexts[0].metrics.items()}, gradients)


def test_a_divided_model_has_the_authors_numbers(workers, path: Path, layout: str):
    tensor, stages, _ = LAYOUTS[layout]
    ranks = workers.run(tensor * stages, (tensor, stages), run_case, path, layout)
    case, first, last = load_case(path), ranks[0], ranks[-1]
    recursion, metrics = case.config.recursion, first.metrics
    assert last.loss == pytest.approx(float(case["train.loss_num_items"]), abs=LOSS_TOL)
    total = last.loss
    total += recursion.router_aux_loss_coeff * metrics.get(AUX_LOSS, 0.0)
    total += recursion.router_balance_coeff * metrics.get(BALANCE_LOSS, 0.0)
    total += recursion.router_z_loss_coeff * metrics.get(Z_LOSS, 0.0)
    assert total == pytest.approx(float(case["train.total_loss"]), abs=LOSS_TOL)
    theirs = {name.removeprefix("grad."): t for name, t in case.tensors.items() if name.startswith("grad.")}
    assert theirs, "the file holds no gradients"
    for name, gradient in theirs.items():
        error = (first.gradients[name].double() - gradient.double()).abs().max().item()
        assert error <= GRADIENT_TOL, f"grad.{name} differs by {error:.3g}"
