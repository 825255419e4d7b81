"""tools/flops.py: its output and its refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"
SPEC = importlib.util.spec_from_file_location("flops_tool", ROOT / "tools" / "flops.py")
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)


@pytest.fixture
def flops(monkeypatch, capsys):
    """Run the tool: exit status, standard output and error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flops.py", *map(str, arguments)])
        return TOOL.main(), *capsys.readouterr()

    return run


def test_published_iterations(flops):
    status, out, err = flops("--budget", "16.5e18")
    assert status == 0, err
    rows = {line.split()[0]: line.split()[-2:] for line in out.splitlines()[1:]}
    assert rows == {
        "vanilla": ["9438", "9438"],
        "recursive_nr4": ["8883", "8883"],
        "mor_expert_nr2": ["12619", "12619"],
        "mor_expert_nr3": ["14160", "14161"],
        "mor_expert_nr4": ["14216", "14216"],
        "mor_expert_nr3_kv_sharing": ["14672", "14672"],
    }


def test_one_model_beside_the_unrolled_one(flops):
    files = (CONFIGS / "mor_expert_nr3.yaml", CONFIGS / "360m.yaml")
    status, out, err = flops(
        "--config", *files, "--recompute-granularity", "full", "--budget", "16.5e18", "--fractions", 1, 0.5, 0
    )
    assert status == 0, err
    assert "routing expert_choice, tokens at each recursion 1 0.5 0, sequences of 2048" in out
    rows = {line[:46].strip(): line[46:].split() for line in out.splitlines()[3:]}
    assert rows["unique parameters"][:2] == ["165,177,600", "361,821,120"]
    assert rows["iterations for 1.65e+19 of the paper's FLOPs"][:2] == ["14,160", "9,438"]
    assert rows["bytes of keys and values a token, 16 bits"] == ["21,760", "40,960", "0.531"]
    model, hardware = (
        [float(word.replace(",", "")) for word in rows[f"training, {kind}"]]
        for kind in ("model FLOPs a token (MFU)", "hardware FLOPs a token (HFU)")
    )
    assert all(1.2 < h / m < 4 / 3 for h, m in zip(hardware[:2], model[:2], strict=True)), "the layers, not the head"


def test_a_teacher_is_counted_in_training(flops, tmp_path):
    llama = {
        "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
        "num_key_value_heads": 5, "num_hidden_layers": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama))
    config = ("--config", CONFIGS / "vanilla.yaml", CONFIGS / "360m.yaml")
    forward, alone, taught = (
        float(next(line for line in out.splitlines() if name in line)[46:].split()[0].replace(",", ""))
        for name, (_, out, _) in (
            ("executed: forward", flops(*config)),
            ("(MFU)", flops(*config)),
            ("(MFU)", flops(*config, "--distill-from", tmp_path)),
        )
    )
    assert taught - alone == forward == alone / 3, "the model itself"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --config names no file"),
        (("--budget", "0"), "error: budget=0.0 must be above 0"),
        (("--budget", "1e18", "--num-layers", "4"), "error: --config names no file"),
        (("--config", "missing.yaml"), "error: config=missing.yaml cannot be read"),
        (("--config", CONFIGS / "tiny.yaml"), "error: vocab-size is not set"),
        (("--config", CONFIGS / "360m.yaml", "--fractions", "1", "0.5"), "must be as many as num-recursions=1"),
    ],
)
def test_one_line_of_what_is_wrong(flops, arguments, message):
    status, _, err = flops(*arguments)
    assert status == 2
    (line,) = err.splitlines()
    assert message in line
