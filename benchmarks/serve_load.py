"""Servers under load: random requests, some cut off or malformed, too few pages, and a server that is killed.

    OMP_NUM_THREADS=1 python benchmarks/serve_load.py --output load.json

Two processes of tools/serve.py serve the same small model. A client asks one, and the other one if the connection
breaks. In the midst of it the second one is killed and started again. Every answer is compared with what the request
gets alone on an idle engine (`quiet.py`). The pages are enough for a fifth of the requests that could run at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
import torch
import transformers
from processor import processor
from quiet import QuietRun
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from traffic import ALPHABET, TEMPLATE, Answer, Visit, send, visits
from transformers import PreTrainedTokenizerFast

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.serving import Engine, EngineOptions

ROOT = Path(__file__).parents[1]
MOST_BODY = 20_000
PAGE_SIZE = 8


def build(args: argparse.Namespace) -> tuple[MoRForCausalLM, PreTrainedTokenizerFast]:
    """An untrained model and a tokenizer of characters. Weights are large and the head is its own, or greedy decoding
    would repeat one token for ever."""
    torch.manual_seed(3)
    config = MoRConfig(
        vocab_size=len(ALPHABET),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=8,
        num_recursions=3,
        routing="expert_choice",
        num_attention_heads=2,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=False,
        initializer_range=1.4 / args.hidden_size**0.5,
    )
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return MoRForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=TEMPLATE)


@dataclass
class Sample:
    """State of a server at one time."""

    seconds: float
    server: int
    metrics: dict[str, float]
    threads: int

    @property
    def requests(self) -> float:
        """That run and wait."""
        return self.metrics["mor_requests_running"] + self.metrics["mor_requests_waiting"]

    @property
    def ended(self) -> float:
        return sum(value for name, value in self.metrics.items() if name.startswith("mor_requests_total"))


class Server:
    """A process of tools/serve.py.

    Args:
        number: of the server.
        model: directory.
        args: of the benchmark.
        kv_bytes: memory for pages.
    """

    def __init__(self, number: int, model: Path, args: argparse.Namespace, kv_bytes: int):
        words = f"--max-num-seqs {args.lanes} --max-num-batched-tokens 64 --block-size {PAGE_SIZE} --device cpu"
        words += f" --kv-cache-memory-bytes {kv_bytes} --max-body-size {MOST_BODY} --max-waiting {args.max_waiting}"
        self.number = number
        self.command = [sys.executable, str(ROOT / "tools/serve.py"), "--model", str(model), *words.split()]
        self.port = 0
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, at the same port as before, and wait until it listens."""
        command = [*self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = next((line for line in self.process.stdout if line.startswith("serving")), None)
        if line is None:
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        self.port = int(line.rsplit(":", 1)[1])

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it in order; gives its exit status."""
        self.process.terminate()
        return self.process.wait(60)

    def metrics(self) -> dict[str, float]:
        """What /metrics shows."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


class Watch(threading.Thread):
    """Reads the state of the servers again and again."""

    def __init__(self, servers: list[Server], every: float):
        super().__init__()
        self.servers, self.every = servers, every
        self.samples: list[Sample] = []
        self.start_time = time.monotonic()
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(self.every):
            for server in self.servers:
                self.look(server)

    def look(self, server: Server) -> Sample | None:
        """The state of one server; None: it does not answer."""
        try:
            found = Sample(time.monotonic() - self.start_time, server.number, server.metrics(), server.threads())
        except (httpx.TransportError, OSError):
            return None
        self.samples.append(found)
        return found

    def end(self) -> None:
        self._ends.set()
        self.join()


@dataclass
class Report:
    """What was seen."""

    visits: list[Visit]
    answers: list[Answer]
    samples: list[Sample]
    first: list[Sample]
    """Of each server, warm and quiet."""
    last: list[Sample]
    """Of each server, when it was quiet again."""
    exits: list[int]
    seconds: float
    differing: list[tuple[int, str]] = field(default_factory=list)
    """Visits that got something else than alone, and what."""
    by_rounding: list[int] = field(default_factory=list)
    """Those among them that rounding explains."""

    def outcomes(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.answers)

    def series(self, server: int, name: str) -> list[float]:
        """One metric of a server over time."""
        return [s.metrics[name] for s in self.samples if s.server == server]

    def growth(self, server: int) -> float:
        """Bytes of resident memory that a server gained for each request, in the second half of its requests: the
        median of the slopes between any two samples, which a few outliers do not move."""
        ended = [sample.ended for sample in self.samples if sample.server == server]
        points = list(zip(ended, self.series(server, "process_resident_memory_bytes"), strict=True))
        points = [point for point in points if point[0] >= ended[-1] / 2]
        return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a in points for b in points if b[0] > a[0])


def run(args: argparse.Namespace) -> Report:
    """Serve, ask, kill, watch; then compare."""
    model, tokenizer = build(args)
    plan = visits(args.requests, args.rate, args.max_length, MOST_BODY, args.seed)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        servers = [Server(i, Path(directory), args, kv_bytes(model, plan, args)) for i in range(2)]
        try:
            report = _serve(servers, plan, args)
        finally:
            for server in servers:
                if server.process is not None:
                    server.kill()
    alone = QuietRun(model, tokenizer)
    for i, (visit, answer) in enumerate(zip(plan, report.answers, strict=True)):
        if answer.outcome in ("answered", "left") and (found := alone.difference(visit, answer)) is not None:
            report.differing.append((i, found))
            if alone.is_rounding(visit, answer):
                report.by_rounding.append(i)
    return report


def kv_bytes(model: MoRForCausalLM, plan: list[Visit], args: argparse.Namespace) -> int:
    """Memory for a fifth of the tokens that requests in all lanes have on average."""
    mean = statistics.mean(visit.longest for visit in plan if visit.fault is None)
    whole = Engine(model, None, EngineOptions(lanes=1, page_size=PAGE_SIZE))
    return int(args.lanes * mean / 5 * whole.store.nbytes() / whole.kv_tokens)


def _serve(servers: list[Server], plan: list[Visit], args: argparse.Namespace) -> Report:
    for server in servers:
        server.start()
    urls = [server.url for server in servers]
    # As many at once as the servers take: memory grows with what is open at a time, and should not afterwards.
    crowd = plan[: len(servers) * (args.lanes + args.max_waiting)]
    asyncio.run(send([replace(visit, arrives=0.0) for visit in crowd], urls))
    watch = Watch(servers, args.every)
    first = [_wait_until_quiet(watch, server) for server in servers]
    watch.start()
    restart = threading.Thread(target=servers[1].start)

    def on_start(i: int) -> None:
        if i == len(plan) * 2 // 5:
            servers[1].kill()
            restart.start()

    start = time.monotonic()
    answers = asyncio.run(send(plan, urls, on_start=on_start))
    seconds = time.monotonic() - start
    restart.join()
    watch.end()
    last = [_wait_until_quiet(watch, server) for server in servers]
    return Report(plan, answers, watch.samples, first, last, [server.stop() for server in servers], seconds)


def _wait_until_quiet(watch: Watch, server: Server, seconds: float = 30) -> Sample:
    """The state of a server that has nothing more to do; or after so many seconds, whatever it is."""
    deadline = time.monotonic() + seconds
    while True:
        sample = watch.look(server)
        is_quiet = sample is not None and sample.requests == sample.metrics["mor_kv_use"] == 0
        if is_quiet or time.monotonic() > deadline:
            return sample
        time.sleep(0.2)


def percentiles(values: list[float]) -> list[float]:
    """The 50th, 90th and 99th, in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [1e3 * cuts[i] for i in (49, 89, 98)]


def print_report(report: Report) -> None:
    """Tables of what was seen."""
    counts, answers = report.outcomes(), report.answers
    print("\n".join(f"{name:12} {count:5}" for name, count in counts.most_common()))
    print(f"asked again after a lost connection: {sum(answer.lost > 0 for answer in answers)}")
    others = len(report.differing) - len(report.by_rounding)
    print(f"unlike the quiet run: {others}, and {len(report.by_rounding)} by rounding")
    for i, found in report.differing:
        print(f"  request {i}{' (rounding)' if i in report.by_rounding else ''}: {found[:200]}")
    for i, answer in enumerate(answers):
        if answer.outcome == "wrong":
            print(f"  request {i} went wrong: {answer.status} {answer.words} {report.visits[i]}"[:300])
    streams = [
        a.times for v, a in zip(report.visits, answers, strict=True)
        if v.is_stream and a.outcome == "answered" and v.body.get("n", 1) == 1
    ]  # fmt: skip
    tokens = sum(len(choice["text"]) for a in answers if a.outcome == "answered" for choice in a.choices)
    print(f"{report.seconds:.1f} s, {counts['answered'] / report.seconds:.1f} answers/s, about "
          f"{tokens / report.seconds:.0f} characters/s")  # fmt: skip
    print(f"{'ms':18} {'p50':>8} {'p90':>8} {'p99':>8}")
    rows = {
        "first token": [times[0] for times in streams],
        "each token after": [(t[-1] - t[0]) / (len(t) - 1) for t in streams if len(t) > 1],
        "between two": [b - a for t in streams for a, b in itertools.pairwise(t)],
    }
    for name, values in rows.items():
        print(f"{name:18} " + " ".join(f"{value:8.1f}" for value in percentiles(values)))
    print("server preempted peak KV  threads     files   RSS MB: first  last  B/request")
    for number, last in enumerate(report.last):
        own = [s for s in report.samples if s.server == number]
        rss = [value / 1e6 for value in report.series(number, "process_resident_memory_bytes")]
        files = report.series(number, "process_open_fds")
        print(
            f"{number:7} {last.metrics['mor_preemptions_total']:9.0f} {max(report.series(number, 'mor_kv_use')):7.2f} "
            f"{own[0].threads:4}-{last.threads:<3} {files[0]:4.0f}-{files[-1]:<4.0f} {rss[0]:14.1f} {rss[-1]:5.1f} "
            f"{report.growth(number):9.0f}"
        )
        step = max(1, len(rss) // 12)
        print("        RSS over time, MB: " + " ".join(f"{value:.0f}" for value in rss[::step]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=15.0, help="arrivals a second")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--max-waiting", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks at the servers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


def main() -> None:
    """Run, print and write."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    transformers.utils.logging.set_verbosity_error()
    machine = (
        f"{processor()}, torch {torch.__version__}; {args.requests} requests, {args.rate:g} a second, two servers of "
        f"{args.lanes} lanes, hidden {args.hidden_size}"
    )
    print(machine, flush=True)
    report = run(args)
    print_report(report)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, **asdict(report)}, indent=1, default=repr))


if __name__ == "__main__":
    main()
