"""What the programs in tools/ share. A user's error is one line on stderr and an exit status.

Programs import torch only after they have read their arguments: --help and a wrong flag should not wait for it.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Value of --dtype -> torch's name."""


def add_extension(parser: ArgumentParser) -> None:
    """The option --extension, for programs that read models of transformers; checkpoints name theirs themselves."""
    text = "Python file with the routing method or sharing strategy of a model (docs/extending.md)"
    parser.add_argument("--extension", help=text)


def load_extension(arguments: Namespace) -> None:
    """Load the file of --extension, if the option is given.

    Raises:
        ValueError: the file cannot be loaded.
    """
    if arguments.extension is not None:
        from mor_megatron.config.extension import load_extension as load

        load(arguments.extension)


def add_server(parser: ArgumentParser) -> None:
    """Options of a server and its engine, with vLLM's names where it has one; `serving.http.build` reads them."""
    parser.add_argument("--model", type=Path, required=True, help="export, a run's --save directory, or a checkpoint")
    add_extension(parser)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", help="default: cuda if available, otherwise cpu")
    server = parser.add_argument_group("server")
    server.add_argument("--host", help="address to listen at; default 127.0.0.1, this machine only")
    server.add_argument("--port", type=int, help="default 8000; 0: any free one, which is printed")
    key = "MOR_API_KEY"
    server.add_argument(
        "--api-key",
        default=os.environ.get(key) or None,
        help=f"what clients must send; default ${key}; without any, nothing",
    )
    server.add_argument("--served-model-name", dest="name", help="default: the last part of --model")
    server.add_argument("--chat-template", type=Path, help="Jinja file; default: the tokenizer's own")
    server.add_argument("--max-waiting", type=int, help="requests that wait for a lane, before 429; default 256")
    server.add_argument("--max-logprobs", type=int, help="most likely tokens a request may ask for; default 20")
    server.add_argument("--max-body-size", type=int, help="bytes of a request, before 413; default 8 MiB")
    server.add_argument("--receive-timeout", type=int, help="seconds for the body of a request, before 408; default 60")
    server.add_argument("--send-timeout", type=int, help="seconds for a client that takes nothing; default 60")
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
    engine.add_argument("--enable-prefix-caching", dest="prefix_cache", action=BooleanOptionalAction, default=True)
    engine.add_argument("--turn-at", type=int, help="sequences that wait for the outer layers; default: automatic")
    engine.add_argument("--attention-backend", dest="attention", choices=("auto", "native", "torch"))
    engine.add_argument("--enforce-eager", action="store_true", help="on a GPU, launch kernels without CUDA graphs")


def exit_status(work: Callable[[], int | None], failures: tuple[type[ValueError], ...] = ()) -> int:
    """Run a command.

    Args:
        work: the command; returns its exit status, None for 0.
        failures: errors that are a result (status 1) rather than a mistake of the user (status 2).
    Returns:
        The status from `work`; 1 or 2 after a ValueError, whose message is printed; 2 after an OSError, with its file.
    """
    try:
        return work() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, failures) else 2
    except OSError as error:
        reason = error.strerror or str(error)
        # write(2) names no file.
        print(f"error: {reason if error.filename is None else f'{error.filename} ({reason})'}", file=sys.stderr)
        return 2
