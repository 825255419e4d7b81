"""What a run starts from: which checkpoint, how much of it, and what has changed since. It includes the tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from small_runs import flip_last_bit, read_metrics, read_state, small_config

from mor_megatron.checkpointing.convert import convert
from mor_megatron.checkpointing.inspection import verify
from mor_megatron.checkpointing.manifest import MANIFEST, self_checksum
from mor_megatron.config.schema import Config
from mor_megatron.data.indexed import merge
from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.data.tokenizers import build_tokenizer
from mor_megatron.huggingface.export import read_run_config
from mor_megatron.huggingface.tokenizer import SentencePiece
from mor_megatron.inference.loading import load_model
from mor_megatron.pretraining.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("process_group")


@dataclass(frozen=True)
class Trained:
    """Two iterations, saved after each."""

    save: Path
    corpus: str
    tokenizer: str

    def config(self, **changes) -> Config:
        settings = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": self.tokenizer, "vocab_size": None}
        settings |= {"train_iters": 2, "eval_iters": 0, "save_interval": 1, "lr_warmup_iters": 0}
        return small_config(self.corpus, **settings | changes)


@pytest.fixture(scope="module")
def trained(process_group, tmp_path_factory) -> Trained:
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text.txt").write_text("\n\n".join(list(topics.values())[:20]))
    tokenizer = train_tokenizer([str(directory / "text.txt")], 400, "bpe", str(directory / "tok"))
    built = build_tokenizer("SentencePieceTokenizer", tokenizer)
    options = {"append_eod": True, "paragraphs": True, "progress": False}
    report = preprocess([str(directory / "text.txt")], str(directory / "corpus"), built, **options)
    run = Trained(directory / "save", report.prefixes[0], tokenizer)
    pretrain(run.config(save=str(run.save)))
    return run


def test_a_resume_says_what_changed_and_nothing_else(trained: Trained, tmp_path: Path, capsys) -> None:
    moved = str(shutil.copy(trained.tokenizer, tmp_path / "moved.model"))
    changes = {"lr": 1e-3, "seed": 7, "seq_length": 16, "split": "9,1,0", "tokenizer_model": moved}
    changes |= {"log_interval": 1, "save": str(tmp_path / "new"), "save_interval": 5, "num_workers": 0}
    pretrain(trained.config(load=str(trained.save), **changes))
    out = capsys.readouterr().out
    told = out[out.index("resuming from") :].splitlines()
    assert told[1:6] == [
        "  split was 80,20,0, is now 9,1,0",
        "  seq-length was 24, is now 16",
        f"  tokenizer-model was {trained.tokenizer}, is now {moved}",
        "  lr was 0.01, is now 0.001",
        "  seed was 1234, is now 7",
    ]
    assert not any(line.startswith("  ") for line in told[6:])
    assert "already at 2 of 2 iterations: nothing to do" in told
    assert not list((tmp_path / "new").glob("iter_*"))


def test_a_corpus_that_was_written_again_is_told(trained: Trained, tmp_path: Path, capsys) -> None:
    corpus, save = str(tmp_path / "corpus"), str(tmp_path / "save")
    size = Path(f"{trained.corpus}.bin").stat().st_size
    merge([trained.corpus], corpus)
    pretrain(trained.config(data_path=(corpus,), save=save, train_iters=1))
    merge([trained.corpus, trained.corpus], corpus)
    pretrain(trained.config(data_path=(corpus,), load=save))
    assert f"  size of {corpus}.bin was {size}, is now {2 * size}" in capsys.readouterr().out.splitlines()


def test_another_function_of_the_same_weights(trained: Trained, capsys) -> None:
    """Refused for a run that goes on, allowed and told for one that fine-tunes; the same of the tokenizer."""
    load = {"load": str(trained.save)}
    message = r"rotary-base=500000.0 does not fit .*iter_0000002, written with rotary-base=10000.0"
    with pytest.raises(ValueError, match=message):
        pretrain(trained.config(rotary_base=5e5, **load))
    pretrain(trained.config(rotary_base=5e5, lr=1e-4, finetune=True, train_iters=1, **load))
    out = capsys.readouterr().out
    assert "  rotary-base was 10000.0, is now 500000.0" in out
    assert "lr was" not in out, "a new run"


def test_another_tokenizer_of_equal_size(trained: Trained, tmp_path: Path, capsys) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(Path(trained.tokenizer).read_bytes())
    model.pieces[-1].piece = "ungeheuer"
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    other = {"load": str(trained.save), "tokenizer_model": str(tmp_path / "other.model")}
    with pytest.raises(ValueError, match=r"corpus_text_document was made with another tokenizer, .*tok.model, than"):
        pretrain(trained.config(**other))
    for suffix in (".bin", ".idx"):  # a corpus that says nothing
        shutil.copy(trained.corpus + suffix, tmp_path / f"corpus{suffix}")
    other["data_path"] = (str(tmp_path / "corpus"),)
    message = (
        r"tokenizer's vocabulary=\w+ does not fit .*iter_0000002, written with tokenizer's vocabulary=\w+: use its "
        r"tokenizer \(.*iter_0000002/tokenizer/tok.model\)"
    )
    with pytest.raises(ValueError, match=message):
        pretrain(trained.config(**other))
    pretrain(trained.config(finetune=True, train_iters=1, **other))
    assert "  tokenizer's vocabulary was " in capsys.readouterr().out


def test_the_tokenizer_is_in_the_checkpoint(trained: Trained, tmp_path: Path, monkeypatch) -> None:
    """Moved to another place, where its tokenizer is not, it is all that is needed."""
    text = "The standard library\tof Python."
    ids = build_tokenizer("SentencePieceTokenizer", trained.tokenizer).tokenize(text)
    shutil.copytree(trained.save, tmp_path / "moved")
    monkeypatch.setattr(Path, "exists", lambda path, real=Path.exists: real(path) and str(path) != trained.tokenizer)
    monkeypatch.chdir(tmp_path)
    _, tokenizer = load_model("moved")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert isinstance(tokenizer, SentencePiece)  # it is not converted
    whole = convert("moved/iter_0000002", "whole")
    assert read_run_config(whole)[0].data.tokenizer_model == "whole/tokenizer/tok.model"
    assert list(verify(whole)) == []
    flip_last_bit(tmp_path / "moved" / "iter_0000002" / "tokenizer" / "tok.model")
    (problem,) = verify("moved/iter_0000002")
    assert "tokenizer/tok.model does not have the content" in problem


def test_a_checkpoint_from_before_loads(trained: Trained, tmp_path: Path, capsys) -> None:
    """Without tokenizer, with fewer settings."""
    old = tmp_path / "iter_0000002"
    shutil.copytree(trained.save / old.name, old)
    shutil.rmtree(old / "tokenizer")
    content = json.loads((old / MANIFEST).read_text())
    del content["checksum"], content["tokenizer"], content["model"]["rotary-base"]
    content["files"] = {name: file for name, file in content["files"].items() if not name.startswith("tokenizer/")}
    (old / MANIFEST).write_text(json.dumps({**content, "checksum": self_checksum(content)}))
    pretrain(trained.config(load=str(tmp_path), train_iters=3))
    assert f"resuming from {old}" in capsys.readouterr().out


def test_parts_of_a_checkpoint(trained: Trained, tmp_path: Path, capsys) -> None:
    """Optimizer and random state left out, from an iteration that is not the newest."""
    steps = {}
    for name, change in {"all": {}, "parts": {"no_load_optim": True, "no_load_rng": True}}.items():
        fresh = torch.Generator().manual_seed(7).get_state()
        settings = {"load": str(trained.save), "ckpt_step": 1, "save": str(tmp_path / name), "seed": 7}
        pretrain(trained.config(**settings, **change))
        assert f"resuming from {trained.save}/iter_0000001" in capsys.readouterr().out
        assert [line["iteration"] for line in read_metrics(tmp_path / name)] == [2]
        steps[name] = read_state(tmp_path / name, 2)["step embedding.word_embeddings.weight"].item()
        assert torch.equal(torch.get_rng_state(), fresh) == (name == "parts")
    assert steps == {"all": 2, "parts": 1}
    pretrain(trained.config(load=str(trained.save), optimizer="sgd", no_load_optim=True, train_iters=3))
    with pytest.raises(ValueError, match=r"ckpt-step=7 is not in .*, which has iter_0000002 iter_0000001: name one"):
        pretrain(trained.config(load=str(trained.save), ckpt_step=7))


@pytest.mark.parametrize("name", ["finetune", "load_strict", "exit_on_missing_checkpoint"])
def test_a_missing_checkpoint(trained: Trained, tmp_path: Path, name: str) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(ValueError, match=f"load=.*typo has no checkpoint, and {flag} needs one: .*leave out --{flag}"):
        pretrain(trained.config(load=str(tmp_path / "typo"), **{name: True}))


def test_a_strict_run_starts_in_its_own_empty_directory(trained: Trained, tmp_path: Path, capsys) -> None:
    own = str(tmp_path / "own")
    pretrain(trained.config(load=own, save=own, load_strict=True, train_iters=1))
    assert f"no checkpoint in {own}: starting from scratch" in capsys.readouterr().out


def test_a_fine_tuning_run_that_is_requeued_goes_on(trained: Trained, tmp_path: Path, capsys) -> None:
    own = str(tmp_path)
    command = {"load": own, "save": own, "branch_from": str(trained.save), "finetune": True}
    pretrain(trained.config(train_iters=1, **command))
    assert "fine-tuning from the weights of" in capsys.readouterr().out
    pretrain(trained.config(train_iters=3, **command))
    assert f"resuming from {own}/iter_0000001" in capsys.readouterr().out
    assert [line["iteration"] for line in read_metrics(own)] == [1, 2, 3]
