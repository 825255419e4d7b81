"""Every mode of the engine on one process: equal results, fp32 sums, faults and overflows that change nothing."""

import math
from dataclasses import replace

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from test_train_step import EXPERT, Tied, cut, global_batch, make_config, make_engine

from mor_megatron.config.validate import validate
from mor_megatron.pretraining.loop import NonFiniteError, advance
from mor_megatron.training.engine import build_engine, choose_driver
from mor_megatron.training.gradients import global_norm
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import train_step

pytestmark = pytest.mark.usefixtures("process_group")

PLAIN = [{"zero_stage": zero} for zero in (0, 1, 2, 3)]
OFFLOADED = [{"zero_stage": zero, "optimizer_cpu_offload": True} for zero in (1, 2, 3)]
OVERLAPPED = [{"zero_stage": zero, "overlap_grad_reduce": "on"} for zero in (2, 3)]
ENGINE_DRIVEN = [*PLAIN[2:], *OFFLOADED]
SLOW_IN_FP32 = [pytest.param({}, id="fp32", marks=pytest.mark.slow), {"bf16": True}]
UNUSUAL = [({}, "caching"), ({"bf16": True}, "caching"), ({"bf16": True}, "sharing")]


def mode_name(mode):
    parts = [f"zero{mode['zero_stage']}"] if "zero_stage" in mode else ["fp32" if not mode else "bf16"]
    return "-".join([*parts, *(key for key in ("optimizer_cpu_offload", "overlap_grad_reduce") if key in mode)])


@pytest.fixture
def configure(tmp_path):
    """make_config with more training settings. ZeRO-3 partitions also the tiniest weight."""

    def build(recursion=EXPERT, optimizer=None, micro_batch_size=1, **training):
        config = make_config(recursion=recursion, micro_batch_size=micro_batch_size, **(optimizer or {}))
        if training.get("zero_stage") == 3:
            path = tmp_path / "zero3.json"
            path.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
            training["deepspeed_config"] = str(path)
        return validate(replace(config, training=replace(config.training, **training)))

    return build


@pytest.fixture
def fp16_everywhere(monkeypatch):
    """PyTorch computes fp16 on any CPU, slowly; DeepSpeed refuses those without fp16 instructions."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def whole_weights(engine):
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(
        list(parameters.values()), enabled=engine.deepspeed.zero_optimization_stage() == 3
    ):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def step(engine, config, iteration, lr=0.1):
    return train_step(engine, cut(global_batch(iteration), config.training.micro_batch_size), config, iteration, lr)


def run(config, steps=2, lr=0.1):
    engine = make_engine(config)
    reports = [step(engine, config, iteration, lr) for iteration in range(1, steps + 1)]
    return reports, whole_weights(engine)


@pytest.mark.parametrize(
    ("precision", "kv_mode"),
    [
        pytest.param({}, "sharing", id="fp32-sharing"),
        *(pytest.param(*case, id="-".join((mode_name(case[0]), case[1])), marks=pytest.mark.slow) for case in UNUSUAL),
    ],
)
def test_modes_are_equal(configure, precision, kv_mode):
    """Tied head, routers and shared keys included, whose weights ZeRO-3 has to gather for other modules."""
    settings = {"recursion": replace(EXPERT, kv_mode=kv_mode), "optimizer": {"clip_grad": 0.3}}
    (expected, weights), *others = (
        run(configure(**settings, **precision, **mode)) for mode in [*PLAIN, *OFFLOADED, *OVERLAPPED]
    )
    assert all(report.grad_norm > 0.3 for report in expected), "the case should clip"
    for mode, (reports, after) in zip([*PLAIN, *OFFLOADED, *OVERLAPPED][1:], others, strict=True):
        for got, wanted in zip(reports, expected, strict=True):
            assert got.lm_loss == pytest.approx(wanted.lm_loss, rel=1e-6), mode
            assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6), mode
            assert got.routing == pytest.approx(wanted.routing, rel=1e-5), mode
        for name, value in weights.items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6, msg=f"{mode} {name}")


def test_an_offloaded_adam_is_the_same_adam(configure):
    optimizer = {"optimizer": "adam", "weight_decay": 0.1}
    expected, *others = (run(configure(optimizer=optimizer, **mode), lr=0.01)[1] for mode in (PLAIN[0], *OFFLOADED))
    for mode, got in zip(OFFLOADED, others, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=f"{mode} {name}")


def test_zero_3_holds_no_weight_between_steps(configure):
    engine = make_engine(configure(zero_stage=3))
    step(engine, engine.module.run_config, 1)
    assert {parameter.numel() for parameter in engine.module.parameters()} == {0}


def test_the_driver_follows_from_the_settings(configure, fp16_everywhere):
    assert choose_driver(configure(zero_stage=1)) == "schedule"
    for mode in [*ENGINE_DRIVEN, {"zero_stage": 1, "fp16": True}]:
        assert choose_driver(configure(**mode)) == "engine"


@pytest.mark.parametrize("precision", SLOW_IN_FP32, ids=mode_name)
@pytest.mark.parametrize("mode", ENGINE_DRIVEN, ids=mode_name)
def test_a_fault_changes_nothing(configure, mode, precision):
    """A loss that is not finite is found before the step and names the rank, a gradient in the step and does not."""
    config = configure(optimizer={"optimizer": "adam", "weight_decay": 0.1}, **mode, **precision)
    engine, twin = make_engine(config), make_engine(config)
    for e in (engine, twin):
        assert step(e, config, 1, lr=0.01).applied
    before = whole_weights(engine)

    hook = engine.module.register_forward_hook(lambda module, args, losses: losses * math.nan)
    report = step(engine, config, 2)
    hook.remove()
    assert (report.applied, report.faulty_ranks) == (False, (0,))
    assert math.isnan(report.lm_loss)

    hook = engine.module.layers[1].mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    report = step(engine, config, 2)
    hook.remove()
    assert (report.applied, report.faulty_ranks, report.overflow) == (False, (), False)
    assert math.isfinite(report.lm_loss)
    assert report.grad_norm == math.inf

    for name, value in whole_weights(engine).items():
        assert torch.equal(value, before[name]), name
    reports = [step(e, config, 3, lr=0.01) for e in (engine, twin)]
    assert reports[0] == reports[1]
    expected = whole_weights(twin)
    for name, value in whole_weights(engine).items():
        assert torch.equal(value, expected[name]), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ENGINE_DRIVEN, ids=mode_name)
def test_bf16_contributions_are_summed_in_fp32(configure, mode):
    """Micro-batches and uses of a tied weight alike; a bf16 sum is measurably off."""
    engine = build_engine(Tied(), configure(bf16=True, optimizer={"sgd_momentum": 0.0}, **mode))
    with deepspeed.zero.GatheredParameters([engine.module.weight], enabled=mode["zero_stage"] == 3):
        weight = engine.module.weight.detach().clone().requires_grad_()
    xs = torch.randn(4, 3, 8, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    for micro_batch in xs:
        engine.backward(engine.forward(list(micro_batch)))
    got = gradients_in_step(engine)[0].view(16, 16)
    assert got.dtype == torch.float32

    parts = [torch.autograd.grad((x @ weight).float().square().sum(), weight)[0] for x in xs.flatten(0, 1)]
    exact = torch.stack(parts).double().sum(0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    in_bf16 = sum(parts[1:], parts[0].clone())
    assert (in_bf16.double() - exact).abs().max() > 1e-4 * exact.abs().max(), "the case should tell them apart"


def gradients_in_step(engine):
    """What the optimizer is about to use."""
    seen, norm_and_clip = [], engine.norm_and_clip

    def look():
        seen.extend(gradient.clone() for _, gradient in engine.gradient_shards())
        return norm_and_clip()

    engine.norm_and_clip = look
    engine.step(lr=0.1, clip_grad=0.0)
    return seen


def test_the_norm_counts_a_copy_once():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.nn.Parameter(torch.zeros(3)), torch.randn(3, generator=generator)) for _ in range(3)]
    pairs[1][0].is_tied_copy = True
    assert global_norm(pairs) == pytest.approx(math.hypot(pairs[0][1].norm(), pairs[2][1].norm()))
    assert global_norm([]) == 0.0


def learn(config):
    """Twenty steps on one batch."""
    engine = make_engine(config)
    return [train_step(engine, cut(global_batch(), 2), config, i, 0.01) for i in range(1, 21)]


@pytest.fixture(scope="module")
def fp32(process_group):
    return learn(make_config((False, 1), optimizer="adam", clip_grad=0.5))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fp16_follows_fp32(configure, fp16_everywhere, fp32, zero):
    """Later a rounding may send a token another way, early it must not matter."""
    optimizer = {"optimizer": "adam", "clip_grad": 0.5}
    fp16 = learn(configure(optimizer=optimizer, micro_batch_size=2, zero_stage=zero, fp16=True))
    assert fp32[0].lm_loss - fp32[-1].lm_loss > 0.5, "the case should learn"
    assert {(report.applied, report.loss_scale) for report in fp16} == {(True, 65536.0)}
    for a, b in zip(fp16, fp32, strict=True):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=1e-2)
    for a, b in zip(fp16[:5], fp32[:5], strict=True):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=1e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_router_losses_are_scaled_as_the_loss_is(configure, fp16_everywhere, routing):
    """With additive gating a router learns from its own losses only; unscaled, they would move it by nothing."""
    recursion = replace(EXPERT, routing=routing, router_gating="additive", router_func=None)
    moved = []
    for precision in ({}, {"fp16": True}, {"fp16": True, "initial_loss_scale": 2.0**12}):
        config = configure(recursion=recursion, zero_stage=2, **precision)
        engine = make_engine(config)
        before = whole_weights(engine)
        step(engine, config, 1, lr=100.0)
        moved.append({n: v.float() - before[n].float() for n, v in whole_weights(engine).items() if "router" in n})
    for name, exact in moved[0].items():
        assert exact.abs().max() > 1e-2, name
        for got in moved[1:]:
            torch.testing.assert_close(got[name], exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_overflow_skips_and_halves(configure, fp16_everywhere, zero):
    config = configure(zero_stage=zero, fp16=True, initial_loss_scale=2.0**40, hysteresis=2, max_skipped_steps=1)
    engine, progress = make_engine(config), Progress()
    before = whole_weights(engine)
    for scale in (2.0**40, 2.0**40, 2.0**39):  # the first overflow only uses up the hysteresis
        report = step(engine, config, 1)
        assert (report.applied, report.overflow, report.faulty_ranks) == (False, True, ())
        assert report.loss_scale == scale
        assert math.isfinite(report.lm_loss)
        advance(progress, report, config)
    assert (progress.skipped_iterations, progress.skipped_in_a_row, progress.nan_iterations) == (3, 0, 0)
    for name, value in whole_weights(engine).items():
        assert torch.equal(value, before[name]), name
    engine.deepspeed.optimizer.loss_scaler.cur_scale = 2.0**15
    report = step(engine, config, 1)
    assert (report.applied, report.overflow, report.loss_scale) == (True, False, 2.0**15)


@pytest.mark.parametrize("zero", [1, 3])
def test_an_overflow_at_the_smallest_scale_is_a_fault(configure, fp16_everywhere, zero):
    config = configure(zero_stage=zero, fp16=True, initial_loss_scale=2.0, min_loss_scale=2, max_skipped_steps=1)
    engine, progress = make_engine(config), Progress()
    engine.module.layers[1].mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    report = step(engine, config, 1)
    assert (report.applied, report.overflow, engine.loss_scale) == (False, False, 2.0)
    advance(progress, report, config)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        advance(progress, step(engine, config, 2), config)


def test_fp16_without_arithmetic_for_it_is_refused(configure, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ValueError, match=r"fp16=True, but cpu has no fp16 arithmetic .*use --bf16"):
        make_engine(configure(zero_stage=1, fp16=True))


@pytest.mark.parametrize("zero", [1, 2])
def test_deepspeed_does_not_wait_for_the_device(configure, monkeypatch, zero):
    """In no iteration; its throughput timer would begin to in the third."""
    waits = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *device: waits.append(device))
    run(configure(micro_batch_size=2, zero_stage=zero), steps=4)
    assert waits == []
