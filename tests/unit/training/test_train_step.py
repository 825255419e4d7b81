"""One step: compared with plain autograd, over modes and micro-batch sizes, with fp32 sums and non-finite values."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, RecursionConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.model.mor_model import build_model
from mor_megatron.pretraining.loop import NonFiniteError, advance
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.engine import build_engine
from mor_megatron.training.gradients import sum_of_squares
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import train_step

pytestmark = pytest.mark.usefixtures("process_group")

VOCABULARY = 40
MODES = [(bf16, zero) for bf16 in (False, True) for zero in (0, 1)]
SLOW_BUT_ZERO1 = [pytest.param(mode, marks=() if mode[1] else pytest.mark.slow) for mode in MODES]
EXPERT = RecursionConfig(num_recursions=3, routing="expert_choice", router_aux_loss_coeff=0.1, router_z_loss_coeff=0.01)
RECURSIVE = RecursionConfig(num_recursions=3)


def mode_name(mode):
    return f"{'bf16' if mode[0] else 'fp32'}-zero{mode[1]}"


def make_config(mode=(False, 0), recursion=EXPERT, micro_batch_size=2, **optimizer):
    settings = {"optimizer": "sgd", "clip_grad": 0.0, "weight_decay": 0.0} | optimizer
    return validate(
        Config(
            model=ModelConfig(
                num_layers=5, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, vocab_size=VOCABULARY
            ),
            recursion=recursion,
            data=DataConfig(seq_length=12),
            optimizer=OptimizerConfig(**settings),
            training=TrainingConfig(
                micro_batch_size=micro_batch_size, global_batch_size=4, bf16=mode[0], zero_stage=mode[1]
            ),
        )
    )


def make_engine(config):
    engine = build_engine(build_model(config), config)
    engine.module.train()
    return engine


def global_batch(seed=0):
    """Four sequences whose masks count very different numbers of tokens, so that means of means would show."""
    tokens = torch.randint(0, VOCABULARY, (4, 13), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < torch.tensor([[12], [3], [0], [7]])).float()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)


def cut(batch, size):
    for begin in range(0, 4, size):
        yield Batch(*(x[begin : begin + size] for x in (batch.tokens, batch.labels, batch.loss_mask)))


def weights(engine):
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def run(config, steps=3, driver="schedule", lr=0.1):
    engine = make_engine(config)
    size = config.training.micro_batch_size
    reports = [train_step(engine, cut(global_batch(i), size), config, i + 1, lr, driver) for i in range(steps)]
    return reports, weights(engine)


@pytest.mark.parametrize("mode", SLOW_BUT_ZERO1, ids=mode_name)
def test_both_drivers_are_equal(mode):
    config = make_config(mode, optimizer="adam", clip_grad=0.5)
    (one, one_weights), (other, other_weights) = run(config, driver="schedule"), run(config, driver="engine")
    assert one == other
    for name in one_weights:
        assert torch.equal(one_weights[name], other_weights[name]), name


def test_a_step_is_plain_gradient_descent():
    """Loss, norm, clipping and update against autograd on the whole batch at once, without any of our machinery."""
    config = make_config(recursion=RECURSIVE, micro_batch_size=1, clip_grad=0.2)
    engine = make_engine(config)
    batch = global_batch()
    before = weights(engine)
    losses = engine.module(batch, RoutingContext())
    loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
    parameters = dict(engine.module.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    assert norm > 0.2, "the case should clip"

    report = train_step(engine, cut(batch, 1), config, 1, 0.1)
    assert report.applied
    assert report.lm_loss == pytest.approx(loss.item(), rel=1e-6)
    assert report.grad_norm == pytest.approx(norm, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name], before[name] - 0.1 * gradient * 0.2 / norm, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("zero", [0, 1])
def test_nothing_depends_on_the_cut_into_micro_batches(zero):
    """Router losses included; three steps, so that gradients and not only losses are compared."""
    results = [run(make_config((False, zero), micro_batch_size=size)) for size in (1, 2, 4)]
    for reports, after in results[1:]:
        for got, expected in zip(reports, results[0][0], strict=True):
            assert got.lm_loss == pytest.approx(expected.lm_loss, rel=1e-6)
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
            assert got.routing == pytest.approx(expected.routing, rel=1e-5)
        for name, value in after.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_zero_stages_are_equal(bf16):
    (zero0, weights0), (zero1, weights1) = (run(make_config((bf16, zero), clip_grad=0.3)) for zero in (0, 1))
    for a, b in zip(zero0, zero1, strict=True):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    for name in weights0:
        torch.testing.assert_close(weights0[name], weights1[name], rtol=1e-5, atol=1e-6)


class Tied(nn.Module):
    """One weight used `uses` times, as a shared block is."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.weight = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16())

    def forward(self, xs):
        return sum((x @ self.weight).float().square().sum() for x in xs)


@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_contributions_are_summed_in_fp32(zero):
    """Micro-batches and uses of a tied weight alike; a bf16 sum is measurably off."""
    config = make_config((True, zero))
    engine = build_engine(Tied(), config)
    xs = torch.randn(4, 3, 8, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    for micro_batch in xs:
        engine.module(list(micro_batch)).backward()
    got = engine.flat_gradients()[0].view(16, 16)
    assert got.dtype == torch.float32

    weight = engine.module.weight.detach().clone().requires_grad_()
    parts = [torch.autograd.grad((x @ weight).float().square().sum(), weight)[0] for x in xs.flatten(0, 1)]
    exact = torch.stack(parts).double().sum(0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    in_bf16 = torch.zeros_like(parts[0])
    for part in parts:
        in_bf16 += part
    assert (in_bf16.double() - exact).abs().max() > 1e-4 * exact.abs().max(), "the case should tell them apart"


@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_weights_follow_fp32_masters(zero):
    """Steps of a hundredth of a percent add up; added to bf16 weights, each would round to nothing."""
    config = make_config((True, zero), sgd_momentum=0.0)
    engine = build_engine(Tied(), config)
    start = engine.module.weight.detach().clone()
    for _ in range(64):
        engine.module([torch.eye(16, dtype=torch.bfloat16)]).backward()  # gradient: twice the weight
        engine.step(lr=1e-4 / 2, clip_grad=0.0)
    assert torch.equal(start - 1e-4 * start, start), "the case should tell them apart"
    moved = (engine.module.weight.detach().float() / start.float()).mean()
    assert moved.item() == pytest.approx((1 - 1e-4) ** 64, abs=5e-4)


@pytest.mark.parametrize("mode", SLOW_BUT_ZERO1, ids=mode_name)
def test_a_non_finite_gradient_changes_nothing(mode):
    """Weights and optimizer state: the run goes on as if the iteration had not been."""
    config = make_config(mode, optimizer="adam", weight_decay=0.1)
    engine, twin = make_engine(config), make_engine(config)
    for e in (engine, twin):
        assert train_step(e, cut(global_batch(0), 2), config, 1, 0.01).applied
    before = weights(engine)
    hook = engine.module.layers[1].mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    report = train_step(engine, cut(global_batch(1), 2), config, 2, 0.01)
    hook.remove()
    assert not report.applied
    assert report.faulty_ranks == (0,)
    assert math.isfinite(report.lm_loss)
    for name, value in weights(engine).items():
        assert torch.equal(value, before[name]), name

    reports = [train_step(e, cut(global_batch(2), 2), config, 3, 0.01) for e in (engine, twin)]
    assert reports[0] == reports[1]
    expected = weights(twin)
    for name, value in weights(engine).items():
        assert torch.equal(value, expected[name]), name
        assert not torch.equal(value, before[name]), name


def test_a_non_finite_loss_leaves_the_balancing_bias_alone():
    recursion = replace(EXPERT, routing="token_choice", router_balance="loss_free", router_z_loss_coeff=0.0)
    config = make_config(recursion=recursion)
    engine = make_engine(config)
    train_step(engine, cut(global_batch(0), 2), config, 1, 0.01)
    bias = engine.module.router.balance_bias.clone()
    assert bias.abs().max() > 0
    hook = engine.module.register_forward_hook(lambda module, args, losses: losses * math.nan)
    report = train_step(engine, cut(global_batch(1), 2), config, 2, 0.01)
    hook.remove()
    assert math.isnan(report.lm_loss)
    assert not report.applied
    assert torch.equal(engine.module.router.balance_bias, bias)

    progress = Progress(iteration=1)
    limited = replace(config, training=replace(config.training, max_skipped_steps=1))
    advance(progress, report, limited)
    assert (progress.skipped_iterations, progress.nan_iterations, progress.iteration) == (1, 1, 2)
    with pytest.raises(NonFiniteError, match=r"iteration 3: loss nan, .*on rank 0, 2 steps in a row .*lower --lr"):
        advance(progress, report, limited)


def test_an_applied_step_ends_a_row_of_skipped_ones():
    config = make_config()
    engine = make_engine(config)
    progress = Progress(iteration=4, skipped_iterations=2, skipped_in_a_row=2)
    advance(progress, train_step(engine, cut(global_batch(), 2), config, 5, 0.01), config)
    assert (progress.skipped_iterations, progress.skipped_in_a_row, progress.consumed_samples) == (2, 0, 4)


def test_squares_are_summed_almost_in_fp64():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((300, 1024), (5,), (2049,), (7, 11, 13))]
    exact = sum(tensor.double().square().sum().item() for tensor in tensors)
    assert sum_of_squares(tensors).item() == pytest.approx(exact, rel=3e-8)
    tensors[3][0, 0, 0] = math.nan
    assert sum_of_squares(tensors).isnan()


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_discarded_gradients_do_not_come_back(mode):
    engine = make_engine(make_config(mode))
    engine.module(global_batch(), RoutingContext()).sum().backward()
    assert max(gradient.abs().max() for gradient in engine.flat_gradients()) > 0
    engine.discard()
    assert all(gradient.abs().max() == 0 for gradient in engine.flat_gradients())


def test_an_iteration_without_counted_tokens_does_nothing_harmful():
    config = make_config(recursion=RECURSIVE)
    engine = make_engine(config)
    batch = global_batch()
    empty = Batch(batch.tokens, batch.labels, torch.zeros_like(batch.loss_mask))
    report = train_step(engine, cut(empty, 2), config, 1, 0.1)
    assert (report.lm_loss, report.grad_norm, report.applied) == (0.0, 0.0, True)


def test_each_micro_batch_is_fetched_when_it_is_needed():
    config = make_config()
    engine, order = make_engine(config), []
    engine.module.register_forward_hook(lambda *call: order.append("computed"))

    def batches():
        for batch in cut(global_batch(), 2):
            order.append("fetched")
            yield replace(batch, loss_mask=None)

    train_step(engine, batches(), config, 1, 0.1)
    assert order == ["fetched", "computed"] * 2


@pytest.mark.parametrize(("mode", "by_deepspeed"), [((False, 0), 0), ((False, 1), 2), ((True, 1), 1)])
def test_the_host_reads_the_device_for_the_report_and_for_the_norm(monkeypatch, mode, by_deepspeed):
    """And where DeepSpeed looks at the norm once more. The model has no routing, whose reads are counted elsewhere."""
    config = make_config(mode, RECURSIVE, clip_grad=0.1)
    engine, reads = make_engine(config), []
    batches = [replace(batch, loss_mask=None) for batch in cut(global_batch(), 2)]
    train_step(engine, iter(batches), config, 1, 0.1)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, read=read: reads.append(name) or read(*a))
    train_step(engine, iter(batches), config, 2, 0.1)
    assert reads[:2] == ["tolist", "__float__"]
    assert len(reads) == 2 + by_deepspeed
