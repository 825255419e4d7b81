"""The tokenizer in a checkpoint, so that whatever is made of the checkpoint needs no file beside it.

Its files lie in `iter_0000010/tokenizer/` as they were given, and the manifest lists them like all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mor_megatron.checkpointing.compatibility import Difference
from mor_megatron.checkpointing.manifest import KEPT_TOKENIZER, Manifest
from mor_megatron.checkpointing.stored_file import StoredFile, write_bytes
from mor_megatron.config.schema import Change, Config
from mor_megatron.data.fingerprint import Fingerprint, fingerprint
from mor_megatron.data.tokenizers import Tokenizer, build_tokenizer
from mor_megatron.files import flush_directory


@dataclass(frozen=True)
class KeptTokenizer:
    """A run's tokenizer in memory: what becomes of its files during a run is no matter."""

    kind: str
    """`--tokenizer-type`."""
    model: str
    """`--tokenizer-model` in the checkpoint's directory; a number where there are no files."""
    files: dict[str, bytes]
    """Contents by path in the checkpoint's directory."""
    fingerprint: Fingerprint

    @classmethod
    def of(cls, kind: str, tokenizer: Tokenizer) -> KeptTokenizer:
        """Read the files of a tokenizer.

        Args:
            kind: `--tokenizer-type`.
        Raises:
            OSError: they are gone.
        """
        origin, kept = Path(tokenizer.origin), Path(KEPT_TOKENIZER)
        folder, model = (origin, kept) if origin.is_dir() else (origin.parent, kept / origin.name)
        files = {str(kept / file.relative_to(folder)): file.read_bytes() for file in tokenizer.files}
        return cls(kind, str(model) if files else tokenizer.origin, files, fingerprint(tokenizer))

    def write(self, directory: Path) -> dict[str, StoredFile]:
        """Put the files into a checkpoint that is being made, on the disk when this returns. Raises OSError."""
        stored = {}
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            stored[name] = write_bytes(path, content)
        for folder in {(directory / name).parent for name in self.files}:
            flush_directory(folder)
        return stored

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        made_of = {"origin": self.fingerprint.origin, "behaviour": self.fingerprint.behaviour}
        return {"type": self.kind, "model": self.model, **made_of}


def with_kept_tokenizer(config: Config, directory: Path, manifest: Manifest) -> Config:
    """Settings of the run that wrote a checkpoint, its tokenizer the one in the checkpoint, if there is one."""
    entry = manifest.tokenizer
    if entry is None:
        return config
    kept = replace(config.data, tokenizer_type=entry["type"], tokenizer_model=_model(directory, manifest))
    return replace(config, data=kept)


def tokenizer_differences(directory: Path, manifest: Manifest, tokenizer: KeptTokenizer) -> list[Difference]:
    """How a run's tokenizer differs from that in a checkpoint: one entry, or none; none also if there is none in it."""
    entry = manifest.tokenizer
    if entry is None:
        return []
    model, made_of = _model(directory, manifest), Fingerprint(entry["origin"], entry["behaviour"])
    if made_of.difference(tokenizer.fingerprint) is not None and entry["type"] == tokenizer.kind:
        # Another version of the library may describe the same tokenizer otherwise.
        made_of = fingerprint(build_tokenizer(entry["type"], model))
    found = made_of.difference(tokenizer.fingerprint)
    if found is None:
        return []
    name, was, now = found
    remedy = f"use its tokenizer ({model}), take the weights for another one with --finetune"
    return [Difference(f"tokenizer's {name}", Change.FUNCTION, was, now, remedy)]


def _model(directory: Path, manifest: Manifest) -> str:
    model = manifest.tokenizer["model"]
    return model if model.isdecimal() else str(directory / model)
