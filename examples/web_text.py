"""Turn crawled pages into clean text for tools/preprocess_data.py: extraction, filters, deduplication, by datatrove.

    pip install 'datatrove[io,processing,multilingual]' lxml_html_clean       # in a separate environment
    python examples/web_text.py --warc crawl/ --output web --tasks 4
    python examples/web_text.py --warc crawl/ --output web --tasks 500 --partition cpu --languages en

With --partition, each step is a Slurm job array that waits for the previous one. If the command is repeated, it skips
tasks that are complete. The text is in OUTPUT/clean, as JSON lines. See docs/data.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LanguageFilter
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.writers import JsonlWriter


def steps(args: argparse.Namespace) -> dict[str, tuple[int, list[PipelineStep]]]:
    """Name -> number of tasks, and what each does."""
    output, config = args.output, MinhashConfig()
    filtered, signatures, buckets, remove = (
        f"{output}/{name}" for name in ("filtered", "signatures", "buckets", "remove")
    )
    extraction = [
        WarcReader(str(args.warc), glob_pattern=args.pattern),
        Trafilatura(timeout=10),
        *([LanguageFilter(args.languages)] if args.languages else []),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        JsonlWriter(filtered),
    ]
    # Without compression, preprocess_data.py can divide the text between lines, into parts of equal size.
    removal = [JsonlReader(filtered), MinhashDedupFilter(remove), JsonlWriter(f"{output}/clean", compression=None)]
    return {
        "extract": (args.tasks, extraction),
        "signatures": (args.tasks, [JsonlReader(filtered), MinhashDedupSignature(signatures, config)]),
        "buckets": (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        "cluster": (1, [MinhashDedupCluster(buckets, remove, config)]),
        "deduplicate": (args.tasks, removal),
    }


def main() -> int:
    """Run the steps on this machine, or submit them to Slurm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warc", type=Path, required=True, help="directory of WARC files")
    parser.add_argument(
        "--pattern", default="*.warc.gz", help="pattern for the names of the files (default: *.warc.gz)"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for all steps; the text is in its clean/")
    parser.add_argument("--languages", nargs="+", help="languages to keep (downloads a classifier); default: all")
    parser.add_argument("--tasks", type=int, default=1, help="tasks per step, at most one per file (default: 1)")
    parser.add_argument("--workers", type=int, default=-1, help="tasks that run at the same time (default: all)")
    parser.add_argument("--partition", help="Slurm partition; default: run on this machine")
    parser.add_argument("--time", default="08:00:00", help="time limit of a Slurm job (default: 08:00:00)")
    parser.add_argument(
        "--mem-per-cpu-gb", type=int, default=4, help="memory per CPU of a Slurm job, in GB (default: 4)"
    )
    args = parser.parse_args()
    last = None
    for name, (tasks, pipeline) in steps(args).items():
        common = {"tasks": tasks, "workers": args.workers, "logging_dir": f"{args.output}/logs/{name}", "depends": last}
        if args.partition is None:
            last = LocalPipelineExecutor(pipeline, **common)
        else:
            slurm = {"time": args.time, "partition": args.partition, "mem_per_cpu_gb": args.mem_per_cpu_gb}
            venv = str(Path(sys.prefix) / "bin" / "activate")
            last = SlurmPipelineExecutor(pipeline, **common, **slurm, job_name=f"web-{name}", venv_path=venv)
    last.run()  # and what it depends on, first
    return 0


if __name__ == "__main__":
    sys.exit(main())
