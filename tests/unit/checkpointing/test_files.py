"""Files of a checkpoint: any safetensors reader can read them, and every change is detected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from checkpoints import SHARDINGS, whole_tensors, write_checkpoint
from safetensors.torch import load_file

from mor_megatron.checkpointing.convert import convert
from mor_megatron.checkpointing.inspection import describe, verify
from mor_megatron.checkpointing.manifest import MANIFEST, parse, read_manifest
from mor_megatron.checkpointing.reader import open_checkpoint, read_buffers, read_parameters
from mor_megatron.checkpointing.shards import BUFFER, WEIGHT, ShardEntry, Sharding
from mor_megatron.checkpointing.stored_file import checksum_of, write_tensors


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path)


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {"a/b/0/0": torch.randn(7), "a/b/0/7": torch.randn(1), "c": torch.randn(3_000_000)}
    path = tmp_path / "file.safetensors"
    written = write_tensors(path, tensors.items())
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert written.size == path.stat().st_size
    assert written.checksum == checksum_of(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())
    with pytest.raises(FileExistsError):
        write_tensors(path, tensors.items())


@pytest.mark.parametrize(
    "sharding", [*SHARDINGS.values(), Sharding((12, 4), 1, 2, 2), Sharding((8, 2), 0, 1, 4, rows=5)], ids=str
)
def test_shard_and_join_are_inverse(sharding):
    whole = torch.randn(sharding.unpadded)
    shards = [sharding.shard(whole, rank) for rank in range(sharding.shards)]
    assert [shard.numel() for shard in shards] == [sharding.shard_numel] * sharding.shards
    assert torch.equal(sharding.join(shards), whole)


def test_shard_entries_have_names(checkpoint):
    entry = ShardEntry("exp_avg", "layers.0.mlp.linear_fc1.weight", 1, 6)
    assert str(entry) in read_manifest(checkpoint).files["state_00003.safetensors"].entries
    assert ShardEntry.parse(str(entry)) == entry
    for text in ("exp_avg/name/0", "exp_avg/name/0/-1", "exp_avg/name/x/1", ""):
        with pytest.raises(ValueError):
            ShardEntry.parse(text)


def test_reading_joins_entries_and_shards(checkpoint):
    tensors = whole_tensors()
    reader = open_checkpoint(checkpoint)
    for (kind, name), expected in tensors.items():
        assert torch.equal(reader.whole(kind, name), expected), name
    for name, value in read_parameters(checkpoint).items():
        assert torch.equal(value, tensors[WEIGHT, name])
    assert torch.equal(read_buffers(checkpoint)["router.balance_bias"], tensors[BUFFER, "router.balance_bias"])
    assert len(read_parameters(checkpoint)) == len(SHARDINGS) - 1
    assert reader.scalar("final_layernorm.weight") == 10.0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_part_of_any_layout(checkpoint, size):
    """One, two and four tensor-parallel ranks; a vocabulary padded to other lengths."""
    reader = open_checkpoint(checkpoint)
    name = "embedding.word_embeddings.weight"
    sharding = Sharding((16, 3), dim=0, size=size, rows=11)
    expected = torch.zeros(16, 3)
    expected[:11] = whole_tensors()[WEIGHT, name]
    for rank in range(size):
        shard = expected.chunk(size)[rank].reshape(-1)
        for begin, length in ((0, shard.numel()), (1, shard.numel() - 2), (5, 1)):
            got = reader.read_for(sharding, rank, WEIGHT, name, begin, length)
            assert torch.equal(got, shard[begin : begin + length]), (rank, begin)
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight has shape \[10, 3\], and \[11, 3\] in .*iter_0000010"
    ):
        reader.read_for(replace(sharding, rows=10), 0, WEIGHT, name, 0, 1)
    with pytest.raises(ValueError, match=r"lacks element 18 of weight/embedding.*, shard 0"):
        reader.read(WEIGHT, name, 0, 10, 20)


def test_the_manifest_comes_back(checkpoint):
    manifest = read_manifest(checkpoint)
    assert parse(manifest.to_json()) == replace(manifest, random=json.loads(json.dumps(manifest.random)))
    assert manifest.parameters == SHARDINGS
    assert manifest.iteration == 10


def test_an_intact_checkpoint_verifies(checkpoint):
    assert list(verify(checkpoint)) == []
    assert "iteration=10" in describe(checkpoint)
    assert "tensor-model-parallel-size=2" in describe(checkpoint)
    assert f"{sum(t.numel() for (k, _), t in whole_tensors().items() if k in (WEIGHT, BUFFER))} in 5" in describe(
        checkpoint
    )


DAMAGES = {
    "a flipped bit": (lambda path: flip(path, -1), "its checksum differs"),
    "a missing end": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "something appended": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes instead of"),
    "a missing file": (lambda path: path.unlink(), "cannot be read"),
}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state_00002.safetensors", "config.yaml"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(checkpoint, file, damage):
    spoil, message = DAMAGES[damage]
    spoil(checkpoint / file)
    with pytest.raises(ValueError, match=f"{checkpoint / file} .*{message}"):
        open_checkpoint(checkpoint)
    (problem,) = verify(checkpoint)
    assert str(checkpoint / file) in problem


def test_a_manifest_that_lists_too_little_does_not_verify(checkpoint):
    manifest = read_manifest(checkpoint)
    rewrite(checkpoint, {**manifest.files, "state_00003.safetensors": None})
    problems = "\n".join(verify(checkpoint))
    assert "weight/layers.0.mlp.linear_fc2.weight, shard 1, is not whole at element 3" in problems


def rewrite(checkpoint: Path, files: dict) -> None:
    manifest = replace(read_manifest(checkpoint), files={name: file for name, file in files.items() if file})
    (checkpoint / MANIFEST).write_text(manifest.to_json())


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_conversion_has_whole_tensors_under_their_names(checkpoint, tmp_path, with_optimizer):
    output = convert(checkpoint, tmp_path / "converted", with_optimizer)
    tensors = whole_tensors()
    for (kind, name), expected in tensors.items():
        if kind == WEIGHT:
            assert torch.equal(load_file(output / "model.safetensors")[name], expected)
        elif with_optimizer and kind != BUFFER:
            assert torch.equal(load_file(output / "optimizer.safetensors")[f"{kind}/{name}"], expected)
    assert (output / "optimizer.safetensors").exists() == with_optimizer
    for read in (read_parameters, read_buffers):
        one, other = read(checkpoint), read(output)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert list(verify(output)) == []
    assert (output / "config.yaml").read_text() == "hidden-size: 3\n"
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1  # what the umask leaves
    flip(output / "model.safetensors", -1)
    with pytest.raises(ValueError, match=r"model\.safetensors .*checksum differs"):
        read_parameters(output)
    with pytest.raises(ValueError, match="exists: name a new directory"):
        convert(checkpoint, output)
