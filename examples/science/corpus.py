"""Collect the text of docs/science.md: Debian's documentation packages and the quickstart's sources, 150 MB of English.

    python examples/science/corpus.py --output runs/science/text

Needs apt-get and Debian's keyring, but no root: packages of Debian 12 are read, not installed, with package lists of
their own (the RFCs and GNU's manuals are in `non-free`). Paragraphs that occurred before are dropped. Whole documents
are held out: train.jsonl and valid.jsonl have none in common.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEBIAN = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian bookworm main non-free\n"
BOOK = 200_000
"""Characters from which a file, such as a dictionary, is divided into documents of its own."""
PIECE = 8000
"""Characters of each of these."""
HELD_OUT = 0.01
"""Fraction of the documents that is held out."""


@dataclass(frozen=True)
class Source:
    """Some files of some packages."""

    packages: str
    """Names, with blanks between them."""
    files: str
    """Pattern that a path in a package has to match."""
    plain: Callable[[str], str]
    """A file's text -> prose."""
    megabytes: float = 1000.0
    """At most so much is taken, of documents in random order."""


def rfc(text: str) -> str:
    """Without the headers and footers of pages."""
    lines = [line for line in text.split("\n") if not re.match(r"\f|RFC \d+ .*\d{4}$|.*\[Page [\divx]+\]$", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def roff(text: str) -> str:
    """A manual page without requests and escapes: what a section is called, and its words."""
    lines = []
    for line in text.split("\n"):
        if re.match(r"[.']\s*\\\"|[.'](so|de|ie|el|if|ds|nr|TH|in|ta|ft|ad|nh|hy)\b|\.\.", line):
            continue
        if re.match(r"[.'](PP|P|LP|sp|TP|IP|HP|RE|RS|SH|SS|Sh|Ss|Pp)\b", line):
            lines.append("")
        words = re.sub(r"^[.'][A-Za-z]{1,3} ?", "", line)
        lines.append(re.sub(r"\\f\[?[A-Z0-9]{1,2}\]?|\\[&%|^/,:c]|\\s[-+]?\d", "", words).replace("\\-", "-"))
    text = "\n".join(lines).replace("\\(aq", "'").replace("\\e", "\\").replace("\\(bu", "*").replace('"', "")
    return re.sub(r"\n{3,}", "\n\n", text)


def info(text: str) -> str:
    """A GNU manual without its navigation."""
    return re.sub(r"\x1f?\nFile: .*\n|\x1f\n|Tag Table:[\s\S]*|^\* Menu:\n|\x08\[index\x00\x08\]", "\n", text)


def page(text: str) -> str:
    """The words of a web page."""
    text = re.sub(r"(?is)<(script|style|head|nav|footer)\b.*?</\1>|<!--.*?-->", " ", text)
    text = re.sub(r"(?i)</?(p|div|h\d|li|tr|dt|dd|pre|table|ul|ol|dl|section|blockquote)\b[^>]*>", "\n\n", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\u00a0", " ")
    return re.sub(r"\n\s*\n\s*", "\n\n", text)


def pod(text: str) -> str:
    """Perl's documentation without commands and formatting codes."""
    return re.sub(r"[A-Z]<([^<>]*)>", r"\1", re.sub(r"(?m)^=\w+ ?", "", text))


def pages(text: str) -> str:
    """Fortune cookies and the like, one paragraph each."""
    return re.sub(r"(?m)^%+$", "", text)


def as_it_is(text: str) -> str:
    """The text."""
    return text


SOURCES = (
    Source("doc-rfc-std doc-rfc-old-std doc-rfc-experimental doc-rfc-fyi-bcp", r"rfc\d+\.txt\.gz$", rfc, 42),
    Source("linux-doc-6.1", r"_sources/(?!translations).*\.rst\.txt$", as_it_is, 16),
    Source("python3.11-doc", r"_sources/.*\.rst\.txt$", as_it_is),
    Source("anarchism", r"\.md\.gz$", as_it_is),
    Source("dict-gcide", r"\.dict\.dz$", as_it_is, 8),
    Source("dict-foldoc dict-jargon dict-devil", r"\.dict\.dz$", as_it_is, 4),
    Source("emacs-common-non-dfsg", r"\.info\.gz$", info, 11),
    Source(
        "gcc-12-doc gdb-doc glibc-doc-reference gawk-doc octave-doc autoconf-doc bash-doc", r"info/[^/]*gz$", info, 8
    ),
    Source("postgresql-doc-15", r"\.html$", page, 6),
    Source("sqlite3-doc", r"\.html$", page, 5),
    Source("mh-book debian-reference-en", r"(?<!\.[a-z][a-z])\.(en\.)?html$", page),
    Source("perl-doc", r"\.pod$", pod, 6),
    Source("git-doc", r"\.txt$", as_it_is),
    Source("vim-runtime", r"doc/[^/]*\.txt$", as_it_is, 5),
    Source("manpages manpages-dev manpages-posix manpages-posix-dev erlang-manpages", r"man\d/[^/]*\.gz$", roff, 11),
    Source("nova-doc neutron-doc cinder-doc keystone-doc ironic-doc", r"_sources/.*\.txt$", as_it_is, 5),
    Source("debian-policy developers-reference", r"_sources/.*\.txt$", as_it_is),
    Source("fortunes", r"games/fortunes/[^/.]+$", pages),
    Source(
        "c++-annotations-txt installation-guide-amd64", r"(en/install\.en|cplusplus|annotations)\.txt\.gz$", as_it_is
    ),
)


def download(names: list[str], directory: Path) -> None:
    """Fetch packages of Debian 12 into a directory, whatever release this machine has.

    Raises:
        SystemExit: apt-get is missing, or its exit status is not 0.
    """
    lists = directory / "apt"
    (lists / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (lists / "sources.list").write_text(DEBIAN)
    places = {"etc::sourcelist": "sources.list", "state::lists": "lists", "cache": "cache"}
    options = ["-o=dir::etc::sourceparts=-"]
    options += [f"-o=dir::{name}={(lists / place).resolve()}" for name, place in places.items()]
    for words in (["update"], ["download", *names]):
        try:
            subprocess.run(["apt-get", *options, *words], cwd=directory, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"packages cannot be downloaded ({error}): fetch them elsewhere, and give --packages DIRECTORY")


def read(package: Path, source: Source) -> Iterator[tuple[str, str]]:
    """Names and texts of a package's files."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and re.search(source.files, member.name):
                data = archive.extractfile(member).read()
                data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
                yield member.name, source.plain(data.decode("utf-8", errors="replace").replace("\r\n", "\n"))


def texts(source: Source, packages: Path) -> list[str]:
    """The documents of a source, in random order."""
    found: list[tuple[str, str]] = []
    for name in source.packages.split():
        archive = next(packages.glob(f"{name}_*.deb"), None)
        if archive is None:
            print(f"{name}: not there, left out", flush=True)
            continue
        found += read(archive, source)
    documents = [document for _, text in sorted(found) for document in ([text] if len(text) < BOOK else cut(text))]
    random.Random(0).shuffle(documents)
    return documents


def cut(text: str) -> list[str]:
    """A text in pieces of about PIECE characters, divided between paragraphs."""
    pieces = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(pieces[-1]) >= PIECE:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return pieces


def new(text: str, seen: set[bytes]) -> str:
    """What of a text no earlier one contains, by paragraph, and what looks like English."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        letters = sum(map(str.isascii, words)) and len(re.findall(r"[A-Za-z ]", words))
        if len(words) > 40:
            digest = blake2b(words.lower().encode(), digest_size=8).digest()
            if digest in seen or letters < 0.6 * len(words):
                continue
            seen.add(digest)
        kept.append(paragraph.strip("\n").replace("\f", "").replace("\x00", ""))
    return "\n\n".join(kept).strip()


def main() -> None:
    """Collect from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for train.jsonl and valid.jsonl")
    parser.add_argument("--packages", type=Path, help="directory with the .deb files; default: download them")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.packages is None:
        args.packages = args.output / "packages"
        download([name for source in SOURCES for name in source.packages.split()], args.packages)
    subprocess.run(
        [sys.executable, ROOT / "tools/collect_corpus.py", "--output", args.output / "quickstart"], check=True
    )
    seen: set[bytes] = set()
    documents: list[str] = []

    def add(name: str, candidates: list[str], limit: float) -> None:
        first, size = len(documents), 0
        for candidate in candidates:
            text = new(candidate, seen)
            if len(text) >= 200:
                documents.append(text)
                size += len(text)
            if size > 1e6 * limit:
                break
        print(f"{name[:60]:60} {size / 1e6:6.1f} MB {len(documents) - first:7,} documents", flush=True)

    lines = (args.output / "quickstart" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    add("quickstart", [json.loads(line)["text"] for line in lines], 1000)
    for source in SOURCES:
        add(source.packages, texts(source, args.packages), source.megabytes)
    random.Random(1).shuffle(documents)
    held_out = int(HELD_OUT * len(documents))
    for name, part in (("valid", documents[:held_out]), ("train", documents[held_out:])):
        with open(args.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        print(f"{name}: {len(part):,} documents, {sum(map(len, part)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
