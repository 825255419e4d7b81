"""On an accelerator the engine gives the processor's tokens, and waits once a pass and once a turn.

The accelerator is a pretended one (accelerator.py). It has no graphs, so the functions that would be captured run as
they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from accelerator import Accelerator
from serving_models import LONGEST, VOCAB, model_of
from worker_pool import WorkerPool

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.serving import LLM, Engine, EngineOptions, SamplingParams

PROMPTS = [[(7 * i + n) % VOCAB for i in range(n)] for n in (3, 17, 1, 9, 12)]
OPTIONS = {"lanes": 4, "turn_at": 2, "chunk": 8, "page_size": 4, "max_length": LONGEST}
MOST = {"recursive_sharing": (1, 0), "expert": (1, 1), "token": (1, 1)}
"""Waits of a turn and of a pass."""


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    """One that has the accelerator, which no other test should."""
    pool = WorkerPool(1)
    yield pool
    pool.stop()


def params(number: int) -> SamplingParams:
    """One of the requests has a depth of its own, and does not run in a lane."""
    return SamplingParams(max_tokens=8, ignore_eos=True, depth=1 if number == 3 else None)


def waits(kind: str) -> list[tuple[int, int, list[str]]]:
    """Turns, passes and waits of every step; tokens and depths are compared."""
    accelerator = Accelerator()
    initialize_distributed(Config())
    model, each = model_of(kind), [params(number) for number in range(len(PROMPTS))]
    expected = LLM(model, **OPTIONS).generate(PROMPTS, each)
    model, steps = copy.deepcopy(model), []
    with accelerator:
        accelerator.move(model)
        engine = Engine(model, None, EngineOptions(**OPTIONS))
        assert engine.runner.lanes is not None
        requests = [engine.add(prompt, own) for prompt, own in zip(PROMPTS, each, strict=True)]
        while engine.has_work:
            before = engine.runner.turns, engine.runner.passes
            with accelerator.counting() as found:
                engine.step()
            steps.append((engine.runner.turns - before[0], engine.runner.passes - before[1], found))
    for request, done in zip(requests, expected, strict=True):
        assert tuple(request.generated) == done.tokens
        assert tuple(request.depths) == done.depths
    return steps


@pytest.mark.parametrize("kind", MOST)
def test_a_pass_and_a_turn_are_waited_for_once(process, kind):
    (steps,) = process.run(1, "one", waits, kind)
    a_turn, a_pass = MOST[kind]
    for turns, passes, found in steps:
        assert len(found) <= a_turn * max(turns, 1) + a_pass * passes, found
    assert any(found for _, _, found in steps)
