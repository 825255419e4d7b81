"""The first line of a run states what was chosen; a flag that forces something unavailable is refused."""

from __future__ import annotations

import pytest
import torch

from mor_megatron.config.cli import read_config
from mor_megatron.config.validate import validate
from mor_megatron.pretraining.capabilities import capabilities, capability_line

RING = "--num-layers 8 --num-recursions 3 --pipeline-model-parallel-size 2 --vocab-size 64"


def found(flags: str, ranks: int = 1) -> dict[str, str]:
    return capabilities(validate(read_config(flags.split()), ranks))


def test_on_this_machine(process_group):
    line = capability_line(validate(read_config([])))
    assert line.startswith("using device: ")
    assert "\n" not in line
    here = found("")
    if not torch.cuda.is_available():
        assert here["device"] == "cpu"
        assert here["communication"] == "gloo"
        assert here["layers"] == "Megatron-core"
        assert here["attention"] == "PyTorch"
        assert here["gradient reduction"] == "after backward"
    assert "pipeline messages" not in here


def test_follows_the_flags(process_group):
    assert found("")["precision"] == "fp32"
    assert found("--bf16")["precision"] == "bf16"
    assert found("--zero-stage 2 --overlap-grad-reduce on")["gradient reduction"] == "overlapped"
    assert found("--zero-stage 2")["micro-batches driven by"] == "DeepSpeed"
    assert found("--optimizer sgd")["optimizer"] == "SGD"
    assert found("--fused-optimizer off")["optimizer"] == "AdamW"


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (RING, "overlapped"),
        (f"{RING} --overlap-p2p-comm on", "overlapped"),
        (f"{RING} --overlap-p2p-comm off", "waited for"),
        ("--num-layers 8 --pipeline-model-parallel-size 2 --vocab-size 64", "waited for"),  # not a ring
    ],
)
def test_messages_of_a_pipeline(process_group, flags, messages):
    assert found(flags, 2)["pipeline messages"] == messages


def test_bf16_that_the_card_only_emulates_is_refused(process_group, monkeypatch):
    config = validate(read_config(["--bf16"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("mor_megatron.pretraining.capabilities.uses_fused_adam", lambda optimizer: False)
    with pytest.raises(ValueError, match="bf16=True, but Tesla V100 has no bf16: use --fp16"):
        capabilities(config)
