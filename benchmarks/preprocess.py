"""Speed of tools/preprocess_data.py compared with the tokenizer library alone, from one interleaved run.

    python benchmarks/preprocess.py --megabytes 24 --rounds 5 --json preprocess.json

The text is CPython's own documentation, repeated in random order, as JSON lines. Rows, for each tokenizer:

- bare x1: the library's batch call on texts in memory, one process, one thread; nothing is written.
- bare x2: two such processes at the same time, with half of the texts each: the limit of two cores.
- 1 worker, 2 workers: preprocess() from the file to .bin/.idx: starting workers, reading, tokens, writing, merging.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import platform
import pydoc_data.topics
import random
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from processor import processor

from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.data.tokenizers import build_tokenizer

TOKENIZERS = {
    "sentencepiece BPE 8k": ("bpe", "SentencePieceTokenizer"),
    "Hugging Face BPE 8k": ("hf-bpe", "HuggingFaceTokenizer"),
}
# The fastest chunk for both libraries; a thousand at once halves the speed of `tokenizers`.
CHUNK = 32


def documents() -> list[str]:
    """Python's language reference topics and the standard library's docstrings: 1.3 MB of prose and code."""
    texts = list(pydoc_data.topics.topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = (ast.get_docstring(n) for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        texts += [text for text in found if text and len(text) > 100]
    return texts


def corpus(megabytes: float) -> list[str]:
    """Documents in random order, repeated up to a size."""
    texts, order, size = documents(), random.Random(0), 0
    result: list[str] = []
    while size < megabytes * 1e6:
        order.shuffle(texts)
        result += texts
        size += sum(map(len, texts))
    return result


def library_call(kind: str, model: str) -> Callable[[list[str]], object]:
    """The library's own batch call, one thread, without any of our code."""
    if kind == "SentencePieceTokenizer":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        return lambda texts: processor.encode(texts, num_threads=1)
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")
    return lambda texts: backend.encode_batch_fast(texts, add_special_tokens=False)


def encode_all(call: Callable[[list[str]], object], texts: list[str]) -> None:
    for start in range(0, len(texts), CHUNK):
        call(texts[start : start + CHUNK])


def bare(call: Callable[[list[str]], object], texts: list[str], processes: int) -> float:
    """Seconds to encode the texts, divided among a number of processes."""
    if processes == 1:
        started = time.perf_counter()
        encode_all(call, texts)
        return time.perf_counter() - started
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=encode_all, args=(call, texts[i::processes])) for i in range(processes)]
    started = time.perf_counter()
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert all(child.exitcode == 0 for child in children)
    return time.perf_counter() - started


def cpu_seconds() -> float:
    """CPU time of this process and its finished children; other programs affect it less than wall-clock time."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(folder: Path, texts: list[str], rounds: int) -> list[dict]:
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    megabytes = source.stat().st_size / 1e6
    rows = []
    for name, (model_type, kind) in TOKENIZERS.items():
        model = train_tokenizer([str(source)], 8192, model_type, str(folder / model_type))
        tokenizer, call = build_tokenizer(kind, model), library_call(kind, model)

        def ours(workers: int, tokenizer=tokenizer) -> float:
            return preprocess(
                [str(source)], str(folder / "out"), tokenizer, append_eod=True, workers=workers, progress=False
            ).seconds

        cases = {
            "bare x1": lambda call=call: bare(call, texts, 1),
            "bare x2": lambda call=call: bare(call, texts, 2),
            "1 worker": lambda ours=ours: ours(1),
            "2 workers": lambda ours=ours: ours(2),
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        cpu: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(rounds):
            for case, run in cases.items():
                before = cpu_seconds()
                seconds[case].append(run())
                cpu[case].append(cpu_seconds() - before)
        tokens = sum(map(len, tokenizer.tokenize_batch(texts)))
        for case in cases:
            median = statistics.median(seconds[case])
            # Ratios within a round: other load on the machine affects both measurements.
            to_bare = statistics.median(a / b for a, b in zip(seconds["bare x1"], seconds[case], strict=True))
            to_one = statistics.median(a / b for a, b in zip(seconds["1 worker"], seconds[case], strict=True))
            rows.append(
                {
                    "tokenizer": name,
                    "case": case,
                    "seconds": seconds[case],
                    "median_seconds": median,
                    "median_cpu_seconds": statistics.median(cpu[case]),
                    "megabytes_per_second": megabytes / median,
                    "tokens_per_second": tokens / median,
                    "speed_to_bare": to_bare,
                    "speed_to_1_worker": to_one,
                }
            )
    return rows


def machine() -> dict:
    packages = ("sentencepiece", "tokenizers", "numpy", "megatron-core")
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "load_at_start": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="JSON file for the numbers")
    args = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), corpus(args.megabytes), args.rounds)
    where["load_at_end"] = os.getloadavg()[0]
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{args.megabytes:g} MB of text, {args.rounds} interleaved rounds; medians, ratios within rounds")
    titles = ("MB/s", "Mtok/s", "/bare", "/1 worker")
    print(
        f"{'tokenizer':22}{'case':12}{'seconds':>9}{'min..max':>14}{'CPU s':>8}"
        + "{:>8}{:>8}{:>8}{:>11}".format(*titles)
    )
    for row in rows:
        spread = f"{min(row['seconds']):.2f}..{max(row['seconds']):.2f}"
        print(
            f"{row['tokenizer']:22}{row['case']:12}{row['median_seconds']:9.2f}{spread:>14}{row['median_cpu_seconds']:8.2f}"
            f"{row['megabytes_per_second']:8.2f}{row['tokens_per_second'] / 1e6:8.2f}"
            f"{row['speed_to_bare']:8.2f}{row['speed_to_1_worker']:11.2f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": where, "arguments": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
