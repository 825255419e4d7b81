"""Whole runs that learn from a teacher: reports, resumption, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from small_runs import VOCABULARY, assert_same_checkpoint, read_metrics, small_config
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.pretraining.pretrain import pretrain

PLAIN = {"train_iters": 6, "eval_interval": 6, "seq_length": 16}


def save_teacher(path: Path, **changes) -> str:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape | changes)).save_pretrained(path)
    return str(path)


def save_tokenizer(path: Path, words: str) -> str:
    """A tokenizer of words: those given, in their order, and as many others as fill the vocabulary."""
    words = ["<unk>", "</s>", *words.split()]
    words += [f"word{number}" for number in range(VOCABULARY - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    return str(path)


def test_a_distilled_run_resumes(process_group, corpus, tmp_path, capsys):
    teacher = {"distill_from": save_teacher(tmp_path / "teacher"), "distill_weight": 0.9, "distill_temperature": 2.0}
    whole, parts, plain = (str(tmp_path / name) for name in ("whole", "parts", "plain"))
    pretrain(small_config(corpus, save=whole, **PLAIN, **teacher))
    pretrain(small_config(corpus, save=parts, load=parts, **PLAIN | {"train_iters": 3}, **teacher))
    pretrain(small_config(corpus, save=parts, load=parts, **PLAIN, **teacher))
    assert "distillation kl: " in capsys.readouterr().out
    found = [line for line in read_metrics(whole) if "lm_loss" in line]
    assert [line for line in read_metrics(parts) if "lm_loss" in line] == found
    assert_same_checkpoint(whole, parts, 6)
    assert found[-1]["distillation_kl"] < found[0]["distillation_kl"]

    pretrain(small_config(corpus, save=plain, load=whole, **PLAIN | {"train_iters": 7}))
    assert f"distill-from was {teacher['distill_from']}, is now None" in capsys.readouterr().out
    (last,) = (line for line in read_metrics(plain) if "lm_loss" in line)
    assert "distillation_kl" not in last


def test_teachers_that_are_refused(process_group, corpus, tmp_path):
    words = "the of and to a in that is was for"
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": save_tokenizer(tmp_path / "own", words)}
    teacher = save_teacher(tmp_path / "teacher")
    pretrain(small_config(corpus, distill_from=teacher, **PLAIN | {"train_iters": 1, "eval_iters": 0}, **own))
    save_tokenizer(Path(teacher), " ".join(reversed(words.split())))
    refusals = [
        (
            {"distill_from": save_teacher(tmp_path / "small", vocab_size=60)},
            "its vocabulary has 60 entries, and vocab-",
        ),
        ({"distill_from": teacher, "seq_length": 24}, "it reads up to 16 tokens, and seq-length=24: use a shorter"),
        ({"distill_from": teacher, **own}, "its tokenizer gives text other ids than .*own: use a teacher of the same"),
        ({"distill_from": str(tmp_path / "none")}, "none/config.json cannot be read"),
    ]
    for changes, message in refusals:
        with pytest.raises(ValueError, match=f"^distill-from=.* cannot teach this run: .*{message}"):
            pretrain(small_config(corpus, **PLAIN | changes))
