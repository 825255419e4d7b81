"""Damaged checkpoints and corpora give the same content or one clear error that names the place."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from checkpoints import whole_tensors, write_checkpoint
from spoil import COUNTS, spoil

from mor_megatron.checkpointing.inspection import verify as verify_checkpoint
from mor_megatron.checkpointing.manifest import MANIFEST, self_checksum
from mor_megatron.checkpointing.randomness import set_random_state
from mor_megatron.checkpointing.reader import open_checkpoint
from mor_megatron.checkpointing.shards import STEP
from mor_megatron.data.indexed import read_index, verify
from mor_megatron.training.progress import Progress


def load_all(directory: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All that loading reads, and what it makes of progress and random state."""
    reader = open_checkpoint(directory)
    Progress(**reader.manifest.progress)
    state = torch.get_rng_state()
    set_random_state(reader.manifest.random)
    torch.set_rng_state(state)
    found = {}
    for name in reader.manifest.parameters:
        for kind in reader.kinds[name]:
            if kind == STEP:
                reader.scalar(name)
            else:
                found[kind, name] = reader.whole(kind, name)
    return found


def outcome(directory: Path, expected: dict) -> str:
    """`equal` or `refused`; anything else fails the test."""
    try:
        found = load_all(directory)
    except ValueError as error:
        named = str(directory) in str(error) or "random state" in str(error)
        return "refused" if named and "\n" not in str(error) else f"not one line that names the place: {error}"
    same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    return "equal" if same else "changed weights were accepted"


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_files(tmp_path, count):
    """Files, manifest included, are spoilt, deleted, emptied or exchanged."""
    source = write_checkpoint(tmp_path / "source")
    expected = whole_tensors()
    chance = random.Random(1)
    outcomes = []
    for number in range(count):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        victim, other = chance.sample(sorted(copy.iterdir()), 2)
        content = victim.read_bytes()
        action = chance.randrange(12)
        if action == 0:
            victim.unlink()
        elif action == 1:
            victim.write_bytes(other.read_bytes())
        else:
            victim.write_bytes(spoil(content, chance))
        result = outcome(copy, expected)
        assert result in ("equal", "refused"), f"case {number}, {victim.name}: {result}"
        untouched = victim.exists() and victim.read_bytes() == content
        assert (result == "equal") == untouched or victim.name == MANIFEST, f"case {number}, {victim.name}: {result}"
        assert bool(list(verify_checkpoint(copy))) == (result == "refused"), f"case {number}: verify disagrees"
        outcomes.append(result)
    assert outcomes.count("refused") > 0.8 * count


VALUES = [None, True, -1, 0, 1, 7, 2**70, 0.5, float("nan"), "", "x", "weight/x/0/0", "../../x", [], [1], {}, {"a": 1}]


def change_somewhere(content, chance: random.Random):
    """Replace, delete or add one value at any depth of a JSON document."""
    places: list[tuple] = []

    def collect(node) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        for key in keys:
            places.append((node, key))
            if not (isinstance(node[key], list) and len(node[key]) > 100):  # random states
                collect(node[key])

    collect(content)
    node, key = chance.choice(places)
    match chance.randrange(3):
        case 0:
            node[key] = chance.choice(VALUES)
        case 1:
            del node[key]
        case 2:
            other, at = chance.choice(places)
            node[key] = json.loads(json.dumps(other[at]) if at in other or isinstance(other, list) else "0")
    return content


@pytest.mark.parametrize("count", COUNTS)
def test_forged_manifests(tmp_path, count):
    """Changed, and given the right checksum of themselves: whatever they say, there is a weight or one error.

    Which weight belongs to which name is what a manifest says; one who forges it can change that.
    """
    directory = write_checkpoint(tmp_path)
    original = (directory / MANIFEST).read_text()
    expected = whole_tensors()
    chance = random.Random(2)
    refused = 0
    for number in range(count):
        content = json.loads(original)
        del content["checksum"]
        for _ in range(chance.choice([1, 1, 3])):
            try:
                content = change_somewhere(content, chance)
            except (IndexError, KeyError, TypeError):
                continue  # the place went away with an earlier change
        (directory / MANIFEST).write_text(json.dumps({**content, "checksum": self_checksum(content)}))
        result = outcome(directory, expected)
        assert result in ("equal", "refused", "changed weights were accepted"), f"case {number}: {result}"
        refused += result == "refused"
        list(verify_checkpoint(directory))
    assert refused > 0.3 * count


def write_corpus(prefix: Path) -> dict[str, bytes]:
    """Ten documents of random tokens, as Megatron-core writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in generator.integers(1, 30, 10):
        builder.add_document(torch.from_numpy(generator.integers(0, 99, length)), [int(length)])
    builder.finalize(f"{prefix}.idx")
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".idx", ".bin")}


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_indexes(tmp_path, count):
    prefix = tmp_path / "corpus"
    contents = write_corpus(prefix)
    chance = random.Random(3)
    refused = 0
    for number in range(count):
        for suffix, content in contents.items():
            Path(f"{prefix}{suffix}").write_bytes(content)
        suffix = chance.choice([".idx", ".idx", ".idx", ".bin"])
        Path(f"{prefix}{suffix}").write_bytes(spoil(contents[suffix], chance))
        try:
            index = read_index(str(prefix))
            problems = list(verify(str(prefix), vocab_size=100))
        except ValueError as error:
            problems = [str(error)]
        if problems:
            refused += 1
            assert all(str(prefix) in problem and "\n" not in problem for problem in problems), f"case {number}"
            continue
        # Tokens and bounds have no checksum: a change that leaves a valid corpus is not damage that can be seen.
        assert index.lengths.sum() * 2 == Path(f"{prefix}.bin").stat().st_size, f"case {number}"
        assert index.bounds[0] == 0, f"case {number}"
        assert index.bounds[-1] == len(index.lengths), f"case {number}"
    assert refused > 0.5 * count


def test_the_checksum_is_the_one_that_is_meant():
    """128-bit XXH3 over sorted, compact JSON: what another reader has to compute."""
    assert self_checksum({"b": 1, "a": [1.5]}) == xxhash.xxh3_128_hexdigest(b'{"a":[1.5],"b":1}')
