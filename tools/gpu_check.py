"""Check that GPUs compute the same results as the CPU, and measure throughput.

    python tools/gpu_check.py                       # all stages, on all GPUs of this machine
    python tools/gpu_check.py --device cpu --quick  # the same stages on a small scale on the CPU, to test the script

- reference: the authors' numbers (`tests/reference`), fp32.
- layouts: the small models of `tests/distributed`, a few fp32 steps in every layout that has enough GPUs, compared with
  one process: losses, metrics, norms, every parameter.
- kernels: gradients with flash-attn and Transformer Engine, compared with those without, bf16.
- curves: losses of small models in bf16, compared with a run on the CPU.
- throughput: tokens per second and utilisation at 135M to 1.7B, bf16, data parallel over all GPUs, random tokens.

Prints one table per stage, and writes all results as JSON, with card, driver, versions and date. The exit status is 1
if a number disagrees or a process fails. Without a GPU, prints what it would run. Every job has its own processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mor_megatron.files import write_whole

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from table import LAYOUTS, MODELS, ONE  # noqa: E402

JOBS = ROOT / "tools" / "gpu_check_jobs.py"
OUT_OF_MEMORY = ".oom"
"""Suffix of the file that marks a job that ran out of memory, beside its rows."""
FIRST_LOSS_TOL = 2e-3
"""Relative difference of the first loss of two bf16 runs: the same weights, products rounded to 8 bits."""
LAST_LOSS_TOL = 0.02
"""Relative difference of the mean loss of the last quarter, when the runs have diverged."""

Row = dict[str, object]


@dataclass(frozen=True)
class Plan:
    """What to run, and on which devices."""

    device: str
    """cuda or cpu."""
    ranks: int
    """GPUs, or processes on the CPU."""
    quick: bool

    @property
    def layouts(self) -> list[str]:
        """The layouts that have enough devices."""
        names = [layout.name for layout in LAYOUTS if layout.world_size <= self.ranks]
        return [name for name in names if name in ("dp2", "pp2")] if self.quick else names

    @property
    def models(self) -> list[str]:
        """Names of the models for the layouts."""
        return ["expert-nr3"] if self.quick else list(MODELS)

    @property
    def sizes(self) -> list[tuple[str, str, int]]:
        """Preset, variant, first micro-batch size."""
        if self.quick:
            return [("tiny", "mor_expert_nr3", 2)]
        variants = ("vanilla", "recursive_nr3", "mor_expert_nr3")
        return [(size, variant, 16) for size in ("135m", "360m", "730m", "1.7b") for variant in variants]


def run_job(plan: Plan, job: str, arguments: Row, ranks: int = 1, device: str | None = None) -> list[Row]:
    """Run a job in new processes and return its rows.

    Raises:
        MemoryError: the job ran out of memory.
        RuntimeError: the job failed; the message contains the end of its output.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "rows.json"
        command = [sys.executable, str(JOBS), job, str(output), json.dumps(arguments)]
        if ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command[1:1] = ["-m", *launcher]
        done = subprocess.run(command, env=environment(device or plan.device), capture_output=True, text=True)
        if output.with_suffix(OUT_OF_MEMORY).exists():
            raise MemoryError(f"{job} {arguments}")
        if done.returncode:
            raise RuntimeError(f"{job} {arguments} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(output.read_text())


def environment(device: str) -> dict[str, str]:
    """Environment of a process that computes on `device`, without the variables of this process's launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if device == "cpu":
        kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return kept


def reference(plan: Plan) -> list[Row]:
    """One row: how many of the tests of `tests/reference` passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:warnings", "tests/reference/test_reference.py"]
    if plan.quick:
        command += ["-k", "mor_expert_nr3_mlp"]
    done = subprocess.run(command, cwd=ROOT, env=environment(plan.device), capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    row: Row = {"passed": counts.get("passed", 0), "failed tests": counts.get("failed", 0) + counts.get("error", 0)}
    row["failed"] = done.returncode != 0 or row["passed"] == 0
    return [row | ({"output": done.stdout[-3000:] + done.stderr[-1000:]} if row["failed"] else {})]


def layouts(plan: Plan) -> list[Row]:
    """A row for each layout and model, compared with one process on the CPU."""
    chosen = [ONE, *(layout for layout in LAYOUTS if layout.name in plan.layouts)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as results:
        arguments: Row = {"models": plan.models, "results": results}
        batches = sorted({layout.global_batch for layout in chosen})
        run_job(plan, "single", arguments | {"global_batches": batches}, device="cpu")
        for layout in chosen:
            job = partial(run_job, plan, "layout", arguments | {"name": layout.name}, layout.world_size)
            rows += _or_failure(job, layout.name)
    return rows


def kernels(plan: Plan) -> list[Row]:
    """A row for each model and implementation."""
    return run_job(plan, "kernels", {})


def curves(plan: Plan) -> list[Row]:
    """A row for each model, with both curves."""
    arguments = {"iterations": 4 if plan.quick else 100}
    on_cpu = run_job(plan, "curves", arguments, device="cpu")
    on_device = run_job(plan, "curves", arguments)
    return [
        {"model": a["model"]} | compare_curves(a["losses"], b["losses"]) for a, b in zip(on_device, on_cpu, strict=True)
    ]


def compare_curves(ours: list[float], expected: list[float]) -> Row:
    """Relative differences of the first loss and of the mean of the last quarter, and whether they are too large."""
    quarter = max(1, len(expected) // 4)
    ends = [statistics.fmean(losses[-quarter:]) for losses in (ours, expected)]
    first, last = (abs(a / b - 1) for a, b in ((ours[0], expected[0]), ends))
    return {
        "first loss": ours[0],
        "first difference": first,
        "last loss": ends[0],
        "last difference": last,
        "failed": not (first <= FIRST_LOSS_TOL and last <= LAST_LOSS_TOL),
        "losses": ours,
        "losses on the CPU": expected,
    }


def throughput(plan: Plan) -> list[Row]:
    """A row for each size and variant, at the largest micro-batch that fits."""
    rows: list[Row] = []
    for size, variant, micro_batch in plan.sizes:
        rows += _or_failure(partial(_throughput, plan, size, variant, micro_batch), f"{size} {variant}")
    return rows


def _throughput(plan: Plan, size: str, variant: str, micro_batch: int) -> list[Row]:
    while micro_batch:
        arguments: Row = {"settings": settings_of(plan, size, variant, micro_batch), "size": size, "model": variant}
        try:
            return run_job(plan, "throughput", arguments | {"iterations": 2 if plan.quick else 10}, plan.ranks)
        except MemoryError:
            micro_batch //= 2
    return [{"size": size, "model": variant, "skipped": "does not fit, even with one sequence at a time"}]


def settings_of(plan: Plan, size: str, variant: str, micro_batch: int) -> list[str]:
    """Command line of a timed run: presets, bf16, four micro-batches per rank and iteration."""
    presets = [str(ROOT / "examples" / "configs" / f"{name}.yaml") for name in (size, variant)]
    settings = ["--config", *presets, "--bf16", "--micro-batch-size", str(micro_batch)]
    settings += ["--global-batch-size", str(4 * micro_batch * plan.ranks)]
    return settings + (["--vocab-size", "512"] if size == "tiny" else [])


def _or_failure(run: Callable[[], list[Row]], what: str) -> list[Row]:
    """Run a job; if it fails, record the failure and let the stage continue."""
    try:
        return run()
    except RuntimeError as error:
        return [{"job": what, "failed": True, "output": str(error)}]


STAGES: dict[str, Callable[[Plan], list[Row]]] = {
    stage.__name__: stage for stage in (reference, layouts, kernels, curves, throughput)
}
_NOT_SHOWN = ("failed", "losses", "losses on the CPU", "output", "using", "peak_tflops")


def print_table(stage: str, rows: list[Row]) -> None:
    """The results as Markdown, followed by the output of failed jobs."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NOT_SHOWN]
    print(f"\n## {stage}\n\n| {' | '.join(columns)} | |\n|{'---|' * (len(columns) + 1)}")
    for row in rows:
        cells = [_shown(row.get(name)) for name in columns]
        print(f"| {' | '.join(cells)} | {'FAILED' if row.get('failed') else ''} |")
    for row in rows:
        if "output" in row:
            print(f"\n{row['output']}")
    sys.stdout.flush()


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(plan: Plan) -> Row:
    """Card, driver, versions and date of this measurement."""
    packages = ("torch", "megatron-core", "deepspeed", "flash-attn", "transformer-engine")
    found: Row = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": plan.device}
    found |= {"ranks": plan.ranks, "python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if plan.device == "cuda":
        import torch

        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        cards = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"cards": cards or [torch.cuda.get_device_name()], "cuda": torch.version.cuda, "nccl": nccl}
    return found


def describe(plan: Plan) -> str:
    """Describe what would run."""
    sizes = ", ".join(f"{size} {variant}" for size, variant, _ in plan.sizes)
    return (
        "reference   every case of tests/reference\n"
        f"layouts     {', '.join(plan.layouts) or 'one process only'}; models {', '.join(plan.models)}\n"
        "kernels     flash-attn and Transformer Engine, if installed, compared with neither\n"
        "curves      bf16 losses compared with those of a CPU run\n"
        f"throughput  {sizes}"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: all results agree, or there is no GPU; 1: a result disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: over gloo, to test the script")
    parser.add_argument("--quick", action="store_true", help="one or two small cases per stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="only these")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="output file (%(default)s)")
    args = parser.parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; on a machine with GPUs this would run (shown for 8):\n")
        print(describe(Plan("cuda", 8, args.quick)))
        return 0
    plan = Plan(args.device, torch.cuda.device_count() if args.device == "cuda" else 2, args.quick)
    results: Row = {"machine": machine(plan)}
    print("\n".join(f"{name}: {value}" for name, value in results["machine"].items()), flush=True)
    for stage in args.stages:
        rows = _or_failure(partial(STAGES[stage], plan), stage)
        results[stage] = rows
        print_table(stage, rows)
        write_whole(args.json, json.dumps(results, indent=1))
    failed = [stage for stage in args.stages if any(row.get("failed") for row in results[stage])]
    print(f"\n{'DISAGREES: ' + ', '.join(failed) if failed else 'all agree'}; {args.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
