"""A real loss spike, from another kind of text in the middle of the data, is reported and rolled back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import VOCABULARY, assert_same_checkpoint, read_metrics, small_config

from mor_megatron.checkpointing.load import find_checkpoint
from mor_megatron.pretraining.pretrain import pretrain
from mor_megatron.pretraining.spikes import WARMUP, is_spike, update_average
from mor_megatron.training.progress import Progress

ITERATIONS = 90
"""The noise is met early, when too little has been learned for it to stand out, and then in iteration 69."""
SETTINGS = {
    "split": "1,0,0",
    "eval_iters": 0,
    "train_iters": ITERATIONS,
    "lr_decay_iters": ITERATIONS,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "save_interval": 10,
    "keep_last": 3,
    "loss_spike_factor": 2.0,
    "log_interval": 1000,
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """Counting upwards, and one document of noise that fills a sample or two."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("spoilt") / "text"
    generator = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(160):
        document = (generator.integers(VOCABULARY) + np.arange(50)) % VOCABULARY
        if number == 80:
            document = generator.integers(0, VOCABULARY, 50)
        builder.add_document(torch.from_numpy(document), [50])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def spikes(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"iteration (\d+): loss spike", output)]


def test_a_spike_is_reported_and_training_goes_on(process_group, spoilt, tmp_path, capsys):
    pretrain(small_config(spoilt, save=str(tmp_path), **SETTINGS))
    found = spikes(capsys.readouterr().out)
    assert found
    assert min(found) > WARMUP
    assert len(found) < 4, "noise fills three samples at most"
    assert [line["iteration"] for line in read_metrics(tmp_path)] == list(range(1, ITERATIONS + 1))


def test_a_rollback_leaves_the_samples_out(process_group, spoilt, tmp_path, capsys):
    save = str(tmp_path / "run")
    # Measured in samples, those left out must count neither for the end of the run nor for its learning rate.
    in_samples = {
        "train_iters": None,
        "train_samples": 2 * ITERATIONS,
        "lr_warmup_samples": 4,
        "lr_wsd_decay_samples": 16,
    }
    in_iterations = {"lr_warmup_iters": 0, "lr_decay_iters": None, "lr_wsd_decay_iters": None}
    settings = {**SETTINGS, **in_samples, **in_iterations, "max_rollbacks": 1, "save": save}
    pretrain(small_config(spoilt, **settings))
    output = capsys.readouterr().out
    spike = spikes(output)[0]
    back = (spike - 1) // 10 * 10
    left_out = 2 * (spike - back)
    assert (
        f"rollback 1 of 1: from iteration {spike} to {back}; samples {2 * back} to {2 * spike - 1} are left" in output
    )

    lines = read_metrics(save)
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1))
    consumed = [line["consumed_samples"] for line in lines]
    assert consumed == [2 * i + (left_out if i > back else 0) for i in range(1, ITERATIONS + 1)]
    assert [line["learning_rate"] for line in lines if line["iteration"] > ITERATIONS - 8] == [
        1e-2 * i / 8 for i in range(8, 0, -1)
    ]
    dropped = [json.loads(line) for line in (Path(save) / "metrics.dropped.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in dropped] == list(range(back + 1, spike + 1))
    assert lines[back]["lm_loss"] != dropped[0]["lm_loss"], "other samples"
    _, manifest = find_checkpoint(Path(save))
    assert (manifest.progress["rollbacks"], manifest.progress["left_out_samples"]) == (1, left_out)

    # The run that begins at that checkpoint with those samples left out is the same one, and is not stopped again.
    part = str(tmp_path / "part")
    pretrain(small_config(spoilt, **{**settings, "save": part, "exit_interval": back + 10}))
    assert "rollback 1 of 1" in capsys.readouterr().out
    pretrain(small_config(spoilt, **{**settings, "save": part, "load": part}))
    assert " rollback " not in capsys.readouterr().out
    assert read_metrics(part) == lines
    assert_same_checkpoint(save, part, ITERATIONS)


@pytest.fixture(scope="module")
def earlier(process_group, spoilt, tmp_path_factory):
    """A first attempt, which saved more often, last at iteration 74."""
    save = tmp_path_factory.mktemp("earlier")
    settings = {**SETTINGS, "train_iters": 74, "save_interval": 4, "keep_last": None}
    pretrain(small_config(spoilt, save=str(save), **settings))
    return save


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_that_began_at_an_older_checkpoint_goes_back_to_it(earlier, spoilt, tmp_path, capsys, optimizer):
    """Not to one that the first attempt wrote before or after the spike; and as it began, with a new optimizer."""
    save = tmp_path / "run"
    shutil.copytree(earlier, save)
    new = {"load": str(save / "iter_0000060"), "optimizer": optimizer, "no_load_optim": optimizer != "adam"}
    settings = {**SETTINGS, "train_iters": 74, "save": str(save), "max_rollbacks": 1, **new}
    pretrain(small_config(spoilt, **settings))
    output = capsys.readouterr().out
    spike = spikes(output)[0]
    assert f"rollback 1 of 1: from iteration {spike} to 60; samples 120 to {2 * spike - 1} are left out" in output
    _, manifest = find_checkpoint(save)
    assert (manifest.iteration, manifest.progress["left_out_samples"]) == (74, 2 * (spike - 60))


def test_without_a_checkpoint_there_is_no_way_back(process_group, spoilt, tmp_path, capsys):
    pretrain(small_config(spoilt, save=str(tmp_path), **{**SETTINGS, "max_rollbacks": 1, "save_interval": 1000}))
    output = capsys.readouterr().out
    assert spikes(output)
    assert " rollback " not in output


def test_the_average_waits_and_follows():
    progress = Progress()
    assert not is_spike(1e9, progress, 2.0)
    for _ in range(WARMUP):
        progress.iteration += 1
        assert not is_spike(1e9, progress, 2.0) or progress.iteration >= WARMUP
        update_average(4.0, progress)
    assert progress.loss_average == pytest.approx(4.0)
    assert is_spike(8.1, progress, 2.0)
    assert not is_spike(7.9, progress, 2.0)
    assert not is_spike(8.1, progress, None)
    for _ in range(100):
        update_average(1.0, progress)
    assert progress.loss_average == pytest.approx(1.0, abs=0.05)
