"""Checkpoints imported from exports and from LLaMA models, and the start of up-training."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import VOCAB, pair, random_ids
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mor_megatron.checkpointing.manifest import read_manifest
from mor_megatron.config.schema import RecursionConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.huggingface.attention_mor import inverse_frequencies
from mor_megatron.huggingface.export import export, read_checkpoint, to_model
from mor_megatron.huggingface.importing import kind_of, read_export, read_llama, write_checkpoint
from mor_megatron.huggingface.uptraining import source_layers
from mor_megatron.huggingface.verify import training_model
from mor_megatron.model.stored_names import stored_name
from mor_megatron.planning.accounting import count_parameters
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.plan import STRATEGIES, build_plan

sys.path.append(str(Path(__file__).parents[3] / "tools"))
import export_hf
import import_hf

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize(
    "name",
    [
        "vanilla",
        "expert_aux_router",
        "expert_mlp_tanh",
        "token_loss_free",
        "recursive_sharing",
        "expert_sharing_update_bias",
        "expert_relaxed",
    ],
)
def test_an_export_comes_back_bit_for_bit(name: str, tmp_path: Path):
    model, _ = pair(name)
    config, state = validate(model.run_config), model.state_dict()
    weights = {
        stored_name(key, state): (tensor[:VOCAB] if "word_embeddings" in key else tensor).clone()
        for key, tensor in state.items()
        if not key.endswith("_extra_state")
    }
    export(weights, config, numbers(), tmp_path / "export")
    assert len({path.stat().st_mode for path in (tmp_path / "export").iterdir()}) == 1  # what the umask leaves
    again, settings = read_export(tmp_path / "export")
    write_checkpoint(again, settings, tmp_path / "run")
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.weights.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(checkpoint.weights[key], tensor), key
    assert checkpoint.config.model.vocab_size == VOCAB
    assert checkpoint.config.model.num_layers == config.model.num_layers
    ids = random_ids()
    with torch.no_grad():
        expected = pair(name)[1](ids).logits
        assert torch.equal(to_model(checkpoint.weights, checkpoint.config)(ids).logits, expected)
        padded = to_model(checkpoint.weights, checkpoint.config, numbers())(ids).logits
    torch.testing.assert_close(padded[..., :VOCAB], expected, atol=1e-6, rtol=0)
    assert torch.equal(padded.softmax(-1)[..., VOCAB:], torch.zeros(*ids.shape, 1))


def numbers() -> PreTrainedTokenizerFast:
    """A tokenizer of the vocabulary, and a padding token behind it."""
    backend = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, "0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="0", bos_token="0", pad_token="<|pad|>")


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
    weights, config, sources, _ = read_llama(path, RecursionConfig(), None, "stepwise", 0)
    assert sources == {layer: (layer,) for layer in range(8)}
    ids = random_ids()
    with torch.no_grad():
        ours, theirs = to_model(weights, config)(ids).logits, model(ids).logits
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


def test_source_layers_with_unequal_ends(monkeypatch):
    shared = [(2 + slot, r) for r in range(2) for slot in range(2)]
    monkeypatch.setitem(STRATEGIES, "late", lambda depth, num_recursions: [(0, None), (1, None), *shared])
    found = source_layers(build_plan(6, 2, "late"), 6, "average")
    assert found == {0: (0,), 1: (1,), 2: (2, 4), 3: (3, 5)}, "every layer is used where it was"


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
    weights, config, *_ = read_llama(path, RecursionConfig(num_recursions=3), None, "average", 0)
    down = [layer.mlp.down_proj.weight for layer in model.model.layers]
    torch.testing.assert_close(weights["layers.1.mlp.linear_fc2.weight"], (down[1] + down[3] + down[5]).detach() / 3)
    assert torch.equal(weights["layers.3.mlp.linear_fc2.weight"], down[7])
    assert to_model(weights, config)(random_ids()).logits.isfinite().all()


def test_command_line(llama, tmp_path: Path, monkeypatch, capsys):
    _, path = llama

    def call(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["import_hf.py", "--model", str(path), *map(str, words)])
        return import_hf.main()

    assert call("--output", tmp_path / "run", "--num-recursions", 2, "--initialization", "upper") == 0
    *sources, missing, last = capsys.readouterr().out.splitlines()
    assert "layer 1: layer 4" in sources
    assert missing.startswith("no tokenizer is imported: ")  # in one line, whatever the library says of it
    assert last.endswith("iter_0000000")
    assert read_checkpoint(tmp_path / "run").config.recursion.num_recursions == 2
    words = ("--load", tmp_path / "run", "--as", "llama", "--depth", 1, "--verify", "--output", tmp_path / "again")
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, words)])
    assert export_hf.main() == 0
    printed = capsys.readouterr().out
    assert "the same most likely token at 100.00 %" in printed
    assert "LlamaForCausalLM of 5 layers" in printed
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert (
        again.config.rope_parameters["rope_theta"]
        == json.loads((tmp_path / "again" / "config.json").read_text())["rope_theta"]
    )
    card = (tmp_path / "again" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "| trained on | nothing since it was imported |" in card
    assert "global batch" not in card
    assert call("--output", tmp_path / "run") == 2
    assert "is not empty" in capsys.readouterr().err
    assert call("--output", tmp_path / "new", "--initialization", "upper") == 2
    assert "--num-recursions above 1" in capsys.readouterr().err


def test_the_tokenizer_comes_along(llama, tmp_path: Path, monkeypatch, modules_of_exports):
    """Into the checkpoint, out of it when the imported directory is gone, and in and out again."""
    given = numbers()
    given.bos_token, given.chat_template = "1", "{% for m in messages %}{{ m.content }} 0 {% endfor %}"
    shutil.copytree(llama[1], tmp_path / "model")
    given.save_pretrained(tmp_path / "model")

    def call(module, *words) -> None:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        assert module.main() == 0

    kept = []
    for source, run, output in (("model", "run", "out"), ("out", "again", "out2")):
        call(import_hf, "--model", tmp_path / source, "--output", tmp_path / run)
        shutil.rmtree(tmp_path / source)
        kept.append(read_manifest(tmp_path / run / "iter_0000000").tokenizer["behaviour"])
        call(export_hf, "--load", tmp_path / run, "--output", tmp_path / output)
        settings = json.loads((tmp_path / output / "tokenizer_config.json").read_text())
        assert not {"is_local", "local_files_only"} & settings.keys()  # how we read it is no part of it
        got = AutoTokenizer.from_pretrained(tmp_path / output, trust_remote_code=True)
        assert got.chat_template == given.chat_template
        assert got.special_tokens_map == given.special_tokens_map
        assert got.convert_tokens_to_ids(["7", "0", "<|pad|>"]) == [7, 0, VOCAB]
    assert kept[0] == kept[1]


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PUBLISHED = {
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"sliding_window": 8, "use_sliding_window": False}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 32}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_families_as_they_are_published(kind: str, tmp_path: Path):
    """In shards beside other files of weights: one function in transformers, our export and the training stack."""
    model_class, config_class, settings = PUBLISHED[kind]
    torch.manual_seed(1)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
        "initializer_range": 0.2,
    }  # fmt: skip
    theirs = model_class(config_class(**shape, **settings)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    save_file({"layers.0.wq": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    if kind == "mistral":
        with pytest.raises(ValueError, match=r"sliding_window=32 .*--max-position-embeddings 32"):
            read_llama(tmp_path, RecursionConfig(), None, "stepwise", 0)
    weights, config, *_ = read_llama(tmp_path, RecursionConfig(), None, "stepwise", 0, max_positions=32)
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(ids).logits
        exported, trained = to_model(weights, config)(ids).logits, training_model(weights, config)
        torch.testing.assert_close(exported, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(trained(Batch(ids), RoutingContext()), expected, atol=1e-5, rtol=0)
    assert count_parameters(config).unique == sum(p.numel() for p in theirs.parameters())
    if kind == "llama3":  # the settings matter at this length
        plain = replace(config, model=replace(config.model, use_rope_scaling=False))
        assert (to_model(weights, plain)(ids).logits - expected).abs().max() > 1e-4
        frequencies = inverse_frequencies(128, 500000.0, 32.0, torch.device("cpu"))  # where all three ranges occur
        wide = LlamaConfig(head_dim=128, rope_parameters=LLAMA3)
        assert torch.equal(frequencies, ROPE_INIT_FUNCTIONS["llama3"](wide, "cpu")[0])

    (shard, *_) = sorted(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, one of 1 missing"):
        read_llama(tmp_path, RecursionConfig(), None, "stepwise", 0, max_positions=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}, "rope_parameters": None}, "low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
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
