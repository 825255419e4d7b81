"""A published model, here one with biases, becomes the start of a routed model, which is trained and exported."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import ROOT, VOCABULARY, read_metrics, read_weights, small_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from mor_megatron.data.batch import Batch
from mor_megatron.huggingface.export import read_checkpoint, to_model
from mor_megatron.huggingface.verify import training_model
from mor_megatron.pretraining.pretrain import pretrain
from mor_megatron.recursion.context import RoutingContext

sys.path.append(str(ROOT / "tools"))
import import_hf

RELAXED = {"relaxation": "lora", "lora_rank": 4, "recursion_norms": True, "recursion_embedding": True}


@pytest.mark.parametrize("relaxed", ["never", "at the import", "by the run"])
def test_up_training(corpus: str, tmp_path: Path, relaxed: str, monkeypatch, capsys, process_group):
    published = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(published).save_pretrained(tmp_path / "qwen")
    words = ["--model", tmp_path / "qwen", "--output", tmp_path / "start", "--num-recursions", 3]
    relaxation = {} if relaxed == "never" else dict(RELAXED)
    if relaxed == "by the run":
        del relaxation["recursion_norms"]
    if relaxed == "at the import":
        words += ["--relaxation", "lora", "--lora-rank", "4", "--recursion-norms", "--recursion-embedding"]
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *map(str, words)])
    assert import_hf.main() == 0
    start = read_weights(tmp_path / "start", 0)
    config = small_config(
        corpus, load=str(tmp_path / "start"), finetune=True, save=str(tmp_path / "run"), train_iters=6, eval_iters=0,
        lr_decay_iters=6, lr_wsd_decay_iters=2, log_interval=1, add_qkv_bias=True, norm_epsilon=1e-6, **relaxation,
    )  # fmt: skip
    config = replace(config, optimizer=replace(config.optimizer, lr_warmup_iters=0))
    pretrain(config)
    assert "fine-tuning from the weights of" in capsys.readouterr().out
    losses = [entry["lm_loss"] for entry in read_metrics(tmp_path / "run") if "lm_loss" in entry]
    assert losses[-1] < losses[0]
    end = read_weights(tmp_path / "run", 6)
    assert not any(name.startswith("router.") for name in start)
    assert any(name.startswith("router.") for name in end)
    for name, weight in start.items():
        assert not torch.equal(weight, end[name]), f"{name} was not trained"
    assert any(name.endswith("down_b") and weight.all() for name, weight in end.items()) == bool(relaxation)
    checkpoint = read_checkpoint(tmp_path / "run")
    made = (checkpoint.weights, checkpoint.config)
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        ours = training_model(*made)(Batch(ids), RoutingContext(selection="threshold"))
        torch.testing.assert_close(to_model(*made)(ids).logits, ours, atol=1e-5, rtol=0)
