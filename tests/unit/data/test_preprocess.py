"""Preprocessing: every source gives the same corpus for any number of workers, or a clear error and no output."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from corpora import SOURCES, both_files, write_jsonl, write_parquet
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from mor_megatron.data.planning import plan
from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.sources import Broken, Document, read
from mor_megatron.data.tokenizers import build_tokenizer


def run(inputs, prefix, tokenizer, **options):
    return preprocess(
        [str(i) for i in inputs], str(prefix), tokenizer, progress=False, **{"append_eod": True, **options}
    )


def test_files_are_those_of_megatron(corpus: str, texts: list[str], tokenizer, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for text in texts:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    assert both_files(corpus) == both_files(str(tmp_path / "m"))
    dataset = IndexedDataset(corpus)
    assert [tokenizer.detokenize(dataset[i][:-1]) for i in range(len(dataset))] == texts


def test_large_vocabulary_is_int32(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "ids.jsonl", ["70000 1", "2"])
    report = run([source], tmp_path / "o", build_tokenizer("NullTokenizer", "70001"))
    dataset = IndexedDataset(report.prefixes[0])
    assert dataset.index.dtype is np.int32
    assert dataset[0].tolist() == [70000, 1, 70001]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_corpus(source: str, corpus: str, texts, tokenizer, tmp_path: Path) -> None:
    report = run(SOURCES[source](tmp_path, texts), tmp_path / "o", tokenizer)
    assert both_files(report.prefixes[0]) == both_files(corpus)
    assert (report.documents, report.broken_count) == (len(texts), 0)


@pytest.fixture(scope="module")
def large(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """5 MB: several parts."""
    return write_jsonl(tmp_path_factory.mktemp("large") / "large.jsonl", texts * 45)


@pytest.mark.parametrize("compressed", [False, True])
def test_workers_do_not_change_the_corpus(compressed: bool, large: str, tokenizer, tmp_path: Path) -> None:
    source = Path(large)
    if compressed:
        source = tmp_path / "large.jsonl.gz"
        source.write_bytes(gzip.compress(Path(large).read_bytes(), 1))
        assert len(plan([str(source)], workers=2)) == 2, "one compressed file is shared, too"
    outputs = [run([source], tmp_path / f"w{workers}", tokenizer, workers=workers) for workers in (1, 2)]
    assert both_files(outputs[0].prefixes[0]) == both_files(outputs[1].prefixes[0])
    assert outputs[0].tokens == outputs[1].tokens > 10**6


def test_ranges_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Cuts at every byte, in particular at and around newlines; the last line has no newline."""
    path = tmp_path / "small.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "bcd"}\r\n{"text": "é"}')
    (whole,) = plan([str(path)])
    expected = [item.texts for item in read(whole)]
    assert expected == [("a",), ("bcd",), ("é",)]
    for cut in range(path.stat().st_size + 1):
        halves = [type(whole)(str(path), "jsonl", ("text",), 0, a, b) for a, b in ((0, cut), (cut, whole.stop))]
        assert [item.texts for half in halves for item in read(half)] == expected, f"cut at byte {cut}"


def test_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\nstill one\n\n\ntwo\n \nthree\n")
    slices = plan([str(path)], paragraphs=True)
    assert [item.texts[0] for part in slices for item in read(part)] == ["one\nstill one", "two", "three\n"]
    assert [item.texts[0] for part in plan([str(path)]) for item in read(part)] == [path.read_text()]


def test_several_keys_and_no_eod(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"a": "1 2", "b": "3"}\n{"b": "5 6", "a": "4"}\n')
    report = run([path], tmp_path / "o", build_tokenizer("NullTokenizer", "9"), keys=("a", "b"), append_eod=False)
    assert [Path(p).name for p in report.prefixes] == ["o_a_document", "o_b_document"]
    first, second = map(IndexedDataset, report.prefixes)
    assert [first[i].tolist() for i in (0, 1)] == [[1, 2], [4]]
    assert [second[i].tolist() for i in (0, 1)] == [[3], [5, 6]]


BROKEN_LINES = {
    '{"text": "cut': "not JSON",
    "[1]": "not a JSON object but list",
    '{"content": "x", "id": 1}': "no key 'text'; the keys are 'content', 'id'",
    '{"text": null}': "'text' holds NoneType, not text",
    '{"text": "\\ud800"}': "half a surrogate pair",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_lines_are_named_counted_and_skipped(workers: int, tokenizer, tmp_path: Path) -> None:
    good = json.dumps({"text": "good " * 400})
    path = tmp_path / "mixed.jsonl"
    # Beyond the first megabyte, so that the line numbers must be right across ranges.
    lines = [good] * 1000 + ["", *BROKEN_LINES] + [good] * 10
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n{"text": ""}\n')
    report = run([path], tmp_path / "o", tokenizer, workers=workers)
    assert (report.documents, report.broken_count, report.empty) == (1010, len(BROKEN_LINES) + 1, 1)
    for number, (line, reason) in enumerate([*BROKEN_LINES.items(), ("", "not JSON")]):
        place = 1002 + number if line else 1000 + 1 + len(BROKEN_LINES) + 10 + 1
        assert report.broken[number].startswith(f"{path}:{place}: ")
        assert reason in report.broken[number]
    with pytest.raises(ValueError, match=f"{path}:1002: not JSON.*strict"):
        run([path], tmp_path / "strict", tokenizer, workers=workers, strict=True)
    assert not list(tmp_path.glob("strict*"))


def test_broken_rows_and_files_are_named(tokenizer, tmp_path: Path) -> None:
    row = write_parquet(tmp_path / "r.parquet", ["a"] * 10 + [None])
    (tmp_path / "f.txt").write_bytes(b"ab\xff")
    report = run([row, tmp_path / "f.txt"], tmp_path / "o", tokenizer)
    assert report.broken == [
        f"{row}, row 10: 'text' holds NoneType, not text",
        f"{tmp_path}/f.txt: not UTF-8 at byte 2",
    ]


def make_inputs(folder: Path) -> None:
    good = '{"text": "x", "id": 1}\n'
    files = {"good.jsonl": good, "empty.jsonl": "", "blank.jsonl": "\n\n", "x.csv": "a,b", "plain": "x", "a.txt": "x"}
    for name, content in {**files, "array.json": "[\n{}\n]", "bad.parquet": "PAR?"}.items():
        (folder / name).write_text(content)
    noise = np.random.RandomState(0).bytes(20000).hex()
    whole = json.dumps({"text": noise}) + "\n" + good
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(whole.encode())[:-9])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.compress(whole.encode())[:-9])
    (folder / "folder").mkdir()
    write_parquet(folder / "good.parquet", ["x"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("absent.jsonl", {}, "absent.jsonl does not exist"),
        ("empty.jsonl", {}, "gave no document"),
        ("blank.jsonl", {}, "gave no document"),
        ("x.csv", {}, "unknown format .csv. Supported: JSON lines"),
        ("plain", {}, "unknown format without extension"),
        ("array.json", {}, "is a JSON array, not JSON lines.*`jq -c .\\[\\] .*array.json`"),
        ("bad.parquet", {}, "is not a parquet file"),
        ("cut.jsonl.gz", {}, "cut.jsonl.gz cannot be read"),
        ("cut.jsonl.zst", {}, "cut.jsonl.zst cannot be read"),
        ("folder", {}, "is a directory without a file of a known format"),
        ("good.jsonl", {"keys": ("body",)}, "no key 'body'; the keys are 'text', 'id'. Check the key"),
        ("good.parquet", {"keys": ("body",)}, "json-keys=body is not in .*it has text, id"),
        ("a.txt", {"keys": ("body",)}, "json-keys=body is not in .*it has text"),
        ("good.jsonl", {"workers": 0}, "workers=0"),
    ],
)
def test_wrong_input_is_one_clear_error(name: str, options: dict, message: str, tokenizer, tmp_path: Path) -> None:
    make_inputs(tmp_path)
    with pytest.raises(ValueError, match=message):
        run([tmp_path / name], tmp_path / "out" / "o", tokenizer, **options)
    assert not list(tmp_path.glob("out/*"))


def test_dataset_with_splits_asks_for_one(tokenizer, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    split = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": split, "dev": split}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=f"give one of {tmp_path}/d/train, {tmp_path}/d/dev"):
        run([tmp_path / "d"], tmp_path / "o", tokenizer)
    assert run([tmp_path / "d" / "train"], tmp_path / "o", tokenizer).documents == 1


def test_id_beyond_the_vocabulary(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "ids.jsonl", ["1 2", "300"])
    with pytest.raises(ValueError, match="token 300 is outside the vocabulary of 11"):
        run([source], tmp_path / "o", build_tokenizer("NullTokenizer", "10"))


def in_child(function, *args) -> multiprocessing.Process:
    """A process that may be killed or limited; forked, because importing torch again takes seconds."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    return child


def write_without_space(source: str, prefix: Path, tokenizer, limit: int) -> None:
    # A file-size limit fails in write() as a full disk does, only with another number.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run([source], prefix, tokenizer)
    except ValueError as error:
        os._exit(7 if "cannot be written" in str(error) and "free space" in str(error) else 8)
    os._exit(9)


@pytest.mark.parametrize("limit", [100_000, 1_500_000], ids=["in a worker", "while merging"])
def test_no_space(limit: int, large: str, tokenizer, tmp_path: Path) -> None:
    child = in_child(write_without_space, large, tmp_path / "o", tokenizer, limit)
    child.join(120)
    assert child.exitcode == 7
    assert not list(tmp_path.iterdir())


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Not so for a zombie: some containers have nobody who reaps orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_finished(
    how: int, large: str, sentencepiece_model: str, tmp_path: Path
) -> None:
    """Also one in the background, where the shell has it ignore SIGINT."""

    def start() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {sentencepiece_model}"
        sys.argv = f"tool --output-prefix {tmp_path}/o --workers 2 {tokenizer} --no-progress --input".split()
        sys.argv += [large] * 5
        runpy.run_path(str(Path(__file__).parents[3] / "tools" / "preprocess_data.py"), run_name="__main__")

    child = in_child(start)
    wait_for(lambda: any(p.stat().st_size for p in tmp_path.rglob("corpus0.bin.partial")))
    workers = children(child.pid)
    assert len(workers) == 2
    os.kill(child.pid, how)
    child.join(60)
    assert child.exitcode != 0
    assert not list(tmp_path.rglob("*.idx"))
    assert not list(tmp_path.rglob("*.bin"))
    if how == signal.SIGTERM:
        assert child.exitcode == 130
        assert not list(tmp_path.iterdir()), "an interrupt cleans up; only a kill cannot"
    wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_killed_worker_is_an_error(large: str, tokenizer, tmp_path: Path) -> None:
    def start() -> None:
        try:
            run([large] * 5, tmp_path / "o", tokenizer, workers=2)
        except ValueError as error:
            os._exit(7 if "a worker process was killed" in str(error) else 8)

    child = in_child(start)
    wait_for(lambda: any(p.stat().st_size for p in tmp_path.rglob("corpus0.bin.partial")))
    os.kill(children(child.pid)[0], signal.SIGKILL)
    child.join(60)
    assert child.exitcode == 7
    assert not list(tmp_path.iterdir())


def test_rerun_replaces_and_failed_rerun_keeps(texts, tokenizer, tmp_path: Path) -> None:
    first = run([write_jsonl(tmp_path / "1.jsonl", texts)], tmp_path / "o", tokenizer).prefixes[0]
    before = both_files(first)
    broken = tmp_path / "2.jsonl"
    broken.write_text('{"text": "x"}\nbroken\n')
    with pytest.raises(ValueError, match="strict"):
        run([broken], tmp_path / "o", tokenizer, strict=True)
    assert both_files(first) == before
    run([write_jsonl(tmp_path / "3.jsonl", texts[:3])], tmp_path / "o", tokenizer)
    assert len(IndexedDataset(first)) == 3


def test_reader_yields_documents_and_broken_in_order(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"text": "a"}\nx\n{"text": "b"}\n')
    assert [type(item) for part in plan([str(path)]) for item in read(part)] == [Document, Broken, Document]
