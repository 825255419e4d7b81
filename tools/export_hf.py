"""Turn a checkpoint of any layout into a directory that transformers loads. See docs/inference.md."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from mor_megatron.command import DTYPES, exit_status
from mor_megatron.files import write_whole


def run(args: argparse.Namespace) -> Path:
    """Export, verify, and then write the model card.

    Raises:
        ValueError: the checkpoint cannot be read, the output cannot be written, or the export does not match.
    """
    from mor_megatron.huggingface.card import write_card
    from mor_megatron.huggingface.export import read_checkpoint, to_model, write
    from mor_megatron.huggingface.tokenizer import export_tokenizer
    from mor_megatron.huggingface.unrolled import to_llama, unrolling
    from mor_megatron.huggingface.verify import EXTRACT, compare

    checkpoint = read_checkpoint(args.load)
    config = checkpoint.config
    is_llama, tokenizer, comparison = args.family == "llama", None, None
    if not args.no_tokenizer:
        longest, trained = config.model.max_position_embeddings, checkpoint.is_trained
        tokenizer = export_tokenizer(config.data, longest, own_padding=not is_llama, trained=trained)
    facts = (checkpoint.weights, config, tokenizer)

    def build():
        return to_llama(*facts, args.depth) if is_llama else to_model(*facts)

    if args.verify:
        trial = args.output.with_name(args.output.name + ".verify")
        shutil.rmtree(trial, ignore_errors=True)
        try:
            write(build(), tokenizer, trial)
            text = EXTRACT if args.verify_text is None else args.verify_text.read_text()
            comparison = compare(trial, *facts, text, depth=args.depth)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        print(f"export and training stack on {comparison}", flush=True)
    model = build()
    card = write_card(model, checkpoint, comparison)
    if is_llama:
        print(unrolling(model, config), flush=True)
    output = write(model, tokenizer, args.output, args.dtype)
    write_whole(output / "README.md", card)
    return output


def main() -> int:
    """Exit status 0: exported; 1: the export does not match; 2: something cannot be read or written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True, help="a run's --save directory, or one checkpoint in it")
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    parser.add_argument(
        "--as",
        dest="family",
        choices=("mor", "llama"),
        default="mor",
        help="llama: LlamaForCausalLM, for models without routing; shared layers are copied to each position",
    )
    parser.add_argument("--depth", type=int, help="--as llama: recursions that every token takes; default: all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="dtype of the stored weights")
    parser.add_argument("--no-tokenizer", action="store_true", help="export weights and code only")
    parser.add_argument("--verify", action="store_true", help="compare the export with the training stack on real text")
    parser.add_argument("--verify-text", type=Path, help="text file for --verify; default: Python's documentation")
    args = parser.parse_args()
    if args.verify_text is not None and not args.verify:
        parser.error("--verify-text does nothing without --verify")
    if args.depth is not None and args.family != "llama":
        parser.error("--depth needs --as llama: other exports choose the depth when they run")
    from mor_megatron.huggingface.verify import AnotherModelError

    return exit_status(lambda: print(f"{args.load} -> {run(args)}"), failures=(AnotherModelError,))


if __name__ == "__main__":
    sys.exit(main())
