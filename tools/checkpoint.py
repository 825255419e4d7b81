"""Inspect, verify, convert and prune checkpoints. See docs/reliability.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mor_megatron.command import exit_status


def named_checkpoints(path: Path) -> list[Path]:
    """The checkpoint itself, or all checkpoints of a run, from the one to resume from to the oldest.

    Raises:
        ValueError: there is none.
    """
    from mor_megatron.checkpointing.directory import candidates
    from mor_megatron.checkpointing.manifest import MANIFEST

    if (path / MANIFEST).exists() or path.name.startswith("iter_"):
        return [path]
    found = candidates(path)
    if not found:
        raise ValueError(f"{path} has no checkpoint: give a run's --save directory, or one checkpoint in it")
    return found


def run_verify(args: argparse.Namespace) -> int:
    from mor_megatron.checkpointing.inspection import verify

    failed = False
    for path in named_checkpoints(args.path):
        problems = list(verify(path))
        print(f"{path}: {'intact' if not problems else 'DAMAGED'}", flush=True)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        failed |= bool(problems)
    return int(failed)


def run_info(args: argparse.Namespace) -> int:
    from mor_megatron.checkpointing.inspection import describe

    for path in named_checkpoints(args.path):
        print(describe(path))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from mor_megatron.checkpointing.convert import convert

    (source, *_) = named_checkpoints(args.path)
    print(f"{source} -> {convert(source, args.output, args.with_optimizer)}")
    return 0


def run_prune(args: argparse.Namespace) -> int:
    from mor_megatron.checkpointing.directory import delete, expired

    if args.keep_last < 1 or (args.keep_every is not None and args.keep_every < 1):
        raise ValueError("keep-last and keep-every must be 1 or more: nothing would be left to resume from")
    named_checkpoints(args.path)  # refuses a place that has none
    unwanted = expired(args.path, args.keep_last, args.keep_every)
    for path in unwanted:
        print(f"{'would delete' if args.dry_run else 'deleting'} {path}", flush=True)
        if not args.dry_run:
            delete([path])
    return 0


def main() -> int:
    """Exit status 0: done, intact; 1: damaged; 2: no such checkpoint, or a path cannot be read or written."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function)
        sub.add_argument("path", type=Path, help="a run's --save directory, or one checkpoint in it")
        return sub

    command("verify", run_verify, "read everything and compare it with the manifest; exit status 1 if it is damaged")
    command("info", run_info, "print its model, the progress of the run, and the versions that wrote it")
    conversion = command("convert", run_convert, "write unsharded fp32 tensors to a new directory")
    conversion.add_argument("output", type=Path, help="new directory")
    conversion.add_argument("--with-optimizer", action="store_true", help="also write the optimizer's state")
    pruning = command("prune", run_prune, "delete old checkpoints and unfinished saves")
    pruning.add_argument("--keep-last", type=int, required=True, help="number of newest complete checkpoints to keep")
    pruning.add_argument("--keep-every", type=int, help="also keep iterations that are a multiple of this")
    pruning.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    args = parser.parse_args()
    return exit_status(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
