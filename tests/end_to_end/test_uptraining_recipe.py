"""The steps of examples/uptraining, with the flags that its script gives, on a small dense model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, assert_same_checkpoint, load_tool, read_metrics, save_teacher, save_tokenizer

from mor_megatron.config.cli import read_config
from mor_megatron.config.validate import validate
from mor_megatron.pretraining.pretrain import pretrain

SMALL = "--seq-length 16 --micro-batch-size 4 --global-batch-size 8 --eval-iters 0 --lr-warmup-iters 0 --peak-tflops 1"


def words_of(step: str, dense: str, directory: Path, *flags: str) -> list[str]:
    """The arguments that the script would give to a program, after its name."""
    command = ["examples/uptraining/uptrain.sh", step, dense, directory, *flags]
    environment = os.environ | {"LAUNCH": "printf %s\\n pretrain_mor.py", "PYTHON": "echo"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return printed.split()[1:]


def test_dense_to_recursive_to_routed(process_group, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    dense = save_teacher(tmp_path / "dense", num_hidden_layers=8)
    save_tokenizer(Path(dense), "the of and")
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *words_of("start", dense, tmp_path, "--lora-rank", "4")])
    assert load_tool("import_hf").main() == 0

    def run(step: str, directory: Path, *more: str) -> bool:
        words = [*SMALL.split(), "--train-iters", "4", *more]
        return pretrain(read_config(words_of(step, dense, directory, "--data-path", corpus, *words)))

    def run_whole_and_in_parts(step: str, *more: str) -> list[dict]:
        assert run(step, whole, *more)
        assert not run(step, parts, *more, "--exit-interval", "2")
        assert run(step, parts, *more)
        assert_same_checkpoint(whole / step, parts / step, 4)
        metrics = read_metrics(whole / step)
        assert read_metrics(parts / step) == metrics
        assert [line["learning_rate"] for line in metrics] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        return metrics

    whole, parts = tmp_path, tmp_path / "parts"
    parts.mkdir()
    (parts / "start").symlink_to(whole / "start")
    assert all("distillation_kl" in line for line in run_whole_and_in_parts("recursive"))
    kept = [line["tokens_per_recursion_2"] for line in run_whole_and_in_parts("routed", "--capacity-warmup-iters", "3")]
    assert kept[0] > kept[1] > kept[2] == kept[3]
    assert kept[3] == pytest.approx(1 / 3, abs=1 / 16)

    for step in ("recursive", "routed"):
        config = validate(read_config(words_of(step, dense, tmp_path, "--seq-length", "16")), world_size=8)
        assert config.optimizer.lr_decay_iters == config.training.train_iters > 1000
    files = [str(tmp_path / "start/iter_0000000/config.yaml"), "examples/uptraining/common.yaml"]
    words = ["--gpus", "8", "--distill-from", dense, "--seq-length", "16", "--config", *files]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    assert load_tool("plan").main() == 0
    assert "teacher" in capsys.readouterr().out


def test_the_script_says_how_it_is_used():
    ran = subprocess.run([ROOT / "examples/uptraining/uptrain.sh"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "uptrain.sh routed DENSE DIR" in ran.stderr
