"""What --input can name, and where the text of a record can be."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from corpora import write_jsonl

from mor_megatron.data.planning import plan, survey
from mor_megatron.data.sources import Document, read


def texts(*inputs: object, keys: tuple[str, ...] = ("text",), workers: int = 1) -> list[str]:
    items = [item for part in plan(list(map(str, inputs)), keys, workers) for item in read(part)]
    assert all(isinstance(item, Document) for item in items), items
    return [item.texts[0] for item in items]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records in two directories, and what lies about beside them."""
    for name in ("b.JSONL", "a.jsonl", "deep/c.json", "_tmp.jsonl", ".git/d.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "in" / name, [name])
    for name in ("README.md", "x.csv"):
        (tmp_path / "in" / name).write_text("no data")
    return tmp_path / "in"


def test_a_directory_is_its_files_in_order_and_tells_what_it_leaves_out(folder: Path, caplog) -> None:
    (folder / "o_text_document.tokenizer.json").write_text("{}")
    assert texts(folder) == ["a.jsonl", "b.JSONL", "deep/c.json"]
    (message,) = caplog.messages
    left_out = [".git/d.jsonl", "README.md", "_tmp.jsonl", "o_text_document.tokenizer.json", "x.csv"]
    assert message == f"{folder}: 3 files used, 5 skipped: {', '.join(left_out)}"


def test_a_directory_of_plain_text(tmp_path: Path, caplog) -> None:
    for name in ("b.TXT", "a.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.md", "b.TXT"]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("?.json*", ["a.jsonl"]),
        ("*.[jJ]*", ["_tmp.jsonl", "a.jsonl", "b.JSONL"]),
        ("**/*.json", ["deep/c.json"]),
        ("d*", ["deep/c.json"]),
    ],
)
def test_patterns(pattern: str, found: list[str], folder: Path) -> None:
    assert texts(folder / pattern) == found
    with pytest.raises(ValueError, match=r"input=\S+/nothing\* matches no file"):
        survey([str(folder / "nothing*")])


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    assert texts(write_jsonl(tmp_path / "part[1].jsonl", ["x"])) == ["x"]


def test_standard_input_is_read_by_several_workers_and_named_once(monkeypatch, tmp_path: Path) -> None:
    content = Path(write_jsonl(tmp_path / "a.jsonl", ["x" * 300_000, "y" * 300_000, "z"])).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    after = write_jsonl(tmp_path / "b.jsonl", ["after"])
    assert [text[:5] for text in texts("-", after, workers=2)] == ["xxxxx", "yyyyy", "z", "after"]
    with pytest.raises(ValueError, match="input=- stands for standard input, which can be read once"):
        survey(["-", "-"])


def write_nested(path: Path, records: list[dict]) -> str:
    import datasets
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["n.jsonl", "n.parquet", "dataset"])
def test_nested_keys(name: str, tmp_path: Path) -> None:
    records = [{"id": i, "meta": {"url": "u", "page": {"text": f"text {i}"}}} for i in range(3)]
    source = write_nested(tmp_path / name, records)
    assert texts(source, keys=("meta.page.text",)) == ["text 0", "text 1", "text 2"]
    if name == "n.jsonl":
        (broken, *_) = (item for part in plan([source], ("meta.body",)) for item in read(part))
        assert broken.reason == "no key 'meta.body'; the keys are 'id', 'meta.url', 'meta.page'"
    else:
        with pytest.raises(ValueError, match=r"meta.body is not in \S+: it has id, meta.url, meta.page"):
            plan([source], ("meta.body",))


def test_a_key_with_a_dot_in_its_name_comes_first(tmp_path: Path) -> None:
    source = write_nested(tmp_path / "d.jsonl", [{"meta.text": "named", "meta": {"text": "nested"}}])
    assert texts(source, keys=("meta.text",)) == ["named"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('[{"text": "a"}, {"text": "b"}]', "a JSON array"),
        ('[\n{"text": "a"},\n{"text": "b"}\n]', "a JSON array"),
        ('\ufeff [ {\n "text": "a"}]', "a JSON array"),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', "JSON over several lines"),
    ],
)
def test_json_that_is_not_in_lines_is_named_as_such(content: str, what: str, tmp_path: Path) -> None:
    """The last line of the second one is a sound record, and would be the whole corpus."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a.json is {what}, not JSON lines.*`jq -c \.(\[\])? \S+a.json`"):
        plan([str(tmp_path / "a.json")])
