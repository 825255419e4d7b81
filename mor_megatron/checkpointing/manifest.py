"""The manifest: what a checkpoint consists of, written last, and the only thing that makes a directory a checkpoint.

It lists every file with size and checksum, and carries a checksum of itself, so that damage anywhere is noticed. It is
no protection against someone who forges both.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from mor_megatron.checkpointing.shards import STEP, ShardEntry, Sharding
from mor_megatron.checkpointing.stored_file import StoredFile, checksum_of
from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate_model
from mor_megatron.training.progress import Progress

FORMAT = "mor-megatron checkpoint 2"
MANIFEST, CONFIG, KEPT_TOKENIZER = "manifest.json", "config.yaml", "tokenizer"


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its tensors."""

    progress: dict[str, int | float | None]
    """Fields of `Progress`."""
    model: dict[str, Any]
    """What decides which parameters there are: `model_shape`."""
    layout: dict[str, Any]
    """How the run that wrote it was divided; for people, since any layout can read it."""
    optimizer: str
    versions: dict[str, str]
    loss_scaler: dict[str, float] | None
    """fp16 only."""
    random: dict[str, Any]
    """`random_state()`."""
    parameters: dict[str, Sharding]
    """Of the whole model, buffers included, and how the writer divided them."""
    files: dict[str, StoredFile]
    tokenizer: dict[str, Any] | None = None
    """`KeptTokenizer.entry`; None: the run had none, or was of an older version."""
    corpora: dict[str, int] | None = None
    """`corpus_sizes`; None: not known."""
    data_arguments: str | None = None
    """Of the function of this name; None: no file, or not known."""

    @property
    def iteration(self) -> int:
        return self.progress["iteration"]

    def to_json(self) -> str:
        """Text that `parse` turns back into an equal manifest."""
        files = {
            name: {"size": file.size, "checksum": file.checksum, "pieces": file.entries}
            for name, file in self.files.items()
        }
        content = {"format": FORMAT, **asdict(self), "files": files}
        return json.dumps({**content, "checksum": self_checksum(content)}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, whole and undamaged; its files are not looked at.

    Raises:
        ValueError: there is none, it is damaged, or of another format; names the file, and the field at fault.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): the checkpoint is not complete") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged at byte {error.start}: it is no UTF-8 text") from error
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from error


def read_settings(directory: Path, manifest: Manifest) -> Config:
    """Settings of the run that wrote a checkpoint, those of its model resolved; what ranks it had does not matter.

    Raises:
        ValueError: they are those of another version.
    """
    config = validate_model(read_config(["--config", str(directory / CONFIG)]))
    return replace(config, model=replace(config.model, vocab_size=manifest.model["vocab-size"]))


def parse(text: str) -> Manifest:
    """Raises ValueError that names the field at fault."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is no JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content.get("format") != FORMAT:
        raise ValueError(f"format is {content.get('format')!r:.80}, and this version reads {FORMAT!r}")
    stated = content.pop("checksum", None)
    if stated != self_checksum(content):
        raise ValueError("its content does not have the checksum that it states")
    del content["format"]
    for field in fields(Manifest):
        if field.default is not MISSING:  # older checkpoints lack it
            content.setdefault(field.name, field.default)
    _expect(set(content) == {field.name for field in fields(Manifest)}, "its fields")
    for name in ("progress", "model", "layout", "versions", "random", "parameters", "files"):
        _expect(isinstance(content[name], dict), name)
    _expect(isinstance(content["optimizer"], str), "optimizer")
    _expect(set(content["progress"]) == {field.name for field in fields(Progress)}, "progress")
    average = content["progress"]["loss_average"]
    _expect(average is None or (_number(average) and math.isfinite(average)), "progress")
    _expect(all(_whole(n) for name, n in content["progress"].items() if name != "loss_average"), "progress")
    scaler = content["loss_scaler"]
    _expect(scaler is None or (isinstance(scaler, dict) and all(map(_number, scaler.values()))), "loss_scaler")
    _expect(content["tokenizer"] is None or _is_tokenizer(content["tokenizer"]), "tokenizer")
    corpora = content["corpora"]
    _expect(corpora is None or (isinstance(corpora, dict) and all(map(_whole, corpora.values()))), "corpora")
    _expect(content["data_arguments"] is None or isinstance(content["data_arguments"], str), "data_arguments")
    content["parameters"] = {name: _sharding(name, entry) for name, entry in content["parameters"].items()}
    content["files"] = {name: _file(name, entry) for name, entry in content["files"].items()}
    return Manifest(**content)


def damage(directory: Path, manifest: Manifest, names: list[str], contents: bool = True) -> str | None:
    """What is wrong with some of a checkpoint's files, in words; None if nothing is.

    Args:
        names: which of `manifest.files`.
        contents: read them and compare checksums, not just sizes.
    """
    for name in names:
        path, stored = directory / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != stored.size:
                return f"{path} has {size} bytes instead of {stored.size}"
            if contents and checksum_of(path) != stored.checksum:
                return f"{path} does not have the content it was written with: its checksum differs"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def self_checksum(content: dict[str, Any]) -> str:
    """XXH3 of a manifest without its `checksum`, as sorted, compact JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what:.200} is not as it should be")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_tokenizer(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"type", "model", "origin", "behaviour"}
        and all(isinstance(entry[name], str) for name in ("type", "model", "origin"))
        and isinstance(entry["behaviour"], dict)
        and (entry["model"].isdecimal() or _is_inside(entry["model"]))
    )


def _is_inside(name: str) -> bool:
    """Whether it names something in the checkpoint's directory, and no other place."""
    path = PurePosixPath(name)
    below = len(path.parts) == 1 or path.parts[0] == KEPT_TOKENIZER
    return str(path) == name and below and not path.is_absolute() and ".." not in path.parts and name != "."


def _sharding(name: str, entry: Any) -> Sharding:
    what = f"parameters: {name}"
    _expect(isinstance(entry, dict) and set(entry) == {field.name for field in fields(Sharding)}, what)
    shape, dim, stride, size, rows = (entry[field.name] for field in fields(Sharding))
    _expect(isinstance(shape, list) and len(shape) > 0 and all(_whole(n) and n > 0 for n in shape), what)
    _expect(_whole(stride) and _whole(size) and stride > 0 and size > 0, what)
    _expect(dim is None or (_whole(dim) and dim < len(shape) and shape[dim] % (stride * size) == 0), what)
    _expect(rows is None or (_whole(rows) and rows <= shape[0]), what)
    return Sharding(tuple(shape), dim, stride, size, rows)


def _file(name: str, entry: Any) -> StoredFile:
    what = f"files: {name}"
    _expect(isinstance(entry, dict) and set(entry) == {"size", "checksum", "pieces"}, what)
    _expect(_is_inside(name), what)
    size, checksum, entries = entry["size"], entry["checksum"], entry["pieces"]
    _expect(_whole(size) and isinstance(checksum, str), what)
    _expect(isinstance(entries, list) and all(isinstance(key, str) for key in entries), what)
    for key in entries:
        try:
            parsed = ShardEntry.parse(key)
        except ValueError as error:
            raise ValueError(f"{what}: {key!r:.80} is no name of a shard entry") from error
        _expect(parsed.kind != STEP or parsed.offset == 0, f"{what}: {key}")
    return StoredFile(size, checksum, tuple(entries))
