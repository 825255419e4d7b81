"""The order of samples is a pure function of seed and consumed samples, and none is lost; document masks."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_jsonl
from forkserver import fork_context

from mor_megatron.config.schema import Config, DataConfig, TrainingConfig
from mor_megatron.data.corpora import Blend, parse_blend
from mor_megatron.data.datasets import build_batches, build_datasets, make_batch, repetitions
from mor_megatron.data.indexed import read_index, read_tokens
from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.tokenizers import build_tokenizer

SEQ = 32


def settings(*paths: str, seed: int = 1, cache: Path | None = None, **data) -> Config:
    section = DataConfig(data_path=paths, seq_length=SEQ, data_cache_path=cache and str(cache), **data)
    return Config(data=section, training=TrainingConfig(seed=seed))


def train(config: Config, count: int, tokenizer=None):
    return build_datasets(config, tokenizer, (count, 0, 0))[0]


def sample(dataset, i: int) -> list[int]:
    return dataset[i]["tokens"].tolist()


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two corpora in which every token occurs once: 0..2999 in documents of 30, 3000..5999 in documents of 50."""
    folder = tmp_path_factory.mktemp("numbers")
    prefixes = []
    for begin, length in ((0, 30), (3000, 50)):
        documents = [" ".join(map(str, range(i, i + length))) for i in range(begin, begin + 3000, length)]
        source = write_jsonl(folder / f"{begin}.jsonl", documents)
        null = build_tokenizer("NullTokenizer", "6000")
        prefixes += preprocess([source], str(folder / str(begin)), null, progress=False).prefixes
    return prefixes


def test_an_epoch_holds_every_token_once(numbers: list[str], tmp_path: Path) -> None:
    per_epoch = (3000 - 1) // SEQ
    dataset = train(settings(numbers[0], split="1,0,0", cache=tmp_path), 2 * per_epoch)
    assert len(dataset) == 2 * per_epoch
    epochs = [[dataset[i] for i in range(e * per_epoch, (e + 1) * per_epoch)] for e in range(2)]
    for epoch in epochs:
        tokens = torch.cat([item["tokens"] for item in epoch])
        assert len(tokens.unique()) == len(tokens) == per_epoch * SEQ
        assert all(torch.equal(item["tokens"][1:], item["labels"][:-1]) for item in epoch)
    first, second = ([item["tokens"].tolist() for item in epoch] for epoch in epochs)
    assert first != second, "each epoch has an order of its own"
    assert first != sorted(first)


@pytest.mark.parametrize("blended", [False, True])
def test_order_depends_on_seed_but_not_on_length_or_cache(blended: bool, numbers: list[str], tmp_path: Path) -> None:
    paths = ("0.3", numbers[0], "0.7", numbers[1]) if blended else (numbers[0],)
    short = train(settings(*paths, cache=tmp_path / "a"), 50)
    long = train(settings(*paths, cache=tmp_path / "b"), 700)
    cached = train(settings(*paths, cache=tmp_path / "b"), 700)
    other = train(settings(*paths, cache=tmp_path / "b", seed=2), 700)
    assert [sample(short, i) for i in range(50)] == [sample(long, i) for i in range(50)]
    assert [sample(cached, i) for i in range(700)] == [sample(long, i) for i in range(700)]
    assert [sample(other, i) for i in range(50)] != [sample(long, i) for i in range(50)]


def test_splits_are_disjoint_and_unwanted_ones_absent(numbers: list[str], tmp_path: Path) -> None:
    config = settings(numbers[0], split="80,20,0", cache=tmp_path)
    training, validation, test = build_datasets(config, None, (75, 18, 0))
    assert test is None
    seen = [{token for i in range(len(d)) for token in sample(d, i)} for d in (training, validation)]
    assert max(seen[0]) < 2400 <= min(seen[1])


def test_blend_follows_weights(numbers: list[str], tmp_path: Path) -> None:
    dataset = train(settings("30", numbers[0], "10", numbers[1], cache=tmp_path), 200)
    origin = [sample(dataset, i)[0] >= 3000 for i in range(200)]
    assert sum(origin) == 50
    assert all(sum(origin[i : i + 20]) in (4, 5, 6) for i in range(0, 200, 20)), "mixed everywhere"


def test_prefixes_without_weights_blend_by_tokens(numbers: list[str], corpus: str, tmp_path: Path) -> None:
    dataset = train(settings(numbers[0], numbers[0], numbers[1], cache=tmp_path), 90)
    assert sum(sample(dataset, i)[0] >= 3000 for i in range(90)) == 30


def test_splits_have_corpora_of_their_own(numbers: list[str], tmp_path: Path) -> None:
    """By flags or files, the same samples; each corpus whole, and trained on as it would be with `--data-path`."""
    blend = ("0.25", numbers[0], "0.75", numbers[1])
    flags = {"train_data_path": (numbers[1],), "valid_data_path": blend, "test_data_path": (numbers[0],)}
    (tmp_path / "parts.json").write_text(
        json.dumps({"train": [numbers[1]], "valid": " ".join(blend), "test": numbers[0]})
    )
    (tmp_path / "words").write_text("\n".join(blend))
    by_flags = build_datasets(settings(cache=tmp_path, **flags), None, (90, 40, 7))
    by_file = build_datasets(settings(per_split_data_args_path=str(tmp_path / "parts.json")), None, (90, 40, 7))
    for one, other, count in zip(by_flags, by_file, (90, 40, 7), strict=True):
        assert [sample(one, i) for i in range(count)] == [sample(other, i) for i in range(count)]
    cut = train(settings(numbers[1], split="1,0,0", cache=tmp_path), 90)
    assert [sample(by_flags[0], i) for i in range(90)] == [sample(cut, i) for i in range(90)]
    origin = [sample(by_flags[1], i)[0] >= 3000 for i in range(40)]
    assert sum(origin) == 30
    assert [by_flags[1][i]["dataset_id"] for i in range(40)] == origin
    in_file = train(settings(data_args_path=str(tmp_path / "words"), split="1,0,0", cache=tmp_path), 40)
    named = train(settings(*blend, split="1,0,0", cache=tmp_path), 40)
    assert [sample(in_file, i) for i in range(40)] == [sample(named, i) for i in range(40)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_the_split_that_is_suggested_works(count: int, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [f"{i} {i}" for i in range(count)])
    null = build_tokenizer("NullTokenizer", "99")
    (prefix,) = preprocess([source], str(tmp_path / "s"), null, progress=False).prefixes
    for name, wanted in (("validation", (1, 1, 0)), ("test", (1, 1, 1))):
        with pytest.raises(ValueError, match=f"no tokens for {name} in .* has {count} document") as error:
            build_datasets(settings(prefix, split="1,0,0"), None, (0, name == "validation", name == "test"))
        if match := re.search(r"use --split (\S+), more data, or --eval-iters 0", str(error.value)):
            assert None not in build_datasets(settings(prefix, split=match[1]), None, wanted)[: sum(wanted)]
        else:
            assert "give it a corpus of its own" in str(error.value)
            assert count < (2 if name == "validation" else 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r'must be a JSON object {"train"'),
        ('{"training": []}', r'must be a JSON object {"train"'),
        ('{"train": 3}', "each split must be a list of prefixes"),
        ('{"train": "0.5 a b"}', r"train of per-split-data-args-path=.*: 0\.5 a b must be weight prefix"),
        ('{"train": ', r"is not valid JSON \(line 1"),
        ('{"valid": "a"}', "train in per-split-data-args-path=.* is missing"),
    ],
)
def test_wrong_files_of_data_arguments(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        train(settings(per_split_data_args_path=str(tmp_path / "parts.json")), 1)


def test_corpora_have_short_distinct_names() -> None:
    names = lambda *paths: Blend(paths, None).names()  # noqa: E731
    assert names("a/wiki", "b/books") == ["wiki", "books"]
    assert names("x/wiki/text", "x/books/text", "y/wiki/news") == ["wiki/text", "books/text", "wiki/news"]
    assert len(set(names("a", "a"))) == 2


def test_a_corpus_that_is_read_several_times_is_named(numbers: list[str], tmp_path: Path) -> None:
    split = {"split": "97,3,0", "cache": tmp_path}  # 90 samples of 32 tokens in 97 of 100 documents of 30
    once, often, always = (train(settings(numbers[0], **split), count) for count in (90, 300, 90 * 1200))
    blend = train(settings("0.2", numbers[0], "0.8", numbers[1], **split), 360)
    assert (repetitions(once), repetitions(often)) == ([], [f"{numbers[0]} 3.33 times"])
    assert repetitions(always) == [f"{numbers[0]} 1,200 times"]
    assert repetitions(blend) == [f"{numbers[1]} 3.22 times"]  # 288 samples and half a percent


def test_changed_corpus_is_indexed_again(numbers: list[str], tmp_path: Path) -> None:
    copy = str(tmp_path / "c")
    contents = []
    for source in numbers:
        for suffix in (".bin", ".idx"):
            shutil.copy(source + suffix, copy + suffix)
        dataset = train(settings(copy, cache=tmp_path / "cache"), 20)
        contents.append({token for i in range(20) for token in sample(dataset, i)})
        del dataset
    assert max(contents[0]) < 3000 <= min(contents[1])


def test_tiny_split_is_repeated_into_a_sample(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", ["1 2 3 4 5", "6 7 8"])
    prefix = preprocess([source], str(tmp_path / "s"), build_tokenizer("NullTokenizer", "9"), progress=False).prefixes[
        0
    ]
    dataset = train(settings(prefix, split="1,0,0"), 5)
    assert {token for i in range(5) for token in sample(dataset, i)} == set(range(1, 9))
    assert all(len(sample(dataset, i)) == SEQ for i in range(5))
    assert (tmp_path / "index-cache").is_dir(), "the default place of the cache"


# Batches -----------------------------------------------------------------------------------------------------------


class Counting(torch.utils.data.Dataset):
    """Sample i is i everywhere."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.full((4,), i), "labels": torch.full((4,), i + 1)}


def ids(batches) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (4, 1), (2, 2), (1, 4), (3, 4), (4, 3)])
def test_ranks_and_micro_batches_cover_each_global_batch(size: int, ranks: int) -> None:
    dealt = [ids(build_batches(Counting(60), 0, size, rank, ranks, 12)) for rank in range(ranks)]
    per_iteration = 12 // (size * ranks)
    for iteration in range(5):
        steps = slice(iteration * per_iteration, (iteration + 1) * per_iteration)
        union = sorted(i for rank in dealt for micro_batch in rank[steps] for i in micro_batch)
        assert union == list(range(12 * iteration, 12 * (iteration + 1)))


def test_resuming_continues(numbers: list[str], tmp_path: Path) -> None:
    dataset = train(settings(numbers[0], cache=tmp_path), 96)
    whole = list(build_batches(dataset, 0, 2, 1, 2, 8))
    resumed = list(build_batches(dataset, 40, 2, 1, 2, 8))
    assert len(resumed) == (len(dataset) - 40) // 4 > 5
    for a, b in zip(whole[10:], resumed, strict=True):
        assert torch.equal(a.tokens, b.tokens)


def test_loader_processes_and_global_random_state(numbers: list[str], tmp_path: Path) -> None:
    dataset = train(settings(numbers[0], cache=tmp_path), 32)
    state = torch.get_rng_state()
    batches = [list(build_batches(dataset, 0, 4, 0, 1, 4, DataConfig(num_workers=n))) for n in (0, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(batches[0]) == ids(batches[1])


def test_batch_without_options() -> None:
    batch = next(iter(build_batches(Counting(4), 0, 2, 0, 1, 2)))
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.loss_mask is None
    assert batch.position_ids is batch.document_ids is None


def test_documents_positions_and_loss_mask() -> None:
    eod = 9
    tokens = torch.tensor([[5, 6, 9, 7, 9, 9, 8], [9, 1, 2, 3, 4, 5, 9]])
    samples = [{"tokens": row, "labels": row} for row in tokens]
    options = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    batch = make_batch(samples, options, eod)
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 0]]


def test_document_ids_agree_with_megatron_masks() -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    torch.manual_seed(0)
    tokens = torch.randint(0, 6, (3, 40))
    options = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    batch = make_batch([{"tokens": row, "labels": row} for row in tokens], options, 0)
    for row in range(3):
        mask, loss_mask, positions = _get_ltor_masks_and_position_ids(tokens[row], 0, True, True, True, True)
        same = batch.document_ids[row][:, None] == batch.document_ids[row][None]
        assert torch.equal(~mask[0], same.tril())
        assert torch.equal(batch.loss_mask[row], loss_mask)
        assert torch.equal(batch.position_ids[row], positions)


def test_real_corpus_with_document_masking(corpus: str, tokenizer, tmp_path: Path) -> None:
    config = settings(corpus, cache=tmp_path, reset_attention_mask=True)
    dataset = train(config, 200, tokenizer)
    batches = list(build_batches(dataset, 0, 4, 0, 1, 4, config.data, tokenizer.eod))
    assert max(batch.document_ids.max() for batch in batches) > 0
    for batch in itertools.islice(batches, 20):
        grows = batch.document_ids.diff(dim=1) == 1
        assert torch.equal(grows, batch.tokens[:, :-1] == tokenizer.eod)


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [
        ({"data_path": ()}, (1, 0, 0), "data-path is empty"),
        ({"data_path": ("absent",)}, (1, 0, 0), "absent.idx does not exist"),
        ({"split": "1;2"}, (1, 0, 0), "split='1;2' is not a division"),
        ({"split": "0,0,0"}, (1, 0, 0), "split='0,0,0' is not a division"),
        ({"split": "1,2,3,4"}, (1, 0, 0), "use up to three numbers"),
        ({"split": "99,1,0"}, (1, 1, 1), "no tokens for test in .*100 documents: use --split 98,1,1, .*--eval-iters 0"),
        ({"split": "999,1,0"}, (1, 1, 0), "no tokens for validation in .*100 documents: use --split 99,1,0, more data"),
        ({"data_args_path": "absent"}, (1, 0, 0), r"data-args-path=absent cannot be read \(No such file"),
        ({"valid_data_path": ("x",)}, (1, 1, 0), "train-data-path is missing, and training has no other data"),
        ({"train_data_path": ("x",)}, (1, 1, 0), "valid-data-path is missing, and validation has .*or --eval-iters 0"),
        ({"data_cache_path": "/dev/null/x"}, (1, 0, 0), "/dev/null/x cannot be written"),
        ({"reset_position_ids": True}, (1, 0, 0), "data made with --append-eod"),
    ],
)
def test_wrong_settings(change: dict, count, message: str, numbers: list[str], tmp_path: Path) -> None:
    config = settings(numbers[0], cache=tmp_path)
    config = replace(config, data=replace(config.data, **change))
    with pytest.raises(ValueError, match=message):
        build_datasets(config, build_tokenizer("NullTokenizer", "6000"), count)


def test_another_tokenizers_data(numbers: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has token 100 at byte 200, outside the vocabulary of 100"):
        train(settings(numbers[0], cache=tmp_path), 1, build_tokenizer("NullTokenizer", "99"))


def test_damaged_corpus(corpus: str, tmp_path: Path) -> None:
    shutil.copy(f"{corpus}.idx", tmp_path / "c.idx")
    (tmp_path / "c.bin").write_bytes(Path(f"{corpus}.bin").read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"c\.bin ends at byte \d+, but according to .*c\.idx its last sequence ends at byte"
    ):
        train(settings(str(tmp_path / "c")), 1)


@pytest.mark.parametrize("path", [("1", "a", "b"), ("a", "1", "b", "2"), ("1", "a", "0", "b"), ("1", "a", "nan", "b")])
def test_wrong_blend(path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="data-path="):
        parse_blend(path)


def test_batch_sizes_must_divide() -> None:
    with pytest.raises(ValueError, match=r"global-batch-size=10 .* 2 x 3: use 12"):
        build_batches(Counting(60), 0, 2, 0, 3, 10)
    with pytest.raises(ValueError, match="end-of-document token"):
        build_batches(Counting(60), 0, 2, 0, 1, 2, DataConfig(eod_mask_loss=True))


# Several ranks -----------------------------------------------------------------------------------------------------


def build_on_rank(rank: int, config: Config, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    training, validation, _ = build_datasets(config, None, (40, 10, 0))
    batches = list(build_batches(training, 0, 2, rank, 2, 8))
    np.save(folder / f"{rank}.npy", np.array(ids(batches)))
    validated = [sample(validation, i) for i in range(10)]
    torch.distributed.barrier()  # now neither builds an index any more
    files = sorted((str(p), p.stat().st_ino) for p in Path(config.data.data_cache_path).rglob("*.npy"))
    (folder / f"{rank}.txt").write_text(repr((files, validated)))
    torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.mark.parametrize("blended", [False, True])
def test_two_ranks_share_the_index(blended: bool, numbers: list[str], tmp_path: Path) -> None:
    paths = ("0.5", numbers[0], "0.5", numbers[1]) if blended else (numbers[0],)
    config = settings(*paths, split="80,20,0", cache=tmp_path / "cache")
    processes = [fork_context().Process(target=build_on_rank, args=(rank, config, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text(), "one index, built once"
    alone = build_datasets(replace(config, data=replace(config.data, data_cache_path=None)), None, (40, 10, 0))[0]
    dealt = np.concatenate([np.load(tmp_path / f"{rank}.npy").reshape(-1, 1, 2) for rank in range(2)], axis=1)
    assert dealt.reshape(-1).tolist()[:40] == [sample(alone, i)[0] for i in range(40)]


def test_a_sample_far_away_needs_its_own_epoch_only(numbers: list[str], tmp_path: Path) -> None:
    """Nothing is indexed before a sample is read, and samples of every epoch are those of a run that began at 0."""
    config = settings(numbers[0], cache=tmp_path)
    dataset = train(config, 10**9)
    indexes = lambda: [path for path in tmp_path.iterdir() if path.is_dir()]  # noqa: E731
    assert not indexes()
    assert len(dataset) >= 10**9
    far = [sample(dataset, 10**9 - 1 - i) for i in range(3)]
    assert len(indexes()) == 1
    assert far == [
        sample(train(settings(numbers[0], cache=tmp_path / "other"), 10**9), 10**9 - 1 - i) for i in range(3)
    ]
    in_turn = [sample(dataset, i) for i in range(300)]
    assert in_turn == [sample(train(config, 300), i) for i in range(300)]
    assert not list(tmp_path.glob("*.lock"))


def test_mapped_tokens_are_those_of_the_index(numbers: list[str]) -> None:
    assert read_tokens(numbers[0], read_index(numbers[0])).tolist() == list(range(3000))
