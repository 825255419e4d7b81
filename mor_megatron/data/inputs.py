"""Expand `--input`, which names files, directories, patterns and standard input, to a list in a fixed order."""

from __future__ import annotations

import atexit
import glob
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from mor_megatron.data.fingerprint import SUFFIX
from mor_megatron.data.shards import ORIGIN
from mor_megatron.data.sources import DATASET_FILES, JSONL, PARQUET, SUPPORTED, TEXT, kind_of

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"


def expand(inputs: list[str]) -> list[str]:
    """Files and dataset directories, in input order.

    Args:
        inputs: files; directories written by `save_to_disk`; other directories, which stand for the files of known
            formats below them, sorted by path; patterns (`*`, `?`, `[]`, `**`), which stand for their sorted matches;
            or `-` for JSON lines on standard input.
    Raises:
        ValueError: nothing matches, or standard input is named twice.
    """
    if inputs.count(STANDARD_INPUT) > 1:
        raise ValueError(f"input={STANDARD_INPUT} stands for standard input, which can be read once: name it once.")
    return [path for name in inputs for path in _expand(name)]


def _expand(name: str) -> list[str]:
    if name == STANDARD_INPUT:
        return [_standard_input()]
    if Path(name).is_dir():
        return [name] if any((Path(name) / file).exists() for file in DATASET_FILES) else _files_below(name)
    if Path(name).exists() or not glob.has_magic(name):
        return [name]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise ValueError(f"input={name} matches no file.")
    if "**" in name:  # also matches directories, beside the files in them
        matches = [match for match in matches if not Path(match).is_dir()]
    return [path for match in matches for path in _expand(match)]


def _files_below(folder: str) -> list[str]:
    """The files of one kind: plain text beside records is a README or a licence."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    kinds = [kind_of(path) if _may_be_data(path.relative_to(folder)) else None for path in files]
    wanted = {TEXT} if set(kinds) <= {TEXT, None} else {JSONL, PARQUET}
    taken = [path for path, kind in zip(files, kinds, strict=True) if kind in wanted]
    if not taken:
        raise ValueError(f"input={folder} is a directory without a file of a known format. Supported: {SUPPORTED}.")
    left = [str(path.relative_to(folder)) for path in files if path not in set(taken)]
    if left:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        logger.warning("%s: %d files used, %d skipped: %s", folder, len(taken), len(left), shown)
    return [str(path) for path in taken]


def _may_be_data(path: Path) -> bool:
    """Whether a file is not hidden, and is not one that is written beside a corpus."""
    return not any(part[0] in "._" for part in path.parts) and not path.name.endswith((SUFFIX, ORIGIN))


def _standard_input() -> str:
    """Copy standard input to a file that several processes can read; it is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="mor-input-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "stdin.jsonl"
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    except OSError as error:
        raise ValueError(
            f"input=- cannot be kept in {folder} ({error.strerror}): set TMPDIR to a larger disk."
        ) from error
    return str(path)
