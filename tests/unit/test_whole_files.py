"""Files are written completely or not at all, and failures are reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from full_disk import room_for

from mor_megatron.command import exit_status
from mor_megatron.config.cli import save_config
from mor_megatron.config.schema import Config
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.files import Unfailing, whole_file, write_whole


def test_a_reader_finds_the_old_content_or_all_of_the_new(tmp_path):
    path, link = tmp_path / "report.json", tmp_path / "link"
    link.symlink_to(path)
    write_whole(link, "old")
    with whole_file(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert link.is_symlink()
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(f"half {1 / 0}")
    assert path.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_a_device_is_written_in_place():
    write_whole("/dev/null", "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_whole("/dev/full", "text")


def test_a_log_that_is_lost_is_no_error():
    with open("/dev/full", "w") as file:
        stream = Unfailing(file)
        print("line", file=stream, flush=True)
        print("x" * 100_000, file=stream)
        assert not stream.isatty()
        with pytest.raises(OSError, match="No space left on device"):
            print("line", file=file, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # else closing it fails, too


def train(kind: str, output: Path) -> None:
    texts = [f"the {i * i} elephants of giraffe {i}" for i in range(300)]
    source = output.parent / "texts.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(source)], 400, kind, str(output))


WRITERS = {
    "text": (lambda output: write_whole(output, "x" * 5000), ""),
    "settings": (lambda output: save_config(Config(), output), ""),
    "sentencepiece": (lambda output: train("bpe", output), ".vocab"),
    "tokenizers": (lambda output: train("hf-bpe", output), ""),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_room_is_an_error_and_spoils_nothing(name, tmp_path, capsys):
    write, suffix = WRITERS[name]
    output = tmp_path / "out"
    write(output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with room_for(2000):
        assert exit_status(lambda: write(output)) == 2
    assert capsys.readouterr().err == f"error: {output}{suffix} (File too large)\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
