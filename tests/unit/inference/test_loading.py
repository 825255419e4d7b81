"""Models of the wrong kind are refused in one line; precision is lost only in the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pairs import pair
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mor_megatron.huggingface.export import cast
from mor_megatron.inference.loading import encode, load_model

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    pair("token_loss_free")[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def drop_a_weight(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, export / "model.safetensors", {"format": "pt"})


def widen_a_weight(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(99)
    save_file(weights, export / "model.safetensors", {"format": "pt"})


def cut_short(export: Path) -> None:
    content = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(content[: len(content) // 2])


def remove(export: Path) -> None:
    (export / "model.safetensors").unlink()


def make_a_llama(export: Path) -> None:
    (export / "config.json").write_text(json.dumps(LlamaConfig(hidden_size=32).to_dict()))


def empty_config(export: Path) -> None:
    (export / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_weight, "lacks model.layers.1.mlp.up_proj.weight"),
        (widen_a_weight, "norm.weight"),
        (cut_short, "cannot be read"),
        (remove, "cannot be read"),
        (make_a_llama, "is a llama model.*import_hf"),
        (empty_config, "cannot be read"),
    ],
)
def test_what_is_no_export_is_refused(export: Path, spoil, message: str):
    spoil(export)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(export, device="cpu")
    assert "\n" not in str(refusal.value)


def test_the_bias_that_routes_stays_fp32(export: Path):
    """It moves in steps of 0.001, which bf16 does not hold."""
    bias = torch.tensor([0.301, -0.299, 0.0012])
    model = pair("token_loss_free")[1]
    before = model.model.router.balance_bias.clone()
    try:
        model.model.router.balance_bias.copy_(bias)
        model.save_pretrained(export)
        for dtype in ("fp32", "bf16", "fp16"):
            loaded = load_model(export, dtype, "cpu")[0]
            assert torch.equal(loaded.model.router.balance_bias, bias)
            again = cast(load_model(export, device="cpu")[0], loaded.dtype)
            assert torch.equal(again.model.router.balance_bias, bias)
            assert again.lm_head.weight.dtype == loaded.lm_head.weight.dtype == again.dtype
    finally:
        model.model.router.balance_bias.copy_(before)


def test_a_text_longer_than_the_model_draws_no_warning():
    """Texts are cut into sequences, and the server refuses what is too long; transformers warns of indexing errors."""
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=1)
    assert encode("a a a", tokenizer, 1) == [0, 0, 0]
    assert not tokenizer.deprecation_warnings  # where transformers notes that it has warned
