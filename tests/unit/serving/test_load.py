"""A crowd of clients at once, some of whom leave or send nonsense, and too few pages for them."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time

from http_server import engine_of, running, tokenizer
from quiet import QuietRun
from serving_models import fewest_bytes, model_of
from traffic import send, visits

from mor_megatron.serving import Request

LONGEST = 64
MOST_BODY = 10_000


def requests() -> list[Request]:
    """All that the process remembers."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, Request)]


def test_a_crowd_gets_what_each_gets_alone():
    """And nothing of it is left behind."""
    model = model_of("expert")
    few = int(1.3 * fewest_bytes(model, LONGEST, 2))
    plan = visits(40, 1000.0, LONGEST, MOST_BODY)
    others = requests()  # of tests before
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    engine = engine_of(longest=LONGEST, lanes=8, page_size=2, kv_bytes=few)
    with running(engine, max_body_size=MOST_BODY) as server:
        answers = asyncio.run(send(plan, [server.url]))
        server.wait_until_quiet()
        deadline = time.monotonic() + 20  # the last clients may not have noticed yet
        while len(requests()) > len(others):
            assert time.monotonic() < deadline, "requests are remembered"
            time.sleep(0.05)
    assert threading.active_count() <= before[0]
    assert len(os.listdir("/proc/self/fd")) <= before[1]
    alone = QuietRun(model, tokenizer())
    for visit, answer in zip(plan, answers, strict=True):
        wanted = "malformed" if visit.fault else "answered" if visit.leaves_after is None else "left"
        assert answer.outcome in (wanted, "answered"), answer
        if visit.fault is None and (found := alone.difference(visit, answer)) is not None:
            assert alone.is_rounding(visit, answer), found
