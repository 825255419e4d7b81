"""The choice of kernels and optional GPU libraries, by flag, precision and machine; tools/gpu_check.py runs them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from models import SEQ, small_config
from torch.nn.attention import SDPBackend

from mor_megatron.config.schema import Config
from mor_megatron.model import attention_by_shape, elementwise, kernels, layer_spec, ranges
from mor_megatron.model.attention_by_shape import AttentionByShape
from mor_megatron.model.attention_check import Heads
from mor_megatron.model.kernels import attention_kernels, uses_transformer_engine
from mor_megatron.model.mor_model import build_model
from mor_megatron.pretraining import capabilities

CUDNN, FLASH, *OTHERS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
HOPPER, AMPERE, VOLTA = (9, 0), (8, 0), (7, 0)


def _config(name: str = "expert", bf16: bool = True, **training) -> Config:
    config = small_config(name)
    return replace(config, training=replace(config.training, bf16=bf16, **training))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, *installed, takes, broken): a machine with such a card.

    `takes` are the kernels for regular rows, `broken` what fails when it is tried, `installed` packages that import.
    """

    empty = torch.empty

    def on_meta(*shape, device=None, **options):
        return empty(*shape, device="meta" if device == "cuda" else device, **options)

    def pretend(capability, *installed: str, takes=("cudnn", "flash"), broken: str = "", cudnn=91501) -> None:
        def tried(name: str, heads: Heads) -> str | None:
            return f"{name} fails with RuntimeError: no compiler" if name in broken else None

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100" if capability < AMPERE else "H100")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda query, *others: query.dtype)
        monkeypatch.setattr(torch, "empty", on_meta)
        for name in ("cudnn", "flash"):
            can = name in takes
            monkeypatch.setattr(
                torch.backends.cuda,
                f"can_use_{name}_attention",
                lambda dtype, can=can: can and dtype != torch.float32,
            )
        monkeypatch.setattr(kernels, "tried", tried)
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            # None in sys.modules makes an import fail as if the package were absent.
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if name in installed else None)

    return pretend


TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine.pytorch")


def test_without_cuda_nothing_is_used():
    assert attention_kernels(_config()) is None
    assert not uses_transformer_engine(_config())


@pytest.mark.parametrize(
    ("capability", "backend", "expected"),
    [
        (HOPPER, "auto", [CUDNN, FLASH]),
        (HOPPER, "cudnn", [CUDNN, FLASH]),
        (HOPPER, "flash", [FLASH]),
        (HOPPER, "sdpa", [CUDNN, FLASH]),
        (AMPERE, "auto", [FLASH]),
        (AMPERE, "cudnn", [CUDNN, FLASH]),
    ],
)
def test_regular_rows(gpu, capability, backend, expected):
    gpu(capability)
    chosen = attention_kernels(_config(attention_backend=backend))
    assert chosen.fixed == (*expected, *OTHERS)
    assert chosen.rows == {SEQ, int(SEQ * 2 / 3), int(SEQ / 3)}
    assert (chosen.no_varlen is None) == (chosen.no_ranges is None) == (backend != "sdpa")


def test_a_cudnn_with_wrong_gradients_is_not_used(gpu):
    gpu(HOPPER, cudnn=91300)
    assert attention_kernels(_config()).fixed == (FLASH, *OTHERS)
    with pytest.raises(ValueError, match="attention-backend=cudnn, but its version 91300 is older than 91501"):
        attention_kernels(_config(attention_backend="cudnn"))


def test_deterministic_attention_is_flash(gpu, monkeypatch):
    gpu(HOPPER)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert attention_kernels(_config()).fixed == (FLASH, *OTHERS)
    with pytest.raises(ValueError, match="attention-backend=cudnn, but its backward pass is not deterministic"):
        attention_kernels(_config(attention_backend="cudnn"))


def test_a_kernel_that_fails_is_replaced_and_reported(gpu, monkeypatch, process_group):
    monkeypatch.setattr(capabilities, "uses_fused_adam", lambda optimizer: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    gpu(HOPPER)
    found = capabilities.capabilities(_config("expert_sharing"))
    assert found["attention"] == "cuDNN"
    assert found["attention of ragged rows"] == "range attention"
    assert found["attention under masks"] == "range attention"
    gpu(HOPPER, broken="range attention")
    found = capabilities.capabilities(_config("expert_sharing"))
    assert found["attention of ragged rows"] == "varlen_attn"
    assert "range attention fails with RuntimeError: no compiler" in found["attention under masks"]
    # What no row of the model needs is neither tried nor reported.
    found = capabilities.capabilities(_config("vanilla"))
    assert "attention of ragged rows" not in found
    assert "attention under masks" not in found


def test_what_fails_or_computes_something_else_is_found(monkeypatch):
    heads = Heads(4, 2, 16, torch.float32, "cpu")
    tried = kernels.tried.__wrapped__
    assert tried("flash", heads) is None
    assert re.fullmatch(r"varlen_attn fails with \w+: .*", tried("varlen_attn", heads))  # not on a CPU
    monkeypatch.setattr(attention_by_shape, "_range_attention", lambda: by_range)

    def by_range(query, key, value, first, last, queries, block, scale):
        return ranges.attend(query, key, value, first, last, scale)

    assert tried("range attention", heads) is None

    def without_gradients_of_keys(query, key, value, first, last, *others):
        return ranges.attend(query, key.detach() + 0 * key, value, first, last)

    monkeypatch.setattr(attention_by_shape, "_range_attention", lambda: without_gradients_of_keys)
    assert re.fullmatch(
        r"range attention is wrong here, by .*, 1, .* of the largest value", tried("range attention", heads)
    )


def test_a_kernel_that_crashes_the_gpu_ends_the_run(monkeypatch):
    """Nothing could take its place: every later call would fail, too."""

    def illegal() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    heads = Heads(4, 2, 16, torch.float32, "cpu")
    monkeypatch.setattr(attention_by_shape, "_range_attention", lambda: illegal)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    message = r"range attention has crashed .* \(CUDA error: an illegal memory access was encountered\): .* sdpa"
    with pytest.raises(ValueError, match=message):
        kernels.tried.__wrapped__("range attention", heads)
    with pytest.raises(ValueError, match=r"without which the loss is not fused has crashed .*Triton"):
        elementwise.tried(lambda: True, "the loss is not fused")  # a launch succeeds, and fails later


def test_a_kernel_that_a_flag_avoids_is_not_tried(gpu, monkeypatch):
    seen = []
    gpu(HOPPER)
    monkeypatch.setattr(kernels, "tried", lambda name, heads: seen.append(name))
    for backend in ("flash", "sdpa"):
        attention_kernels(_config("expert", attention_backend=backend))
    assert seen == ["flash", "range attention", "cudnn", "flash"]


def test_fp32_stays_in_fp32(gpu):
    gpu(HOPPER, *TRANSFORMER_ENGINE)
    chosen = attention_kernels(_config(bf16=False))
    assert chosen.fixed == tuple(OTHERS)
    assert chosen.no_varlen == chosen.no_ranges == "fp32"
    assert not uses_transformer_engine(_config(bf16=False))
    assert attention_kernels(_config(bf16=False, fp16=True)).no_varlen is None


def test_transformer_engine_is_used_where_it_is(gpu):
    gpu(HOPPER, *TRANSFORMER_ENGINE)
    assert uses_transformer_engine(_config())
    assert not uses_transformer_engine(_config(transformer_impl="local"))
    assert not uses_transformer_engine(_config(zero_stage=3))  # partitioned weights keep the tried linears
    assert uses_transformer_engine(_config(zero_stage=3, transformer_impl="transformer_engine"))
    gpu(HOPPER)
    assert not uses_transformer_engine(_config())


@pytest.mark.parametrize(
    ("function", "choice", "message"),
    [
        (
            attention_kernels,
            {"attention_backend": "flash"},
            r"=flash, but Tesla V100 has none for 4 heads of width 8 in torch.bfloat16: use auto or sdpa",
        ),
        (attention_kernels, {"attention_backend": "cudnn"}, r"attention-backend=cudnn, but Tesla V100 has none"),
        (
            uses_transformer_engine,
            {"transformer_impl": "transformer_engine"},
            r"transformer-impl=transformer_engine, but Transformer Engine cannot be imported.*: use auto or local",
        ),
    ],
)
def test_what_is_forced_and_missing_is_refused(gpu, function, choice, message):
    gpu(VOLTA, takes=())
    with pytest.raises(ValueError, match=message) as refused:
        function(_config(**choice))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "choice",
    [{"attention_backend": "flash"}, {"attention_backend": "cudnn"}, {"transformer_impl": "transformer_engine"}],
)
def test_the_model_refuses_on_a_machine_without_cuda(process_group, choice):
    with pytest.raises(ValueError, match="but this machine has no CUDA: use auto or"):
        build_model(_config(**choice))


def test_the_layer_gets_the_kernels(gpu):
    gpu(HOPPER)
    core = layer_spec.layer_spec(_config()).submodules.self_attention.submodules.core_attention
    assert core.module is AttentionByShape
    assert core.params["kernels"] == attention_kernels(_config())


def test_transformer_engine_takes_the_slots_of_linears_and_norms(monkeypatch):
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.extensions import transformer_engine_spec_provider as provider

    class Column:
        """Transformer Engine is not installed, and Megatron-core's stand-in is no class to derive from."""

    class Row:
        """Likewise."""

    monkeypatch.setattr(provider, "TEColumnParallelLinear", Column)
    monkeypatch.setattr(provider, "TERowParallelLinear", Row)
    monkeypatch.setattr(layer_spec, "uses_transformer_engine", lambda config: True)
    parts = layer_spec.layer_spec(_config()).submodules
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    assert parts.input_layernorm is parts.pre_mlp_layernorm is te.TENorm
    assert all(issubclass(linear, Column) for linear in (attention.linear_qkv, mlp.linear_fc1))
    assert all(issubclass(linear, Row) for linear in (attention.linear_proj, mlp.linear_fc2))
