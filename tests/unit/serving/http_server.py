"""A server in a thread, with a tiny model whose tokens are characters."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from serving_models import VOCAB, model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from traffic import TEMPLATE
from transformers import PreTrainedTokenizerFast

from mor_megatron.serving.engine import Engine, EngineOptions
from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.http.run import Server, bind

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:;!?\n0123456"
KEY = "secret"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Of single characters."""
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS[:VOCAB])}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=TEMPLATE)


def engine_of(kind: str = "expert", longest: int = 2048, **options) -> Engine:
    """An engine, with room for texts that take a while."""
    model = model_of(kind, max_position_embeddings=longest)
    return Engine(model, tokenizer(), EngineOptions(**{"lanes": 4, "page_size": 8, "kv_bytes": 8 << 20, **options}))


@dataclass(frozen=True)
class Running:
    """A server and where it is."""

    url: str
    engine: Engine

    def is_quiet(self) -> bool:
        """Whether no request is left, and all pages are free or the prefix cache's."""
        kinds = self.engine.store.kinds
        return not self.engine.has_work and all(p.used == p.reclaimable() for p in kinds)

    def wait_until_quiet(self, seconds: float = 20) -> None:
        """Fail if requests are left after some time."""
        deadline = time.monotonic() + seconds
        while not self.is_quiet():
            assert time.monotonic() < deadline, "requests are left"
            time.sleep(0.01)


@contextmanager
def running(engine: Engine | None = None, **options) -> Iterator[Running]:
    """A server at a free port."""
    engine = engine or engine_of()
    options = ServerOptions(**{"name": "tiny", "port": 0, **options})
    server = Server(engine, options)
    with bind(options) as bound:
        bound.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", engine)
        finally:
            server.should_exit = True
            thread.join()
