"""Dense models that become relaxed recursive ones: adapters by singular values, norms as they were."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from pairs import VOCAB, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.config.schema import RecursionConfig
from mor_megatron.huggingface.export import read_checkpoint, to_model
from mor_megatron.huggingface.importing import Start, read_llama
from mor_megatron.huggingface.low_rank import table, truncated

sys.path.append(str(Path(__file__).parents[3] / "tools"))
import export_hf
import import_hf

pytestmark = pytest.mark.usefixtures("process_group")

SHAPES = {
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
}
FULL = 32
"""No matrix of these models has a higher rank."""


@cache
def dense(shape: str) -> LlamaForCausalLM:
    """Eight layers whose norms differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
        **SHAPES[shape],
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """By shape: where the model is."""
    paths = {}

    def get(shape: str) -> Path:
        if shape not in paths:
            paths[shape] = tmp_path_factory.mktemp(shape)
            dense(shape).save_pretrained(paths[shape])
        return paths[shape]

    return get


def start(path: Path, initialization: str = "average", **changes) -> Start:
    settings = {"num_recursions": 3, "relaxation": "lora", "lora_rank": FULL, "recursion_norms": True}
    return read_llama(path, RecursionConfig(**settings | changes), None, initialization, 0)


def logits(begun: Start) -> torch.Tensor:
    with torch.no_grad():
        return to_model(begun.weights, begun.config)(random_ids()).logits


def expected(shape: str) -> torch.Tensor:
    with torch.no_grad():
        return dense(shape)(random_ids()).logits


@pytest.mark.parametrize(
    ("shape", "initialization", "changes"),
    [
        ("llama", "average", {}),
        ("gqa", "stepwise", {"lora_alpha": 8.0}),
        ("untied", "average", {"lora_rank": FULL + 5}),
        ("gqa", "average", {"sharing_strategy": "middle_sequence", "recursion_embedding": False}),
        ("untied", "lower", {"lora_recursions": "all_but_first", "recursion_embedding": True}),
    ],
    ids=str,
)
def test_at_full_rank_it_is_the_dense_model(directory, shape: str, initialization: str, changes: dict):
    begun = start(directory(shape), initialization, **changes)
    torch.testing.assert_close(logits(begun), expected(shape), atol=1e-4, rtol=0)
    assert all(residual.share == pytest.approx(1.0, abs=1e-5) for residual in begun.residuals)
    assert begun.weights.keys() >= {"layers.1.mlp.linear_fc2.adapters.down_a", "layers.2.pre_mlp_layernorm.weight"}


def test_the_error_falls_with_the_rank(directory):
    path, dense_logits = directory("gqa"), expected("gqa")
    begun = [start(path, lora_rank=rank) for rank in (1, 2, 4, 8, 16, FULL)]
    kept = [sum(residual.kept for residual in one.residuals) for one in begun]
    assert kept == sorted(kept)
    errors = [(logits(one) - dense_logits).square().mean().item() for one in begun]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


def test_no_other_factors_of_the_rank_are_closer():
    torch.manual_seed(1)
    matrix = torch.randn(12, 20)
    a, b = truncated(matrix, 3)
    left = torch.linalg.svdvals(matrix)[3:]
    assert torch.dist(b.t() @ a, matrix).item() == pytest.approx(left.norm().item(), rel=1e-5)  # Eckart and Young
    torch.testing.assert_close(a @ a.t(), torch.eye(3), atol=1e-5, rtol=0)


def test_adapters_that_begin_with_nothing(directory):
    """Those of `zero`, and of a recursion whose source is the shared weight; both can learn."""
    path = directory("gqa")
    unrelaxed = start(path, "lower", relaxation="none", recursion_norms=False)
    settings = RecursionConfig(num_recursions=3, relaxation="lora", lora_rank=4)
    begun = read_llama(path, settings, None, "lower", 0, adapters="zero")
    torch.testing.assert_close(logits(begun), logits(unrelaxed), atol=1e-6, rtol=0)
    assert {residual.kept for residual in begun.residuals} == {0.0}
    lower = read_llama(path, settings, None, "lower", 0).weights
    a, b = (lower[f"layers.1.mlp.linear_fc2.adapters.down_{x}"] for x in "ab")
    assert not b[0].any()
    assert b[1].any()
    assert (a.square().sum(2) > 0).all()


def test_the_table_has_what_is_kept_by_layer_and_recursion(directory):
    begun = start(directory("gqa"), "lower", lora_targets="mlp", lora_rank=4)
    head, columns, *lines, last = table(begun.residuals).splitlines()
    assert head.startswith("energy of (source - shared weight)")
    assert columns.split() == ["layer", "0", "1", "2", "all"]
    rows = [[float(cell) for cell in line.split()] for line in lines]
    assert [row[0] for row in rows] == [1, 2]
    assert all(row[1] == 1.0 and 0.05 < row[2] < 0.9 for row in rows), "attention is left as it is"
    for physical, *_, share in rows:
        own = [residual for residual in begun.residuals if residual.use.physical == physical]
        assert share == pytest.approx(sum(r.kept for r in own) / sum(r.energy for r in own), abs=1e-3)
    assert last.startswith("all layers: 0.")


def test_command_line(directory, tmp_path: Path, monkeypatch, capsys, modules_of_exports):
    """Imported, exported as it is and as a Llama, and imported again."""
    run, model, again = (tmp_path / name for name in ("run", "model", "again"))

    def call(module, words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", *words.split()])
        return module.main()

    words = f"--model {directory('gqa')} --num-recursions 3 --relaxation lora --lora-rank 4 --initialization average"
    assert call(import_hf, f"{words} --recursion-norms --output {run}") == 0
    assert "\nall layers: 0." in capsys.readouterr().out
    weights, begun = read_checkpoint(run).weights, start(directory("gqa"), lora_rank=4)
    assert weights.keys() == begun.weights.keys()
    assert all(torch.equal(tensor, begun.weights[name]) for name, tensor in weights.items())
    assert call(export_hf, f"--load {run} --output {model} --verify") == 0
    card = (model / "README.md").read_text()
    assert "| recursions differ by | adapters of rank 4 on all linear maps, norm weights: " in card
    assert f"{sum(tensor.numel() for tensor in weights.values()):,} stored" in card
    assert call(export_hf, f"--load {run} --output {tmp_path / 'llama'} --as llama --verify") == 0
    assert capsys.readouterr().out.count("the same most likely token at 100.00 %") == 2
    assert call(import_hf, f"--model {model} --output {again}") == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_checkpoint(again).weights.items())
    assert call(import_hf, f"{words} --num-recursions 1 --output {tmp_path / 'none'}") == 2
    assert "--num-recursions above 1" in capsys.readouterr().err
    assert call(import_hf, f"{words} --relaxation none --adapters zero --output {tmp_path / 'none'}") == 2
    assert "--adapters needs --relaxation lora" in capsys.readouterr().err
