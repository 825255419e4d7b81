"""Checkpoints made of exports and of LLaMA models, and what up-training begins with."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pairs import VOCAB, pair, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.config.schema import RecursionConfig
from mor_megatron.config.validate import validate
from mor_megatron.huggingface.export import export, read_checkpoint, to_model
from mor_megatron.huggingface.importing import kind_of, read_export, read_llama, write_checkpoint
from mor_megatron.huggingface.uptraining import source_layers
from mor_megatron.recursion.plan import build_plan

sys.path.append(str(Path(__file__).parents[3] / "tools"))
import import_hf

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize(
    "name", ["vanilla", "expert_aux_router", "expert_mlp_tanh", "token_loss_free", "recursive_sharing"]
)
def test_an_export_comes_back_bit_for_bit(name: str, tmp_path: Path):
    model, _ = pair(name)
    config = validate(model.run_config)
    weights = {
        key: (tensor[:VOCAB] if "word_embeddings" in key else tensor).clone()
        for key, tensor in model.state_dict().items()
        if not key.endswith("_extra_state")
    }
    export(weights, config, VOCAB, None, tmp_path / "export")
    again, settings = read_export(tmp_path / "export")
    write_checkpoint(again, settings, tmp_path / "run")
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.weights.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(checkpoint.weights[key], tensor), key
    assert checkpoint.vocab_size == VOCAB
    assert checkpoint.config.model.num_layers == config.model.num_layers
    ids = random_ids()
    with torch.no_grad():
        expected = pair(name)[1](ids).logits
        assert torch.equal(to_model(checkpoint.weights, checkpoint.config, VOCAB)(ids).logits, expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    """Eight layers, grouped queries, a head of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("llama") / "model"
    model.save_pretrained(path)
    return model, path


def test_llama_becomes_vanilla(llama):
    model, path = llama
    assert kind_of(path) == "llama"
    weights, config, sources = read_llama(path, RecursionConfig(), None, "stepwise", 0)
    assert sources == {layer: (layer,) for layer in range(8)}
    ids = random_ids()
    with torch.no_grad():
        ours, theirs = to_model(weights, config, VOCAB)(ids).logits, model(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


SOURCES = {
    # 14 layers, three passes over four shared layers between two of their own
    ("middle_cycle", "average"): [(0,), (1, 5, 9), (2, 6, 10), (3, 7, 11), (4, 8, 12), (13,)],
    ("middle_cycle", "stepwise"): [(0,), (1,), (5,), (8,), (12,), (13,)],
    ("middle_cycle", "lower"): [(0,), (1,), (2,), (3,), (4,), (13,)],
    ("middle_cycle", "upper"): [(0,), (9,), (10,), (11,), (12,), (13,)],
    ("middle_sequence", "average"): [(0,), (1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12), (13,)],
}


@pytest.mark.parametrize(("strategy", "initialization"), SOURCES)
def test_source_layers(strategy: str, initialization: str):
    plan = build_plan(14, 3, strategy)
    found = source_layers(plan, 14, initialization)
    assert [found[layer] for layer in range(6)] == SOURCES[strategy, initialization]


def test_source_layers_drawn_at_random():
    plan = build_plan(14, 3, "middle_cycle")
    one, same, other = (source_layers(plan, 14, "random", seed) for seed in (1, 1, 2))
    assert one == same != other
    inner = [one[layer][0] for layer in range(1, 5)]
    assert inner == sorted(set(inner))
    assert all(1 <= layer <= 12 for layer in inner)


def test_depth_is_shrunk_as_the_authors_do():
    """360M with four recursions: 30 of 32 layers are kept, 8 and 23 dropped (average shows all that are kept)."""
    found = source_layers(build_plan(30, 4, "middle_cycle"), 32, "average")
    used = sorted(layer for sources in found.values() for layer in sources)
    assert sorted(set(range(32)) - set(used)) == [8, 23]


def test_average_is_the_mean_of_the_layers(llama):
    model, path = llama
    weights, config, _ = read_llama(path, RecursionConfig(num_recursions=3), None, "average", 0)
    down = [layer.mlp.down_proj.weight for layer in model.model.layers]
    torch.testing.assert_close(weights["layers.1.mlp.linear_fc2.weight"], (down[1] + down[3] + down[5]).detach() / 3)
    assert torch.equal(weights["layers.3.mlp.linear_fc2.weight"], down[7])
    assert to_model(weights, config, VOCAB)(random_ids()).logits.isfinite().all()


def test_command_line(llama, tmp_path: Path, monkeypatch, capsys):
    _, path = llama

    def call(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["import_hf.py", "--model", str(path), *map(str, words)])
        return import_hf.main()

    assert call("--output", tmp_path / "run", "--num-recursions", 2, "--initialization", "upper") == 0
    assert "layer 1: layer 4" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "run").config.recursion.num_recursions == 2
    assert call("--output", tmp_path / "run") == 2
    assert "is not empty" in capsys.readouterr().err
    assert call("--output", tmp_path / "new", "--initialization", "upper") == 2
    assert "--num-recursions above 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"attention_bias": True}, "attention_bias=True"), ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type")],
)
def test_what_our_layers_cannot_do_is_refused(llama, tmp_path: Path, change: dict, message: str):
    shutil.copytree(llama[1], tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        read_llama(tmp_path / "model", RecursionConfig(), None, "stepwise", 0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_told(llama, tmp_path: Path, name: str):
    shutil.copytree(llama[1], tmp_path / "model")
    file = tmp_path / "model" / name
    if name == "config.json":
        settings = json.loads(file.read_text())
        del settings["rms_norm_eps"]
        file.write_text(json.dumps(settings))
    else:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{name}.*(rms_norm_eps|cannot be read)"):
        read_llama(tmp_path / "model", RecursionConfig(), None, "stepwise", 0)
