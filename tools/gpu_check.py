"""Ten minutes on a machine with a GPU: are the numbers right, where does a step wait, and how fast is it?

    python tools/gpu_check.py --budget 600                    # all stages that fit into 600 seconds
    python tools/gpu_check.py --stages syncs large --json out.json
    python tools/gpu_check.py --device cpu --budget 60        # the same stages on a small scale, to test the script

Everything runs in one process. A row is written to the JSON file as soon as it is known, so that a run that is cut off
loses nothing, and a stage is skipped when the time that is left is below its estimate. A stage that leaves the device
unusable, or hangs, is recorded as failed; the process then starts itself again with the stages that remain.

What the CPU computes is not computed here: it comes from `gpu_check_expected.json`, which `--write-expected` makes on a
machine without a GPU. `tools/pack_gpu_check.sh` collects the wheels that a bare machine needs.

The exit status is 1 if a number disagrees or a stage fails. Without a GPU, prints what it would run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

Row = dict[str, object]

GRACE = 3.0
"""A stage that takes this many times its estimate, and `GRACE_SECONDS` more, hangs."""
GRACE_SECONDS = 45.0


@dataclass(frozen=True)
class Run:
    """What the stages are told."""

    device: str
    """cuda or cpu."""
    ends: float
    """Value of `time.monotonic()` at which the budget is spent."""

    @property
    def small(self) -> bool:
        """On the CPU, each stage has a tiny version that shows that it runs."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds of the budget."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Stage:
    """One question that the check answers."""

    about: str
    function: str
    """`module:name` of a generator of rows."""
    seconds: float
    """Estimate on one H100."""
    seconds_small: float = 4.0

    def rows(self, run: Run) -> Iterator[Row]:
        """The rows, as they become known."""
        module, name = self.function.split(":")
        return getattr(__import__(module), name)(run)

    def estimate(self, run: Run) -> float:
        """Seconds on the run's device."""
        return self.seconds_small if run.small else self.seconds


STAGES: dict[str, Stage] = {
    "ceilings": Stage("copy bandwidth, matrix products, choices of kernels", "gpu_check_speed:ceilings", 10),
    "gradients": Stage("gradients against those of the CPU, fp32 and bf16", "gpu_check_numbers:gradients", 40, 10),
    "reference": Stage("three cases of tests/reference", "gpu_check_numbers:reference", 20),
    "syncs": Stage("where a training step waits for the device", "gpu_check_speed:syncs", 20),
    "large": Stage("training steps at 1.7B", "gpu_check_speed:large", 100),
    "medium": Stage("training steps at 360M, with shared keys and token-choice", "gpu_check_speed:medium", 100),
    "fused": Stage("element-wise kernels against plain PyTorch", "gpu_check_speed:fused", 40),
    "attention": Stage("attention backends by shape", "gpu_check_speed:attention", 60),
    "curves": Stage("100 losses in bf16 against those of the CPU", "gpu_check_numbers:curves", 30),
    "tiny": Stage("training steps at 135M", "gpu_check_speed:tiny", 40),
    "graphs": Stage("training steps at 135M as CUDA graphs", "gpu_check_speed:graphs", 30),
    "decoding": Stage("time per generated token", "gpu_check_speed:decoding", 30),
    "serving": Stage("the engine: equal to generate, waits, decoding at 360M", "gpu_check_serving:serving", 60, 20),
    "layouts": Stage("several GPUs against one", "gpu_check_numbers:layouts", 60, 10),
}
"""In this order: what must be known first comes first."""


class Results:
    """Rows by stage, in a file that is complete after each row."""

    def __init__(self, path: Path, found: dict[str, object]):
        self.path, self.found = path, found

    def add(self, stage: str, row: Row) -> None:
        """Append a row, print it, and write the file."""
        self.found.setdefault(stage, []).append(row)
        print(f"{stage}: " + ", ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in NOT_SHOWN), flush=True)
        if "output" in row:
            print(row["output"], flush=True)
        self.write()

    def write(self) -> None:
        """Write the file whole, or leave the one that is there."""
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(self.found, file, indent=1)
        os.replace(file.name, self.path)

    @property
    def failed(self) -> list[str]:
        """Stages with a row that failed."""
        return [name for name in STAGES if any(row.get("failed") for row in self.found.get(name, []))]


NOT_SHOWN = ("failed", "output", "losses", "losses on the CPU", "top kernels")


def shown(value: object) -> str:
    """A value as a table has it."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def run_stage(name: str, run: Run, results: Results, restart: Callable[[], None]) -> None:
    """All rows of a stage; what it raises becomes a row that failed."""
    stage = STAGES[name]
    if run.left() < stage.estimate(run):
        results.add(name, {"skipped": f"{run.left():.0f} s left, {stage.estimate(run):.0f} s estimated"})
        return

    def give_up() -> None:
        stacks = "".join(
            "".join(traceback.format_stack(frame)[-6:]) + "\n"
            for thread, frame in sys._current_frames().items()
            if thread != threading.get_ident()
        )
        results.add(name, {"failed": True, "output": f"hangs after {time.monotonic() - start:.0f} s:\n{stacks}"})
        restart()

    start = time.monotonic()
    watchdog = threading.Timer(GRACE * stage.estimate(run) + GRACE_SECONDS, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        for row in stage.rows(run):
            results.add(name, row)
    except Exception as error:  # whatever it is, the next stage has to run
        results.add(name, {"failed": True, "output": traceback.format_exc()[-3000:]})
        if "CUDA error" in str(error):  # no later call of this process would succeed
            restart()
    finally:
        watchdog.cancel()
    gc.collect()
    results.found.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)


def machine(device: str) -> dict[str, object]:
    """Card, driver, versions and date of a measurement."""
    import torch

    found: dict[str, object] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": device}
    found["python"] = sys.version.split()[0]
    for package in (
        "torch",
        "triton",
        "megatron-core",
        "deepspeed",
        "transformers",
        "flash-attn",
        "transformer-engine",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        cards = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
        found |= {"cards": cards or [torch.cuda.get_device_name()], "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    else:
        from torch.backends import cpu

        found["vector instructions"] = cpu.get_cpu_capability()
    return found


def print_tables(found: dict[str, object]) -> None:
    """All results as Markdown."""
    for name in STAGES:
        rows = found.get(name, [])
        columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in NOT_SHOWN]
        if rows:
            print(f"\n### {name}: {STAGES[name].about}\n\n| {' | '.join(columns)} | |\n|{'---|' * (len(columns) + 1)}")
        for row in rows:
            cells = [shown(row.get(column)) for column in columns]
            print(f"| {' | '.join(cells)} | {'FAILED' if row.get('failed') else ''} |")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small, to test the script")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for all stages (%(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="only these")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="output file (%(default)s)")
    parser.add_argument("--write-expected", action="store_true", help="compute what the CPU computes, and write it")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: all results agree, or there is no GPU; 1: a result disagrees."""
    args = parse(argv)
    run = Run(args.device, time.monotonic() + args.budget)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if args.device == "cpu" or args.write_expected:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    warnings.filterwarnings("ignore")
    import torch

    if args.write_expected:
        from gpu_check_numbers import write_expected

        write_expected()
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; on a machine with one this would run, in seconds on an H100:\n")
        for name, stage in STAGES.items():
            print(f"{name:10} {stage.seconds:4.0f}  {stage.about}")
        return 0
    if args.resume:
        results = Results(args.json, json.loads(args.json.read_text()))
    else:
        results = Results(args.json, {"machine": machine(args.device)})
        print("\n".join(f"{name}: {value}" for name, value in results.found["machine"].items()), flush=True)

    for position, name in enumerate(args.stages):
        rest = args.stages[position + 1 :]

        def restart(rest: list[str] = rest) -> None:
            words = ["--device", args.device, "--budget", str(run.left()), "--json", str(args.json), "--resume"]
            words += ["--stages", *rest] if rest else []
            if not rest:
                os._exit(1)
            os.execv(sys.executable, [sys.executable, __file__, *words])

        run_stage(name, run, results, restart)
    results.write()
    print_tables(results.found)
    print(f"\n{'DISAGREES: ' + ', '.join(results.failed) if results.failed else 'all agree'}; {args.json}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
