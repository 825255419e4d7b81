"""The choice of optional GPU libraries, by flag, precision and machine. tools/gpu_check.py tests what they compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from models import small_config

from mor_megatron.config.schema import Config
from mor_megatron.model import build_model, layer_spec
from mor_megatron.model.kernels import uses_flash_attention, uses_transformer_engine


def _config(bf16: bool = True, **training) -> Config:
    config = small_config("expert")
    return replace(config, training=replace(config.training, bf16=bf16, **training))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, *modules): a machine with such a card, on which these modules and no others can be imported."""

    def pretend(capability: tuple[int, int], *modules: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100" if capability < (8, 0) else "H100")
        for name in ("flash_attn", "transformer_engine", "transformer_engine.pytorch"):
            # None in sys.modules makes an import fail as if the package were absent.
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if name in modules else None)

    return pretend


BOTH = ("flash_attn", "transformer_engine", "transformer_engine.pytorch")


def test_without_cuda_nothing_is_used():
    assert not uses_flash_attention(_config())
    assert not uses_transformer_engine(_config())


def test_what_is_there_is_used_unless_forbidden(gpu):
    gpu((9, 0), *BOTH)
    assert uses_flash_attention(_config())
    assert uses_transformer_engine(_config())
    assert not uses_flash_attention(_config(attention_backend="sdpa"))
    assert not uses_transformer_engine(_config(transformer_impl="local"))


def test_each_stands_for_itself(gpu):
    gpu((9, 0), "flash_attn")
    assert uses_flash_attention(_config())
    assert not uses_transformer_engine(_config())


def test_fp32_stays_in_fp32(gpu):
    gpu((9, 0), *BOTH)
    assert not uses_flash_attention(_config(bf16=False))
    assert not uses_transformer_engine(_config(bf16=False))
    assert uses_flash_attention(_config(bf16=False, fp16=True))


def test_partitioned_weights_keep_the_tried_linears(gpu):
    gpu((9, 0), *BOTH)
    assert not uses_transformer_engine(_config(zero_stage=3))
    assert uses_transformer_engine(_config(zero_stage=3, transformer_impl="transformer_engine"))


@pytest.mark.parametrize(
    ("capability", "modules", "choice", "message"),
    [
        (
            (7, 0),
            BOTH,
            {"attention_backend": "flash"},
            r"flash, but Tesla V100 is older than Ampere.*: use auto or sdpa",
        ),
        ((9, 0), (), {"attention_backend": "flash"}, r"flash-attn cannot be imported \(.*requirements-gpu\.txt"),
        (
            (9, 0),
            (),
            {"transformer_impl": "transformer_engine"},
            r"transformer-impl=transformer_engine, but Transformer Engine cannot be imported.*: use auto or local",
        ),
    ],
)
def test_what_is_forced_and_missing_is_refused(gpu, capability, modules, choice, message):
    gpu(capability, *modules)
    uses = uses_flash_attention if "attention_backend" in choice else uses_transformer_engine
    with pytest.raises(ValueError, match=message) as refused:
        uses(_config(**choice))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("choice", [{"attention_backend": "flash"}, {"transformer_impl": "transformer_engine"}])
def test_the_model_refuses_on_a_machine_without_cuda(process_group, choice):
    with pytest.raises(ValueError, match="but this machine has no CUDA: use auto or"):
        build_model(_config(**choice))


def test_transformer_engine_takes_the_slots_of_linears_and_norms(monkeypatch):
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.extensions import transformer_engine_spec_provider as provider

    class Column:
        """Transformer Engine is not installed, and Megatron-core's stand-in is no class to derive from."""

    monkeypatch.setattr(provider, "TEColumnParallelLinear", Column)
    monkeypatch.setattr(layer_spec, "uses_transformer_engine", lambda config: True)
    parts = layer_spec.layer_spec(_config()).submodules
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    assert parts.input_layernorm is parts.pre_mlp_layernorm is te.TENorm
    assert mlp.linear_fc1 is Column
    assert issubclass(attention.linear_qkv, Column)
    assert attention.linear_proj is mlp.linear_fc2 is te.TERowParallelLinear
