"""Whole runs and their checkpoints: damage, failing disks, asynchronous saves, retention, fine-tuning."""

from __future__ import annotations

import json
import os
import pickle
import resource
import runpy
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_runs import (
    ROOT,
    assert_same_checkpoint,
    flip_last_bit,
    read_metrics,
    read_weights,
    run_program,
    small_config,
)

from mor_megatron.checkpointing import save as saving
from mor_megatron.checkpointing.directory import candidates
from mor_megatron.checkpointing.manifest import read_manifest
from mor_megatron.checkpointing.reader import open_checkpoint
from mor_megatron.checkpointing.save import SaveError
from mor_megatron.pretraining import lock
from mor_megatron.pretraining.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def whole(process_group, corpus, tmp_path_factory) -> Path:
    """Nine iterations, saved after every third."""
    save = tmp_path_factory.mktemp("whole")
    pretrain(small_config(corpus, save=str(save), train_iters=9, save_interval=3))
    return save


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same to spoil."""
    save = tmp_path / "copy"
    run = ["cp", "-r", str(whole), str(save)]
    assert run_program(run, 60).returncode == 0
    return save


DAMAGES = {
    "bit": lambda d: flip_last_bit(d / "state_00000.safetensors"),
    "file": lambda d: (d / "state_00000.safetensors").unlink(),
    "manifest": lambda d: (d / "manifest.json").unlink(),
    "config": lambda d: flip_last_bit(d / "config.yaml"),
}
FAULTY = {"bit": "state_00000.safetensors", "file": "state_00000.safetensors", "manifest": "manifest.json"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(whole, copy, corpus, capsys, damage):
    DAMAGES[damage](copy / "iter_0000009")
    pretrain(small_config(corpus, save=str(copy), load=str(copy), train_iters=9, save_interval=3))
    out = capsys.readouterr().out
    assert f"iter_0000009 is not used: {copy}/iter_0000009/{FAULTY.get(damage, 'config.yaml')}" in out
    assert f"resuming from {copy}/iter_0000006" in out
    assert read_metrics(copy) == read_metrics(whole)
    assert_same_checkpoint(copy, whole, 9)


def test_strict_loading_refuses_it(copy, corpus):
    DAMAGES["bit"](copy / "iter_0000009")
    message = r"iter_0000009/state_00000\.safetensors .*checksum differs: restore it, or leave out --load-strict"
    with pytest.raises(ValueError, match=message):
        pretrain(small_config(corpus, load=str(copy), load_strict=True))


def test_without_an_intact_one_nothing_is_loaded(copy, corpus):
    for directory in candidates(copy):
        DAMAGES["file"](directory)
    with pytest.raises(ValueError, match="has no intact checkpoint"):
        pretrain(small_config(corpus, load=str(copy)))


def test_nothing_is_unpickled(whole, corpus, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a file was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    pretrain(small_config(corpus, load=str(whole), train_iters=10))
    assert "resuming from" in capsys.readouterr().out
    suffixes = {path.suffix for path in (whole / "iter_0000009").iterdir()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def test_the_manifest_says_what_was_saved(whole):
    manifest = read_manifest(whole / "iter_0000009")
    assert manifest.progress["consumed_samples"] == 72
    assert manifest.model["vocab-size"] == 64
    assert manifest.layout["zero-stage"] == 1
    assert set(manifest.versions) == {"torch", "megatron-core", "deepspeed"}
    reader = open_checkpoint(whole / "iter_0000009")
    assert "embedding.word_embeddings.weight" in reader.kinds
    assert "output_layer.weight" not in reader.kinds, "a tied weight is stored once"


def test_retention(corpus, tmp_path):
    changes = {"save_interval": 1, "train_iters": 7, "keep_last": 2, "keep_every": 3, "eval_iters": 0}
    pretrain(small_config(corpus, save=str(tmp_path), **changes))
    assert [path.name for path in candidates(tmp_path)] == [f"iter_000000{i}" for i in (7, 6, 3)]


def full_disk(path: Path, tensors) -> None:
    path.write_bytes(b"half of it")
    raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_failed_save_leaves_older_ones_and_the_run_alone(corpus, tmp_path, monkeypatch, capsys, async_save):
    """The second of three saves fails."""
    real, calls = saving.write_tensors, []

    def write(path, tensors):
        calls.append(path)
        return full_disk(path, tensors) if len(calls) == 2 else real(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", write)
    changes = {"save_interval": 2, "train_iters": 6, "keep_last": 1, "async_save": async_save, "eval_iters": 0}
    pretrain(small_config(corpus, save=str(tmp_path), **changes))
    assert "iter_0000004 was not saved (rank 0: No space left on device" in capsys.readouterr().err
    assert [path.name for path in candidates(tmp_path)] == ["iter_0000006"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_failed_save_stops_the_run_if_it_is_to(corpus, tmp_path, monkeypatch, async_save):
    changes = {"save_interval": 2, "train_iters": 6, "eval_iters": 0, "async_save": async_save}
    pretrain(small_config(corpus, save=str(tmp_path), **{**changes, "train_iters": 2}))
    monkeypatch.setattr(saving, "write_tensors", full_disk)
    with pytest.raises(SaveError, match=r"iter_0000004 was not saved .*older checkpoints are untouched"):
        pretrain(small_config(corpus, save=str(tmp_path), load=str(tmp_path), on_save_failure="stop", **changes))
    assert [path.name for path in candidates(tmp_path)] == ["iter_0000002"]
    open_checkpoint(tmp_path / "iter_0000002")


def test_a_last_save_that_fails_fails_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "write_tensors", full_disk)
    with pytest.raises(SaveError, match="iter_0000002 was not saved"):
        pretrain(small_config(corpus, save=str(tmp_path), train_iters=2, eval_iters=0))


def test_a_file_that_the_system_will_not_let_grow(corpus, tmp_path, capsys):
    """A real error of write(2)."""
    pretrain(small_config(corpus, save=str(tmp_path), train_iters=2, eval_iters=0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"iter_0000004 was not saved .*File too large"):
            pretrain(small_config(corpus, save=str(tmp_path), load=str(tmp_path), train_iters=4, eval_iters=0))
        assert "metrics.jsonl cannot be written (File too large); training goes on" in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in candidates(tmp_path)] == ["iter_0000002"]
    open_checkpoint(tmp_path / "iter_0000002")


def used(directory: Path) -> str:
    (directory / "iter_0000002").mkdir(parents=True)
    (directory / "latest").write_text("iter_0000002\n")
    return str(directory)


def a_file(path: Path) -> str:
    path.write_text("")
    return str(path)


def locked(directory: Path) -> str:
    directory.mkdir()
    holder = {"host": "node7", "pid": os.getppid(), "machine": lock._machine(), "began": lock._began(os.getppid())}
    (directory / lock.LOCK).write_text(json.dumps(holder))
    return str(directory)


OUTPUTS = {
    "a file": (lambda p: {"save": a_file(p / "run")}, r"save=\S+/run cannot be written \(it is a file\): name another"),
    "below a file": (lambda p: {"save": a_file(p / "x") + "/run"}, r"save=.*cannot be written \(Not a directory\)"),
    "no place for files": (lambda p: {"save": "/proc/run"}, r"save=/proc/run cannot be written \(No such file"),
    "events": (
        lambda p: {"tensorboard_dir": a_file(p / "tb")},
        r"tensorboard-dir=\S+ cannot be written \(it is a file",
    ),
    "used": (lambda p: {"save": used(p / "run")}, r"save=\S+/run has iter_0000002 .*: add --load \S+/run to go on"),
    "used, loading from elsewhere": (
        lambda p: {"save": used(p / "run"), "load": used(p / "other")},
        r"save=\S+/run has iter_0000002 of a run that this one would replace: add --load \S+/run to go on with it, or",
    ),
    "used, loading what is not there": (
        lambda p: {"save": used(p / "run"), "load": str(p / "run" / "iter_0000009")},
        r"save=\S+/run has iter_0000002 .*: load=\S+/iter_0000009 is no checkpoint, so give --load \S+/run to",
    ),
    "used by what is fine-tuned": (
        lambda p: {"save": used(p / "run"), "load": str(p / "run"), "finetune": True},
        r"save=\S+/run has iter_0000002 .*: leave out --finetune to go on with it, or name another directory",
    ),
    "in use": (lambda p: {"save": locked(p / "run")}, r"save=\S+/run is in use by process \d+ on node7: wait until"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_where_a_run_cannot_write_it_does_not_begin(corpus, tmp_path, monkeypatch, name):
    monkeypatch.setattr("mor_megatron.pretraining.pretrain.configured_tokenizer", lambda data: pytest.fail("it began"))
    changes, message = OUTPUTS[name]
    changes = changes(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        pretrain(small_config(corpus, **changes))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_rights(corpus, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="Permission denied"):
            pretrain(small_config(corpus, save=str(tmp_path)))
    finally:
        tmp_path.chmod(0o700)


def test_one_checkpoint_of_a_run_is_of_that_run(copy, corpus, capsys):
    pretrain(small_config(corpus, save=str(copy), load=str(copy / "iter_0000006"), train_iters=7, eval_iters=0))
    assert f"resuming from {copy}/iter_0000006" in capsys.readouterr().out
    assert not (copy / lock.LOCK).exists()


def test_another_blend_in_the_same_file_is_told(corpus, tmp_path, capsys):
    words, save = tmp_path / "words", str(tmp_path / "run")
    settings = {"data_path": (), "data_args_path": str(words), "save": save, "load": save, "eval_iters": 0}
    for iteration, blend in enumerate(("0.9 {0} 0.1 {0}", "0.9 {0}\n0.1 {0}\n", "0.2 {0} 0.8 {0}"), 1):
        words.write_text(blend.format(corpus))
        pretrain(small_config(corpus, **settings, train_iters=iteration))
        told = f"the file of data arguments was 0.9 {corpus} 0.1 {corpus}, is now 0.2 {corpus} 0.8 {corpus}"
        assert (told in capsys.readouterr().out) == (iteration == 3)


def test_saving_in_the_background_saves_the_same(whole, corpus, tmp_path, monkeypatch):
    """Training goes on while the state is copied and written; what is written is that of the iteration.

    Copying begins long after a step of this model would have changed it.
    """
    copy = saving.HostCopy.copy
    monkeypatch.setattr(saving.HostCopy, "copy", lambda self, entries: time.sleep(0.5) or copy(self, entries))
    pretrain(small_config(corpus, save=str(tmp_path), train_iters=9, save_interval=3, async_save=True))
    for iteration in (3, 6, 9):
        assert_same_checkpoint(tmp_path, whole, iteration)


def test_training_goes_on_while_a_checkpoint_is_written(corpus, tmp_path, monkeypatch, capsys):
    """The first write waits until the fourth iteration has ended, and one save at most is in flight."""
    real, release, in_flight, most = saving.write_tensors, threading.Event(), [0], [0]

    def slow(path, tensors):
        in_flight[0] += 1
        most[0] = max(most[0], in_flight[0])
        assert release.wait(60), "training stood still"
        try:
            return real(path, tensors)
        finally:
            in_flight[0] -= 1

    def step(*args, **kwargs):
        report = train_step(*args, **kwargs)
        if args[3] == 4:
            release.set()
        return report

    from mor_megatron.pretraining import loop

    train_step = loop.train_step
    monkeypatch.setattr(saving, "write_tensors", slow)
    monkeypatch.setattr(loop, "train_step", step)
    pretrain(small_config(corpus, save=str(tmp_path), train_iters=6, save_interval=2, async_save=True, eval_iters=0))
    assert most[0] == 1
    assert [path.name for path in candidates(tmp_path)] == [f"iter_000000{i}" for i in (6, 4, 2)]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_finetuning_loads_weights_only(whole, corpus, tmp_path, capsys):
    """Another optimizer and other recursions over the same layers; the same router."""
    changes = {"optimizer": "sgd", "lr": 1e-30, "min_lr": 0.0, "train_iters": 1, "eval_iters": 0}
    changes |= {"num_recursions": 2, "num_layers": 6, "load": str(whole), "finetune": True}
    pretrain(small_config(corpus, save=str(tmp_path), **changes))
    assert f"fine-tuning from the weights of {whole}/iter_0000009" in capsys.readouterr().out
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1]
    before, after = read_weights(whole, 9), read_weights(tmp_path, 1)
    for name, value in after.items():
        assert name.startswith("router.") or torch.equal(value, before[name]), name
    assert torch.equal(after["router.routers.0.weights.0"], before["router.routers.0.weights.0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "hidden-size=64 does not fit .*hidden-size=32"),
        ({"num_layers": 11}, r"layers\.4\..* is of shape .* in this model and not there in .*same layers"),
    ],
)
def test_finetuning_refuses_other_layers(whole, corpus, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain(small_config(corpus, load=str(whole), finetune=True, **change))


def tool(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "tools" / "checkpoint.py"), run_name="__main__")
    return exit_info.value.code


def test_the_tool(copy, corpus, tmp_path, monkeypatch, capsys):
    assert tool(monkeypatch, "verify", copy) == 0
    assert capsys.readouterr().out.count(": intact") == 3
    assert tool(monkeypatch, "info", copy / "iter_0000006") == 0
    assert "iteration=6" in capsys.readouterr().out
    assert tool(monkeypatch, "convert", copy, tmp_path / "one", "--with-optimizer") == 0
    assert (tmp_path / "one" / "optimizer.safetensors").exists()
    assert tool(monkeypatch, "convert", copy, tmp_path / "one") == 2
    assert "exists: name a new directory" in capsys.readouterr().err
    assert tool(monkeypatch, "convert", tmp_path / "one", tmp_path / "two") == 2
    assert "one is a converted checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"one is a converted checkpoint, .*: give the one that it was made from"):
        pretrain(small_config(corpus, load=str(tmp_path / "one")))
    assert tool(monkeypatch, "prune", copy, "--keep-last", 1, "--dry-run") == 0
    assert len(candidates(copy)) == 3
    assert tool(monkeypatch, "prune", copy, "--keep-last", 1) == 0
    assert [path.name for path in candidates(copy)] == ["iter_0000009"]
    flip_last_bit(copy / "iter_0000009" / "state_00000.safetensors")
    assert tool(monkeypatch, "verify", copy) == 1
    assert "DAMAGED" in capsys.readouterr().out
    for command in (["verify"], ["prune", "--keep-last", 1]):
        assert tool(monkeypatch, *command, tmp_path) == 2
        assert "has no checkpoint" in capsys.readouterr().err
