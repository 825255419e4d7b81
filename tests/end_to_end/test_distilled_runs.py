"""Whole runs that learn from a teacher: reports, resumption, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import assert_same_checkpoint, read_metrics, save_teacher, save_tokenizer, small_config

from mor_megatron.config.schema import DataConfig
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.planning.accounting import executed_flops_per_token
from mor_megatron.pretraining.pretrain import pretrain

PLAIN = {"train_iters": 6, "eval_interval": 6, "seq_length": 16}


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
    settings = teacher_settings(small_config(corpus, **PLAIN, **teacher))
    more = flops_a_token(whole) - flops_a_token(plain)
    assert more == pytest.approx(executed_flops_per_token(replace(settings, data=DataConfig(seq_length=16))))


def flops_a_token(directory: str) -> float:
    """Those that a run's first iteration reports."""
    line = json.loads((Path(directory) / "metrics.jsonl").read_text().splitlines()[0])
    return line["tflops_per_gpu"] * 1e12 / line["tokens_per_second"]


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


def test_a_teacher_whose_window_hides_nothing(process_group, corpus, tmp_path):
    """A Mistral reads longer sequences than its window, and here no sequence is longer."""
    path = tmp_path / "teacher"
    teacher = save_teacher(path, max_position_embeddings=64)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"model_type": "mistral", "sliding_window": 16}))
    pretrain(small_config(corpus, distill_from=teacher, **PLAIN | {"train_iters": 1, "eval_iters": 0}))
    with pytest.raises(ValueError, match=r"sliding_window=16 .*up to seq-length=24, .*--seq-length 16$"):
        pretrain(small_config(corpus, distill_from=teacher, **PLAIN | {"seq_length": 24}))
