"""Likelihood, routing and tasks of a checkpoint or an export. See docs/evaluation.md.

python tools/evaluate.py --model runs/mor
torchrun --nproc-per-node 8 tools/evaluate.py --model mor-export --text held_out.jsonl --seq-length 2048
python tools/evaluate.py --model mor-export --tasks paper
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from mor_megatron.command import DTYPES, add_extension, exit_status, load_extension
from mor_megatron.config.schema import Config
from mor_megatron.data.corpora import SOURCES
from mor_megatron.distributed.launch import adopt_srun, is_launched
from mor_megatron.files import write_whole


def run(args: argparse.Namespace) -> None:
    """Evaluate on every rank, report on the first.

    Raises:
        ValueError: the model, the data or the tasks are unavailable, or a setting does not apply to them.
    """
    import torch
    import torch.distributed as dist

    from mor_megatron.distributed.initialize import initialize_distributed
    from mor_megatron.evaluation import harness
    from mor_megatron.evaluation.likelihood import likelihood
    from mor_megatron.evaluation.modes import modes_of
    from mor_megatron.evaluation.report import summary, table
    from mor_megatron.evaluation.sequences import IndexedPieces, settings_of, text_pieces, token_bytes
    from mor_megatron.inference.loading import is_export, load_model

    if not (args.text or args.data_path or args.tasks) and is_export(args.model):
        raise ValueError(f"model={args.model} is an export, which names no data: give --data-path, --text or --tasks")
    adopt_srun()
    if is_launched():
        initialize_distributed(Config())
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    device = args.device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    load_extension(args)
    model, tokenizer = load_model(args.model, args.dtype, device)
    if args.router_threshold is not None:
        if not model.config.routing_method.looks_ahead:
            raise ValueError(
                f"router-threshold={args.router_threshold} needs a model that selects by threshold, and this one has "
                f"routing={model.config.routing}: leave it out"
            )
        model.config.router_threshold = args.router_threshold
    facts: dict = {"model": str(args.model), "dtype": args.dtype}
    if args.text or args.data_path or not args.tasks:
        settings = settings_of(args.model, model.config)
        data = {"data_path": tuple(args.data_path), "split": args.split, "seq_length": args.seq_length}
        if args.data_path:  # instead of the run's, whatever flags named them
            settings = replace(settings, data=replace(settings.data, **{source: None for source in SOURCES}))
        settings = replace(settings, data=replace(settings.data, **{k: v for k, v in data.items() if v}))
        if args.seed is not None:
            settings = replace(settings, training=replace(settings.training, seed=args.seed))
        vocab_size, length = model.config.vocab_size, settings.data.seq_length
        if args.text:
            eod = model.config.eos_token_id if tokenizer is None else None
            pieces = text_pieces(args.text, tokenizer, vocab_size, length, args.sequences, eod)
        else:
            pieces = IndexedPieces(settings, args.sequences)
        modes = modes_of(model.config, not args.no_fixed_depths)
        nbytes = None if tokenizer is None else token_bytes(tokenizer, vocab_size)
        found = likelihood(model, pieces, modes, args.batch_size, nbytes)
        facts |= summary(model.config, found, length)
        if is_first:
            print(table(facts), flush=True)
    if args.tasks:
        options = harness.Options(args.batch_size, args.num_fewshot, args.limit, args.include_path)
        facts["tasks"] = harness.run_tasks(model, tokenizer, args.tasks, options)
        if is_first:
            print(harness.table(facts["tasks"]), flush=True)
    if args.output is not None and is_first:
        write_whole(args.output, json.dumps(facts, indent=1) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="export, a run's --save directory, or a checkpoint")
    add_extension(parser)
    data = parser.add_argument_group("data (default: the validation split of the run; with --tasks, none)")
    source = data.add_mutually_exclusive_group()
    source.add_argument("--data-path", nargs="+", default=[], help="indexed corpora: PREFIX .., or WEIGHT PREFIX ..")
    source.add_argument("--text", nargs="+", help="text files, or files of records with a field `text`")
    data.add_argument("--split", help="split of indexed data; the second part is evaluated; 0,1,0: all of it")
    data.add_argument(
        "--seq-length",
        type=int,
        help="tokens per sequence; default: that of the run; of an export 1024, or its longest if it is less",
    )
    data.add_argument("--seed", type=int, help="seed for the order of indexed data; default: that of the run")
    data.add_argument("--sequences", type=int, default=500, help="maximum number of sequences to evaluate")
    tasks = parser.add_argument_group("lm-eval tasks (pip install -r requirements-eval.txt)")
    tasks.add_argument("--tasks", nargs="+", help="names of tasks; `paper`: those of the MoR paper, with their shots")
    tasks.add_argument("--num-fewshot", type=int, help="examples in the prompt; default: the task's, or the paper's")
    tasks.add_argument("--limit", type=int, help="documents per task, for a trial run")
    tasks.add_argument("--include-path", type=Path, help="directory of additional tasks, in YAML")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per batch")
    parser.add_argument(
        "--router-threshold", type=float, help="expert-choice: score from which a token continues; default: the model's"
    )
    parser.add_argument(
        "--no-fixed-depths", action="store_true", help="skip the modes in which all tokens take the same depth"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", help="default: cuda if available, otherwise cpu")
    parser.add_argument("--output", type=Path, help="write all results as JSON, including the calibration bins")
    args = parser.parse_args(argv)
    for name in ("batch_size", "sequences", "seq_length", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("num_fewshot", "limit", "include_path"):
        if getattr(args, name) is not None and not args.tasks:
            parser.error(f"--{name.replace('_', '-')} does nothing without --tasks")
    for name in ("split", "seed"):
        if getattr(args, name) is not None and args.text:
            parser.error(f"--{name} does nothing with --text")
    return args


def main() -> int:
    """Exit status 0: done; 2: something cannot be read, or a setting does not apply."""
    args = parse()
    import torch.distributed as dist

    try:
        return exit_status(lambda: run(args))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    # Python searches the directory of the script first, and a package that lm-eval imports has this file's name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    sys.exit(main())
