"""A checkpoint as one directory that knows nothing of layouts: whole fp32 tensors under the parameters' names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

from safetensors.torch import save_file
from torch import Tensor

from mor_megatron.checkpointing.manifest import CONFIG, KEPT_TOKENIZER, MANIFEST
from mor_megatron.checkpointing.reader import WHOLE, CheckpointReader, open_checkpoint
from mor_megatron.checkpointing.shards import STEP, Sharding
from mor_megatron.checkpointing.stored_file import StoredFile, checksum_of, write_bytes, write_text
from mor_megatron.files import as_os_error, flush, flush_directory, give_usual_mode

OPTIMIZER = "optimizer.safetensors"


def convert(directory: str | Path, output: str | Path, with_optimizer: bool = False) -> Path:
    """Write `model.safetensors` (vocabulary without padding), `buffers.safetensors`, config, tokenizer and manifest.

    Args:
        directory: of one checkpoint.
        output: a new directory; it appears when it is complete.
        with_optimizer: also `optimizer.safetensors`, `kind/parameter` -> whole state.
    Raises:
        ValueError: the checkpoint is damaged or converted already, or the output exists or cannot be written.
    """
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    reader = open_checkpoint(directory)
    reader.require_entries()
    if output.exists():
        raise ValueError(f"{output} exists: name a new directory, or move it away")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        _write(reader, partial, with_optimizer)
        partial.rename(output)
        flush_directory(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{output} cannot be written ({error.strerror or error}): choose another place") from error
    return output


def _write(reader: CheckpointReader, partial: Path, with_optimizer: bool) -> None:
    tensors: dict[str, dict[str, Tensor]] = {file: {} for file in (*WHOLE.values(), OPTIMIZER)}
    for name in reader.manifest.parameters:
        for kind in reader.kinds[name]:
            if kind in WHOLE:
                tensors[WHOLE[kind]][name] = reader.whole(kind, name).contiguous()
            elif with_optimizer:
                state = reader.read(STEP, name, 0, 0, 1) if kind == STEP else reader.whole(kind, name).contiguous()
                tensors[OPTIMIZER][f"{kind}/{name}"] = state
    files = {}
    for name, content in tensors.items():
        if content:
            files[name] = _save(partial / name, content)
    for name in reader.manifest.files:
        if name == CONFIG or PurePosixPath(name).parts[0] == KEPT_TOKENIZER:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = write_bytes(partial / name, (reader.directory / name).read_bytes())
            flush_directory((partial / name).parent)
    parameters = {name: Sharding(sharding.unpadded) for name, sharding in reader.manifest.parameters.items()}
    manifest = replace(reader.manifest, parameters=parameters, files=files)
    write_text(partial / MANIFEST, manifest.to_json())
    flush_directory(partial)


def _save(path: Path, tensors: dict[str, Tensor]) -> StoredFile:
    with as_os_error(path):
        save_file(tensors, path, metadata={"format": "pt"})
    give_usual_mode(path)
    with path.open("rb+") as file:
        flush(file)
    return StoredFile(path.stat().st_size, checksum_of(path))
