"""Offloading, quantization and adapters act on modules: every weight is used through its module."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from models import weights_in_their_modules
from pairs import ALL, pair, random_ids
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM

KINDS = {
    "expert": {
        "routing": "expert_choice",
        "router_type": "mlp",
        "router_objective": "aux_router",
        "kv_mode": "sharing",
    },
    "token": {"routing": "token_choice", "router_balance": "loss_free"},
    "relaxed": {"routing": "expert_choice", "relaxation": "lora", "lora_rank": 4, "recursion_norms": True},
}
CPU = torch.device("cpu")
ROUTER_NAMES = ("inner", "out")


def small(kind: str) -> MoRForCausalLM:
    """Blocks of 64 weights are the smallest that bitsandbytes packs on a CPU."""
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_recursions=3, initializer_range=0.1, router_aux_loss_coef=0.1, **KINDS[kind],
    )  # fmt: skip
    model = MoRForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "router" in name:
            weight.data *= 10.0  # depths that differ, and none at the edge
        if name.endswith("_b"):
            weight.data.normal_(std=0.1)
    return model


@cache
def small_outputs(kind: str):
    with torch.no_grad():
        output = small(kind)(random_ids())
    assert len(output.depths.unique()) > 1
    return output


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory) -> tuple[str, Path]:
    """A kind, and a directory with its model."""
    path = tmp_path_factory.mktemp(request.param)
    small(request.param).save_pretrained(path)
    return request.param, path


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ALL)
def test_every_weight_is_used_through_its_module(name: str):
    model, ids = pair(name)[1], random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        with weights_in_their_modules(model):
            assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_offloaded_weights_give_the_same_bits(stored, tmp_path: Path):
    kind, path = stored
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    device_map |= {"model.layers": "disk", "model.router": "disk"}
    ids, expected = random_ids(), small_outputs(kind).logits
    rounding = 1e-5 if kind == "relaxed" else 0.0  # a recursion's part of a tensor may lie at any address
    for model in (
        cpu_offload(small(kind), CPU, offload_buffers=True),
        disk_offload(small(kind), str(tmp_path / "all"), CPU, offload_buffers=True),
        MoRForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=str(tmp_path / "some")).eval(),
    ):
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected, atol=rounding, rtol=0)


QUANTISED = {
    "8 bits": ({"load_in_8bit": True}, 0.1),
    "4 bits": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.5),
    "4 bits, routers not excepted by name": ({"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}, 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_models_route_in_fp32(stored, name: str):
    kind, path = stored
    settings, tolerance = QUANTISED[name]
    model = MoRForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(**settings)).eval()
    check_quantised(model, kind, tolerance, "bitsandbytes")
    assert model.generate(random_ids()[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (3, 7)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_quantisation_leaves_routers_alone(kind: str):
    model = torch.ao.quantization.quantize_dynamic(small(kind), dtype=torch.qint8)
    check_quantised(model, kind, 0.5, "torch.ao")


def check_quantised(model: MoRForCausalLM, kind: str, tolerance: float, library: str) -> None:
    replaced = {name.split(".")[-1] for name, m in model.named_modules() if type(m).__module__.startswith(library)}
    assert {"q_proj", "down_proj"} <= replaced
    assert not replaced.intersection(ROUTER_NAMES)
    for name, weight in small(kind).named_parameters():
        if "router" in name:
            torch.testing.assert_close(model.get_parameter(name), weight, atol=0, rtol=0)  # of the same type, too
    output, expected = model(random_ids()), small_outputs(kind)
    assert (output.logits.float() - expected.logits).abs().mean() < tolerance * expected.logits.std()
    assert (output.depths == expected.depths).float().mean() > 0.75  # of inputs that have changed


@pytest.mark.parametrize("targets", ["all-linear", ["out"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_merge_and_reload(kind: str, targets, tmp_path: Path):
    ids = random_ids()
    model = get_peft_model(small(kind), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".out.lora_A" in name for name in weights)
    optimizer = torch.optim.SGD(weights.values(), lr=0.5)
    for step in range(2):  # the first leaves A alone: B begins at 0
        model(input_ids=ids, labels=ids).loss.backward()
        assert [name for name, w in weights.items() if w.grad is None or (step and not w.grad.any())] == []
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model.eval()(ids).logits
        assert (trained - small_outputs(kind).logits).abs().max() > 1e-3
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(small(kind), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(ids).logits, trained, atol=1e-5, rtol=0)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = MoRForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, trained, atol=1e-5, rtol=0)
