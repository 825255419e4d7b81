"""Continue a text token by token, or a file of prompts, many at once. See docs/inference.md.

python tools/generate.py --model mor-export --prompt "The sea" --show-depth
python tools/generate.py --model runs/mor --input prompts.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from mor_megatron.command import DTYPES, add_extension, exit_status, load_extension
from mor_megatron.files import whole_file, write_whole

_OPTIONS = ("temperature", "top_k", "top_p", "depth", "router_threshold")


def run(args: argparse.Namespace) -> None:
    """Print one text as it is generated, or write the continuations of a file of prompts.

    Raises:
        ValueError: the model or the prompts cannot be read, or a setting does not apply.
    """
    import torch

    from mor_megatron.inference.batch import read_prompts
    from mor_megatron.inference.loading import continuation, document_start, encode, load_model

    prompts = None if args.prompts is None else read_prompts(args.prompts)
    load_extension(args)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    torch.manual_seed(args.seed)
    options = {name: getattr(args, name) for name in _OPTIONS}
    if prompts is None:
        _stream(args, model, tokenizer, options)
        return
    ids = [
        encode(prompt, tokenizer, model.config.vocab_size) if prompt else document_start(model) for prompt in prompts
    ]
    with ExitStack() as stack:
        out = sys.stdout if args.output is None else stack.enter_context(whole_file(args.output))
        for prompt, begun, one in zip(prompts, ids, _continue(args, model, tokenizer, ids, options), strict=True):
            text = continuation(begun, one.tokens, tokenizer)
            depth = round(sum(one.depths) / len(one.depths), 3) if one.depths else None
            record = {"prompt": prompt, "continuation": text, "tokens": len(one.tokens), "mean_depth": depth}
            print(json.dumps(record | {"finished": one.is_finished}, ensure_ascii=False), file=out, flush=True)


def _continue(args: argparse.Namespace, model, tokenizer, prompts: list[list[int]], options: dict) -> Iterator:
    """`Continuation`s by the engine; in static batches if the engine does not take the model."""
    from mor_megatron.inference.batch import Continuation, generate_all
    from mor_megatron.inference.generation import sampling
    from mor_megatron.serving import LLM, SamplingParams

    sampling(args.temperature, args.top_k, args.top_p)  # refuses what does not apply
    lanes = args.batch_size or 32
    longest = min(max(map(len, prompts)) + args.max_new_tokens, model.config.max_position_embeddings)
    try:
        llm = LLM(model, tokenizer, lanes=min(lanes, len(prompts)), max_length=longest)
    except ValueError as refusal:
        print(f"static batches: {refusal}", file=sys.stderr)
        yield from generate_all(model, prompts, lanes, args.max_new_tokens, **options)
        return
    given = {name: value for name, value in options.items() if value is not None}
    params = [
        SamplingParams(max_tokens=args.max_new_tokens, seed=args.seed + i, last_depth=True, **given)
        for i in range(len(prompts))
    ]
    for done in llm.stream(prompts, params, progress=sys.stderr.isatty()):
        is_finished = done.finish_reason == "stop"
        tokens, depths = done.tokens, done.depths[len(done.prompt) :]
        yield Continuation(*((x[:-1] for x in (tokens, depths)) if is_finished else (tokens, depths)), is_finished)


def _stream(args: argparse.Namespace, model, tokenizer, options: dict) -> None:
    from mor_megatron.inference import show
    from mor_megatron.inference.generation import Token, generate
    from mor_megatron.inference.loading import StreamDecoder, document_start, encode

    prompt = encode(args.prompt, tokenizer, model.config.vocab_size) if args.prompt else document_start(model)
    count = model.config.num_recursions
    decoder, tokens = StreamDecoder(tokenizer), []

    def print_token(token: Token) -> None:
        piece = decoder.next(token.id)
        tokens.append((piece, token.depth))
        print(show.terminal(piece, token.depth, count) if args.show_depth else piece, end="", flush=True)

    if args.show_depth:
        print(show.legend(count))
    cache = generate(model, prompt, args.max_new_tokens, print_token, **options)
    print(decoder.rest())
    if args.show_depth:
        mean = sum(depth for _, depth in tokens) / len(tokens)
        print(f"mean depth {mean:.2f} of {count}; keys and values {cache.nbytes() / 2**20:.2f} MiB", file=sys.stderr)
    if args.html is not None:
        write_whole(args.html, show.page(tokens, count, f"Depth of each token, {args.model.name}"))


def main() -> int:
    """Exit status 0: done; 2: the model or the prompts cannot be read, or a setting does not apply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="export, a run's --save directory, or a checkpoint")
    add_extension(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", help="text, or ids if the model has no tokenizer; default: the beginning of a document"
    )
    source.add_argument(
        "--input",
        "--prompts",
        dest="prompts",
        type=Path,
        help="file with one prompt per line, or records with a field `prompt`",
    )
    parser.add_argument("--batch-size", type=int, help="--input: prompts at a time; default 32")
    parser.add_argument("--output", type=Path, help="--input: file for the JSON lines; default: the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: take the most likely token; above 0: sample")
    parser.add_argument("--top-k", type=int, help="sample from this number of most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--depth", type=int, help="recursions that every token takes; default: the router decides")
    parser.add_argument(
        "--router-threshold", type=float, help="expert-choice: score from which a token continues; default 0.5"
    )
    parser.add_argument("--show-depth", action="store_true", help="colour each token by its depth")
    parser.add_argument("--html", type=Path, help="write the coloured text as an HTML page")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", help="default: cuda if available, otherwise cpu")
    args = parser.parse_args()
    for name in ("batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("show_depth", "html") if args.prompts else ("batch_size", "output"):
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} goes {'with one --prompt' if args.prompts else 'with --input'}")
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
