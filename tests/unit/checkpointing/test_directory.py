"""Which checkpoint is loaded after a kill at any instant, and which ones retention deletes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import whole_tensors, write_checkpoint

from mor_megatron.checkpointing import directory
from mor_megatron.checkpointing.directory import candidates, delete, expired, publish
from mor_megatron.checkpointing.reader import read_parameters
from mor_megatron.checkpointing.shards import WEIGHT


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def fill(root: Path, iterations: list[int]) -> None:
    for iteration in iterations:
        write_checkpoint(root, iteration, seed=iteration)


def test_latest_comes_first_and_then_older_ones(tmp_path):
    assert candidates(tmp_path / "nothing") == []
    fill(tmp_path, [5, 10, 20])
    assert (tmp_path / "latest").read_text() == "iter_0000020\n"
    assert names(candidates(tmp_path)) == ["iter_0000020", "iter_0000010", "iter_0000005"]
    (tmp_path / "latest").write_text("iter_0000010\n")
    assert names(candidates(tmp_path)) == ["iter_0000010", "iter_0000005"]
    (tmp_path / "latest").write_text("iter_0000015\n")  # deleted, perhaps: it is said, and older ones follow
    assert names(candidates(tmp_path)) == ["iter_0000015", "iter_0000010", "iter_0000005"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"../elsewhere\n", b"iter_0000010.partial\n"])
def test_without_a_usable_latest_all_are_tried(tmp_path, content):
    fill(tmp_path, [5, 10])
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert names(candidates(tmp_path)) == ["iter_0000010", "iter_0000005"]


class Killed(BaseException):
    """The process was killed: not even cleaning up is left."""


def kill_at(monkeypatch, instant: int) -> list[int]:
    """Let the process die before its `instant`-th change or flush of a directory; counts how many there were."""
    count = [0]

    def dying(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == instant:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(Path, "open", dying(Path.open))
    return count


@pytest.mark.parametrize("again", [False, True], ids=["new", "same iteration again"])
def test_a_kill_at_any_instant_of_publishing(tmp_path, monkeypatch, again):
    """There is always an intact one: the old one or the new one, and the new one once `latest` names it."""
    iteration = 10 if again else 20
    instants = 0
    while True:
        instants += 1
        root = tmp_path / str(instants)
        fill(root, [10])
        write_checkpoint(root / "elsewhere", iteration, seed=99)
        partial = (root / "elsewhere" / f"iter_{iteration:07d}").rename(root / f"iter_{iteration:07d}.partial")
        finished = False
        with monkeypatch.context() as patch:
            kill_at(patch, instants)
            try:
                publish(partial)
                finished = True
            except Killed:
                pass
        best, *_ = [path for path in candidates(root) if path.exists()]
        got = read_parameters(best)["final_layernorm.weight"]
        old, new = (whole_tensors(seed)[WEIGHT, "final_layernorm.weight"] for seed in (10, 99))
        assert torch.equal(got, old) or torch.equal(got, new)
        if finished:
            assert torch.equal(got, new)
            assert names(candidates(root)) == (["iter_0000010"] if again else ["iter_0000020", "iter_0000010"])
            break
    assert instants > 6, "too few instants were tried"


def test_retention(tmp_path):
    fill(tmp_path, [5, 10, 15, 20, 25, 30])
    assert names(expired(tmp_path, keep_last=2)) == ["iter_0000020", "iter_0000015", "iter_0000010", "iter_0000005"]
    assert names(expired(tmp_path, 2, keep_every=10)) == ["iter_0000015", "iter_0000005"]
    assert expired(tmp_path, keep_last=6) == []
    assert expired(tmp_path / "nothing", keep_last=1) == []


def test_incomplete_ones_are_not_counted_as_kept(tmp_path):
    fill(tmp_path, [5, 10, 15])
    (tmp_path / "iter_0000010" / "state_00001.safetensors").unlink()
    (tmp_path / "iter_0000012.partial").mkdir()
    (tmp_path / "iter_0000020.partial").mkdir()  # another process may be writing it
    assert names(expired(tmp_path, keep_last=2)) == ["iter_0000010", "iter_0000012.partial"]


def test_the_future_of_an_older_checkpoint_is_left_alone(tmp_path):
    fill(tmp_path, [5, 10, 15, 20])
    (tmp_path / "latest").write_text("iter_0000010\n")
    assert names(expired(tmp_path, keep_last=1)) == ["iter_0000005"]


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    fill(tmp_path, [5, 10])
    monkeypatch.setattr(directory.shutil, "rmtree", lambda path: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        delete([tmp_path / "iter_0000005"])
    with pytest.raises(ValueError, match=r"iter_0000005/manifest\.json cannot be read .*not complete"):
        read_parameters(tmp_path / "iter_0000005")
