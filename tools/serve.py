"""Serve a model over HTTP by OpenAI's protocol, with a page to try it at /. See docs/serving.md.

python tools/serve.py --model mor-export
python tools/serve.py --model runs/mor --port 8080 --max-num-seqs 64 --served-model-name mor
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mor_megatron.command import DTYPES, add_extension, exit_status, load_extension

_KEY = "MOR_API_KEY"
_ENGINE = ("lanes", "turn_at", "max_length", "chunk", "page_size", "kv_bytes", "prefix_cache", "attention")
_SERVER = ("name", "host", "port", "api_key", "max_waiting", "max_logprobs", "max_body_size", "shutdown_timeout")


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal.

    Raises:
        ValueError: packages or the model are missing, or a setting does not fit.
        OSError: the address is taken, or the chat template cannot be read.
    """
    try:
        from mor_megatron.serving.http.run import serve
    except ImportError as error:
        if (error.name or "").startswith("mor_megatron"):
            raise
        raise ValueError(f"{error.name} is not installed: pip install -r requirements-serve.txt") from error
    from mor_megatron.inference.loading import load_model
    from mor_megatron.serving.engine import Engine, EngineOptions
    from mor_megatron.serving.http.options import ServerOptions

    def given(names: tuple[str, ...]) -> dict:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    template = None if args.chat_template is None else args.chat_template.read_text(encoding="utf-8")
    options = ServerOptions(**{"name": args.model.resolve().name, **given(_SERVER)})
    engine_options = EngineOptions(**given(_ENGINE))
    load_extension(args)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    if template is not None:
        if tokenizer is None:
            raise ValueError("chat-template needs a tokenizer, and this model has none: leave it out")
        tokenizer.chat_template = template
    return serve(Engine(model, tokenizer, engine_options), options)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line, with vLLM's names where it has one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="export, a run's --save directory, or a checkpoint")
    add_extension(parser)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", help="default: cuda if available, otherwise cpu")
    server = parser.add_argument_group("server")
    server.add_argument("--host", help="address to listen at; default 127.0.0.1, this machine only")
    server.add_argument("--port", type=int, help="default 8000; 0: any free one, which is printed")
    server.add_argument("--api-key", help=f"what clients must send; default ${_KEY}; without any, nothing")
    server.add_argument("--served-model-name", dest="name", help="default: the last part of --model")
    server.add_argument("--chat-template", type=Path, help="Jinja file; default: the tokenizer's own")
    server.add_argument("--max-waiting", type=int, help="requests that wait for a lane, before 429; default 256")
    server.add_argument("--max-logprobs", type=int, help="most likely tokens a request may ask for; default 20")
    server.add_argument("--max-body-size", type=int, help="bytes of a request, before 413; default 8 MiB")
    server.add_argument("--shutdown-timeout", type=int, help="seconds to drain after SIGTERM; default 60")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-model-len", dest="max_length", type=int, help="tokens of a sequence; default: the model's"
    )
    engine.add_argument("--max-num-seqs", dest="lanes", type=int, help="sequences that run at a time; default 32")
    engine.add_argument(
        "--max-num-batched-tokens", dest="chunk", type=int, help="rows of prompts inside the model; default 256"
    )
    engine.add_argument("--block-size", dest="page_size", type=int, help="rows of a page; default 16")
    engine.add_argument(
        "--kv-cache-memory-bytes", dest="kv_bytes", type=int, help="default: enough for all sequences at their longest"
    )
    engine.add_argument(
        "--enable-prefix-caching", dest="prefix_cache", action=argparse.BooleanOptionalAction, default=True
    )
    engine.add_argument("--turn-at", type=int, help="sequences that wait for the outer layers; default half of all")
    engine.add_argument("--attention-backend", dest="attention", choices=("auto", "native", "torch"))
    args = parser.parse_args(argv)
    args.api_key = args.api_key or os.environ.get(_KEY) or None
    return args


def main() -> int:
    """Exit status 0: stopped by a signal; 1: the engine failed; 2: something does not fit or cannot be read."""
    args = parse()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
