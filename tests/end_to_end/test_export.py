"""A run on two tensor-parallel ranks is exported, and the export is used as users would."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import running
from safetensors.torch import load_file
from small_runs import load_tool
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.huggingface import verify
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.export import read_checkpoint
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM

pytestmark = pytest.mark.usefixtures("modules_of_exports")

export_hf, generate, show_routing = (load_tool(name) for name in ("export_hf", "generate", "show_routing"))

SETTINGS = """num-layers: 8
hidden-size: 32
ffn-hidden-size: 48
num-attention-heads: 4
group-query-attention: true
num-query-groups: 2
add-qkv-bias: true
use-rope-scaling: true
rotary-base: 500000
num-recursions: 3
routing: expert_choice
router-aux-loss-coeff: 0.1
tokenizer-type: HuggingFaceTokenizer
seq-length: 24
split: 80,20,0
micro-batch-size: 2
global-batch-size: 4
train-iters: 12
lr: 1e-2
eval-iters: 0
peak-tflops: 1
"""


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Trained with --tensor-model-parallel-size 2; its vocabulary is padded."""
    directory = tmp_path_factory.mktemp("run")
    text = directory / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": topic}) for topic in list(verify.topics.values())[:20]))
    tokenizer = train_tokenizer([str(text)], 300, "hf-bpe", str(directory / "tokenizer"))
    config = directory / "model.yaml"
    config.write_text(SETTINGS + f"tokenizer-model: {tokenizer}\ndata-path: [{corpus}]\nsave: {directory / 'save'}\n")
    flags = ["--config", str(config), "--tensor-model-parallel-size", "2"]
    with running(flags, 2, directory / "logs") as ranks:
        assert ranks.join() == [0, 0], ranks.output(0)
    return directory / "save"


def call(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, words)])
    return export_hf.main()


@pytest.fixture(scope="module")
def export(run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("export") / "model"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "--load", run, "--output", output, "--verify") == 0
    return output


def load(path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)


def test_directory_holds_unique_parameters_and_the_code(export: Path):
    weights = load_file(export / "model.safetensors")
    model = load(export)
    stored = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for t in weights.values()) == stored
    assert weights["model.embed_tokens.weight"].shape[0] == 301  # 300, and padding's; 384 in the run
    assert (export / "model.safetensors").stat().st_size < 4 * stored + 20_000
    names = {path.name for path in export.glob("*.py")}
    assert {"configuration_mor.py", "modeling_mor.py", "attention_mor.py", "cache_mor.py"} <= names
    for path in export.glob("*.py"):
        assert not re.search(r"^\s*(from|import) mor_megatron", path.read_text(), re.MULTILINE)
    assert type(model).__module__.startswith("transformers_modules")
    assert AutoConfig.from_pretrained(export, trust_remote_code=True).num_recursions == 3


def test_card_tells_training_and_comparison(export: Path, run: Path):
    card = (export / "README.md").read_text()
    assert "1,152 tokens in 12 iterations" in card
    assert "the same depth at 100.00 %" in card
    assert str(run) not in card
    assert "parallel" not in card


def test_wrong_weights_get_no_card(run: Path, tmp_path: Path, monkeypatch, capsys):
    """One weight changed between what is exported and what it is compared with."""

    def spoilt(path):
        checkpoint = read_checkpoint(path)
        checkpoint.weights["layers.1.mlp.linear_fc2.weight"][0, 0] += 0.5
        return checkpoint

    honest = verify.training_model
    monkeypatch.setattr("mor_megatron.huggingface.export.read_checkpoint", spoilt)
    monkeypatch.setattr(verify, "training_model", lambda weights, *rest: honest(read_checkpoint(run).weights, *rest))
    assert call(monkeypatch, "--load", run, "--output", tmp_path / "model", "--verify") == 1
    assert "not the model that was trained" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_saved_again_it_is_the_same(export: Path, tmp_path: Path):
    model = load(export)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, again(ids).logits)
    size = (export / "model.safetensors").stat().st_size
    assert abs((tmp_path / "again" / "model.safetensors").stat().st_size - size) < 1000
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_other_ways_to_load_generate(export: Path, options: dict):
    model = load(export, **options)
    assert model.dtype == options.get("dtype", torch.float32)
    tokens = model.generate(
        torch.arange(10)[None].to(model.device), max_new_tokens=6, do_sample=False, min_new_tokens=6
    )
    assert tokens.shape == (1, 16)
    if "device_map" in options:
        plain = load(export).generate(torch.arange(10)[None], max_new_tokens=6, do_sample=False, min_new_tokens=6)
        assert torch.equal(tokens.cpu(), plain)


def test_pipeline_and_tokenizer(export: Path):
    generator = pipeline("text-generation", model=str(export), trust_remote_code=True)
    (out,) = generator("The import statement", max_new_tokens=8, do_sample=False)
    assert out["generated_text"].startswith("The import statement")
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    texts = ["a longer prompt than the", "other"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][:, 0].min() == 0
    model = load(export)
    together = model.generate(**batch, max_new_tokens=5, do_sample=False)
    for text, tokens in zip(texts, together, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens[-5:], alone[0][-5:])


def test_generation_stops_at_a_text(export: Path):
    """For `generate` and for a pipeline: not before the text, and not a token after it."""
    tokenizer, model = AutoTokenizer.from_pretrained(export, trust_remote_code=True), load(export)
    ids = tokenizer("The import statement", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 9.0}  # it has learnt little but spaces
    whole = model.generate(ids, **options)[0, ids.shape[1] :]
    stop = next(word for word in (tokenizer.decode(token).strip() for token in whole[3:-1]) if word.isalpha())
    text, first = tokenizer.decode(whole), 1
    while stop not in tokenizer.decode(whole[:first]):
        first += 1
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)[0, ids.shape[1] :]
    assert torch.equal(stopped, whole[:first])
    assert first < len(whole)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (out,) = generator("The import statement", stop_sequence=stop, return_full_text=False, **options)
    assert out["generated_text"] == tokenizer.decode(stopped) != text


@torch.no_grad()
def test_other_classes_load_an_export(export: Path):
    ids = torch.arange(40).view(2, 20)
    model, backbone = load(export), AutoModel.from_pretrained(export, trust_remote_code=True)
    hidden = backbone(ids).last_hidden_state
    assert type(backbone).__name__ == "MoRModel"
    assert torch.equal(model.lm_head(hidden)[..., :300], model(ids).logits[..., :300])
    classifier = AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True, num_labels=3)
    assert torch.equal(classifier(ids).logits, classifier.score(hidden[:, -1]))


def test_bf16_export_and_refusals(run: Path, tmp_path: Path, monkeypatch, capsys):
    assert call(monkeypatch, "--load", run, "--output", tmp_path / "half", "--dtype", "bf16") == 0
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if "router" not in name} == {torch.bfloat16}
    assert {t.dtype for name, t in stored.items() if "router" in name} == {torch.float32}
    loaded = load(tmp_path / "half")
    assert all(torch.equal(loaded.get_parameter(name), t) for name, t in stored.items() if "router" in name)
    assert call(monkeypatch, "--load", run, "--output", tmp_path / "half") == 2
    assert "exists" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "half")
    assert call(monkeypatch, "--load", tmp_path / "nothing", "--output", tmp_path / "half") == 2
    assert "has no checkpoint" in capsys.readouterr().err
    assert call(monkeypatch, "--load", run, "--output", tmp_path / "half", "--as", "llama") == 2
    assert "routing=expert_choice" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_trainer_lowers_the_loss(export: Path, tmp_path: Path, checkpointing: bool, monkeypatch):
    # The Trainer leaves RANK and WORLD_SIZE behind, and programs that later tests start would look for their launcher.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    model = load(export)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(64, 250, (16,), generator=generator)
    samples = [{"input_ids": (start + torch.arange(24)), "labels": (start + torch.arange(24))} for start in starts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=2e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        gradient_checkpointing=checkpointing, disable_tqdm=True, eval_strategy="steps", eval_steps=10,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, eval_dataset=samples[:3])
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    ids = torch.stack([sample["input_ids"] for sample in samples[:3]])
    with torch.no_grad():
        expected = model.eval()(ids, labels=ids)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    predicted = trainer.predict(samples[:3])
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected.logits)
    assert np.array_equal(predicted.label_ids, ids)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < 0.85 * losses[0]


@pytest.fixture(params=["export", "run"])
def model_path(request) -> Path:
    """The tools take either."""
    return request.getfixturevalue(request.param)


def tool(monkeypatch, module, *words) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    return module.main()


def test_generate_shows_depths(model_path: Path, export: Path, tmp_path: Path, monkeypatch, capsys):
    prompt, options = "The import statement", ("--max-new-tokens", 6, "--device", "cpu")
    page = tmp_path / "depths.html"
    words = ("--model", model_path, "--prompt", prompt, *options, "--show-depth", "--html", page)
    assert tool(monkeypatch, generate, *words) == 0
    printed = capsys.readouterr().out
    text = re.sub(r"\x1b\[\d+m", "", printed.partition("\n")[2]).removesuffix("\n")
    tokenizer, model = AutoTokenizer.from_pretrained(export, trust_remote_code=True), load(export)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(tokens[0])
    depths = model(tokens).depths[0].tolist()
    assert [int(depth) for depth in re.findall(r'title="depth (\d)"', page.read_text())] == depths


def test_prompts_in_batches_and_none_at_all(export: Path, tmp_path: Path, monkeypatch, capsys):
    """Each continuation is that of its prompt alone; without a prompt a document begins, behind the end of another."""
    prompts = ["The import statement", "x", "def f(a, b):\n    return a", ""]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "lines.txt").write_text("\n\n".join(prompts[:2]) + "\n")
    words = ("--model", export, "--max-new-tokens", 5, "--device", "cpu")
    options = ("--batch-size", 2, "--output", tmp_path / "out.jsonl")
    assert tool(monkeypatch, generate, *words, "--input", tmp_path / "prompts.jsonl", *options) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert tool(monkeypatch, generate, *words, "--prompts", tmp_path / "lines.txt") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found[:2]
    tokenizer, model = AutoTokenizer.from_pretrained(export, trust_remote_code=True), load(export)
    for prompt, record in zip(prompts, found, strict=True):
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        new = tokens[0, ids.shape[1] :]
        assert record["prompt"] == prompt
        assert record["continuation"] == tokenizer.decode(new, skip_special_tokens=True)
        depths = model(tokens).depths[0, ids.shape[1] :][: record["tokens"]].float()
        assert record["mean_depth"] == (pytest.approx(depths.mean().item(), abs=1e-3) if len(depths) else None)
        assert record["finished"] == bool(new[-1] == tokenizer.eos_token_id)

    assert tool(monkeypatch, generate, *words) == 0
    begun = model.generate(max_new_tokens=5, do_sample=False)
    assert begun[0, 0] == tokenizer.eos_token_id
    assert capsys.readouterr().out == tokenizer.decode(begun[0]) + "\n"
    (tmp_path / "prompts.jsonl").write_text('{"text": "x"}\n')
    assert tool(monkeypatch, generate, *words, "--prompts", tmp_path / "prompts.jsonl") == 2
    assert "prompts.jsonl:1: no key 'prompt'" in capsys.readouterr().err


def test_static_batches_where_the_engine_does_not_fit(tmp_path: Path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5}
    recursion = {"num_recursions": 3, "routing": "token_choice", "kv_mode": "sharing_update"}
    MoRForCausalLM(MoRConfig(**sizes, **recursion, num_attention_heads=2)).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("1 2 3\n4\n")
    words = ("--model", tmp_path / "model", "--input", tmp_path / "prompts.txt", "--max-new-tokens", 3)
    assert tool(monkeypatch, generate, *words, "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["tokens"] for line in printed.out.splitlines()] == [3, 3]
    assert "static batches: kv_mode=sharing_update" in printed.err


def test_show_routing(model_path: Path, export: Path, tmp_path: Path, monkeypatch, capsys):
    words = ("--model", model_path, "--text", "The cat sat, 42 times.", "--device", "cpu", "--output")
    assert tool(monkeypatch, show_routing, *words, tmp_path / "map.png") == 0
    table = capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(export, trust_remote_code=True)("The cat sat, 42 times.", return_tensors="pt")[
        "input_ids"
    ]
    mean = load(export)(ids).depths.float().mean().item()
    assert re.search(rf"all +{mean:.2f} +{ids.shape[1]}", table)
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert tool(monkeypatch, show_routing, *words, tmp_path / "map.html") == 0
    assert (tmp_path / "map.html").read_text().count("<tr><td><code>") == ids.shape[1]
    assert tool(monkeypatch, show_routing, *words, tmp_path / "map.gif") == 2
    assert ".png or .html" in capsys.readouterr().err


def test_generate_refuses_what_does_nothing(export: Path, monkeypatch, capsys):
    words = ("--model", export, "--prompt", "The", "--top-k", 5)
    assert tool(monkeypatch, generate, *words) == 2
    assert "temperature above 0" in capsys.readouterr().err
