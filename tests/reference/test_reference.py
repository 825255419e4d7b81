"""Our model compared with the authors' numbers: logits, losses, gradients, selections, decoding.

`pytest tests/reference --reference-dir DIR` runs another directory of such files. With CUDA, our model runs there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from authors import Case, gradients_of, load_case, model_of, unique_storages

from mor_megatron.data.batch import Batch
from mor_megatron.distributed.cpu import device
from mor_megatron.recursion.context import Z_LOSS, RoutingContext
from mor_megatron.recursion.expert_choice import AUX_LOSS, SELECTION_ACCURACY
from mor_megatron.recursion.token_choice import BALANCE_LOSS, DEPTH_FRACTION

LOGITS_TOL = 1e-5  # fp32 products of eight layers, summed in another order
LOSS_TOL = 1e-6
GRADIENT_TOL = 1e-6


def pytest_generate_tests(metafunc):
    directory = Path(metafunc.config.getoption("--reference-dir"))
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise pytest.UsageError(f"--reference-dir {directory}: no .safetensors files")
    metafunc.parametrize("case", files, ids=lambda path: path.stem, indirect=True)


@pytest.fixture
def case(request, process_group) -> Case:
    return load_case(request.param)


def _ids(case: Case) -> torch.Tensor:
    return case["input_ids"].long().to(device())


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    error = (ours.detach().double().cpu() - theirs.double()).abs().max().item()
    assert error <= tolerance, f"{what} differs by {error:.3g}"


def _losses(model, case: Case, context: RoutingContext) -> torch.Tensor:
    """Cross entropies of the S-1 predictions of each sequence, [B, S-1]."""
    ids = _ids(case)
    return model(Batch(ids, labels=ids.roll(-1, dims=1)), context)[:, :-1]


def _check_selections(case: Case, context: RoutingContext, mode: str) -> None:
    for r in range(case.config.recursion.num_recursions):
        if f"{mode}.rec{r}.selected" in case:
            selected = case[f"{mode}.rec{r}.selected"]
            ours = torch.stack([m.nonzero().view(-1) for m in context.trace[f"active_{r}"].cpu().unbind(1)])
            assert torch.equal(ours, selected.long()), f"{mode}: recursion {r} selects other tokens"


def test_storages_match_the_authors_count(case):
    model = model_of(case)
    count = unique_storages(model)
    if case.config.recursion.router_balance == "loss_free" and case.routing == "token_choice":
        count += model.router.balance_bias.numel()  # a parameter without gradient there, a buffer here
    assert count == case.meta["n_params"]


def test_training_forward(case):
    model, context = model_of(case), RoutingContext(trace={})
    _close(model(Batch(_ids(case)), context), case["train.logits"], LOGITS_TOL, "train.logits")
    losses = _losses(model, case, RoutingContext())
    _close(losses.mean(), case["train.loss_mean"], LOSS_TOL, "train.loss_mean")
    _close(losses.sum() / _ids(case).numel(), case["train.loss_num_items"], LOSS_TOL, "train.loss_num_items")
    _check_selections(case, context, "train")


def test_training_router(case):
    model, context = model_of(case), RoutingContext(trace={})
    _losses(model, case, context)
    recursion, metrics = case.config.recursion, context.metrics
    if case.routing == "none":
        assert metrics == {}
        return
    if recursion.router_z_loss_coeff:
        _close(metrics[Z_LOSS], case["train.router_z_loss"], LOSS_TOL, "train.router_z_loss")
    if case.routing == "token_choice":
        _close(context.trace["router_logits"].transpose(0, 1), case["train.routertok.logits"], LOGITS_TOL, "logits")
        assert torch.equal(context.trace["depth"].t().cpu(), case["train.tok.depth_index"].long())
        fractions = torch.stack([metrics[DEPTH_FRACTION.format(r)] for r in range(recursion.num_recursions)])
        _close(fractions, case["train.balancing_ratio"], LOSS_TOL, "train.balancing_ratio")
        if recursion.router_balance == "loss":
            _close(metrics[BALANCE_LOSS], case["train.balancing_loss"], LOSS_TOL, "train.balancing_loss")
        return
    for r in range(recursion.num_recursions):
        logits = context.trace[f"router_logits_{r}"].transpose(0, 1).cpu()
        _close(logits, case[f"train.router{r}.logits"], LOGITS_TOL, f"train.router{r}.logits")
        _close(context.trace[f"aux_loss_{r}"], case[f"train.rec{r}.sampling_loss"], LOSS_TOL, f"sampling_loss {r}")
        accuracy = context.trace[f"selection_accuracy_{r}"]
        if recursion.router_func == "none":
            # The authors compare the logit, not its sigmoid, with 0.5 here (docs/mor.md, sec. 3.2): redo it their way.
            target = context.trace[f"active_{r}"].t().cpu()
            candidates = torch.ones_like(target) if r == 0 else context.trace[f"active_{r - 1}"].t().cpu()
            chosen = target[candidates].view(logits.shape[0], -1)
            accuracy = ((logits.squeeze(-1) >= 0.5) == chosen).float().mean()
        _close(accuracy, case[f"train.rec{r}.sampling_acc"], LOSS_TOL, f"sampling_acc {r}")
    _close(metrics[AUX_LOSS], case["train.sampling_loss"], LOSS_TOL, "train.sampling_loss")
    if recursion.router_func != "none":
        _close(metrics[SELECTION_ACCURACY], case["train.sampling_acc"], LOSS_TOL, "train.sampling_acc")


def test_total_loss_and_gradients(case):
    model, context = model_of(case), RoutingContext()
    loss = _losses(model, case, context).sum() / _ids(case).numel()
    loss.backward()
    recursion, metrics = case.config.recursion, context.metrics
    total = loss.detach()
    total = total + recursion.router_aux_loss_coeff * metrics.get(AUX_LOSS, 0.0)
    total = total + recursion.router_balance_coeff * metrics.get(BALANCE_LOSS, 0.0)
    total = total + recursion.router_z_loss_coeff * metrics.get(Z_LOSS, 0.0)
    _close(total, case["train.total_loss"], LOSS_TOL, "train.total_loss")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = gradients_of(case, gradients, model)
    theirs = {name.removeprefix("grad."): t for name, t in case.tensors.items() if name.startswith("grad.")}
    assert theirs, "the file holds no gradients"
    for name, gradient in theirs.items():
        assert name in ours, f"no gradient for {name}"
        _close(ours[name], gradient, GRADIENT_TOL, f"grad.{name}")


def test_evaluation(case):
    model, context = model_of(case).eval(), RoutingContext(trace={})
    with torch.no_grad():
        _close(model(Batch(_ids(case)), context), case["eval.logits"], LOGITS_TOL, "eval.logits")
        losses = _losses(model, case, RoutingContext())
    _close(losses.mean(), case["eval.loss_mean"], LOSS_TOL, "eval.loss_mean")
    _check_selections(case, context, "eval")


def test_decoding(case):
    """Their cached decoding equals our uncached forward over the same prefix."""
    if "decode.logits" not in case:
        assert case.routing != "none", "an unrouted case must hold decoding logits"
        return
    model, ids = model_of(case).eval(), _ids(case)
    prefill = int(case["decode.prefill_len"].item())
    with torch.no_grad():
        for step in range(case["decode.logits"].shape[1]):
            logits = model(Batch(ids[:, : prefill + step]))[:, -1]
            _close(logits, case["decode.logits"][:, step], LOGITS_TOL, f"decode step {step}")
