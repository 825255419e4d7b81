"""Write files completely or not at all, and report failures."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w", sync: bool = True) -> Iterator[IO]:
    """Open a file that gets its name when the block ends: readers of that name find the old content or all of the new.

    Text is UTF-8. A path that is not a regular file, such as /dev/stdout, is written in place.

    Args:
        mode: `w` or `wb`.
        sync: wait until the content is on the disk; some file systems notice only then that the disk is full.
    Raises:
        OSError: the file cannot be written; the error names `path`, and nothing is left behind.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    in_place = path.exists() and not path.is_file()
    place = path if in_place else path.with_name(f"{path.name}.partial")
    try:
        with place.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if sync and not in_place:
                flush(file)
        if not in_place:
            place.replace(path)
    except BaseException as error:
        if not in_place:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(place)):
            error.filename = str(path)  # write(2) names none
        raise


def write_whole(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Write `content` with `whole_file`."""
    with whole_file(path, "w" if isinstance(content, str) else "wb", sync) as file:
        file.write(content)


@contextlib.contextmanager
def as_os_error(path: str | Path) -> Iterator[None]:
    """Convert the errors of Rust libraries (safetensors, tokenizers) that cannot write to an OSError.

    Raises:
        OSError: names `path`.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises no narrower type
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class Unfailing:
    """A text stream, such as stdout, that tolerates write errors: its disk is full, or its reader has exited."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def give_usual_mode(path: Path) -> None:
    """Give a file the permissions of the umask; some libraries (safetensors) create files only their owner can read."""
    usual = path.with_name(f"{path.name}.mode")
    usual.touch()
    path.chmod(usual.stat().st_mode)
    usual.unlink()


def flush(file: IO) -> None:
    """Wait until everything written so far is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
