"""The engine computes what `generate` computes, for every kind of model and every way to run it."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from serving_models import KINDS, LONGEST, TOLERANCE, VOCAB, expected, fewest_bytes, model_of

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.recursion.methods import METHODS
from mor_megatron.recursion.plan import STRATEGIES
from mor_megatron.serving import LLM, Completion, SamplingParams

EXTENSION = Path(__file__).parents[3] / "examples" / "extension" / "parity.py"
NEW = 10
WAYS = {
    "depth_wise": {"lanes": 3, "turn_at": 1},
    "lock_step_parts": {"lanes": 4, "turn_at": 4, "chunk": 5, "page_size": 4},
    "torch": {"lanes": 9, "turn_at": 3, "chunk": 16, "page_size": 3, "attention": "torch"},
    "few_pages": {"lanes": 5, "turn_at": 2, "chunk": 12, "page_size": 4},
}
GREEDY = SamplingParams(max_tokens=NEW, logprobs=3, last_depth=True)


_random = random.Random(1)
PROMPTS = tuple(tuple(_random.randrange(VOCAB) for _ in range(n)) for n in (1, 30, 2, 9, 8, 17, 4, 30, 16))


def same(done: Completion, kind: str, **options) -> None:
    """Tokens, depths and log-probabilities."""
    wanted = expected(kind, PROMPTS, NEW, **options)[PROMPTS.index(done.prompt)]
    assert done.tokens == wanted.tokens
    assert done.depths == wanted.depths
    for i, report in enumerate(done.logprobs):
        row = wanted.logprobs[len(done.prompt) - 1 + i]
        assert report.token == pytest.approx(row[done.tokens[i]].item(), abs=TOLERANCE)
        assert list(report.top) == row.topk(3).indices.tolist()
        assert list(report.top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, way) for kind in KINDS for way in ("depth_wise", "few_pages")),
        *((kind, way) for kind in ("expert", "token_sharing") for way in ("lock_step_parts", "torch")),
    ],
)
def test_engine_equals_generate(kind: str, way: str):
    model, options = model_of(kind), dict(WAYS[way])
    if way == "few_pages":
        options["kv_bytes"] = fewest_bytes(model, 42, options["page_size"])
    llm = LLM(model, max_length=LONGEST, **options)
    for done in llm.generate(PROMPTS, GREEDY):
        same(done, kind)
        assert done.finish_reason == "length"
    assert (llm.engine.scheduler.preemptions > 0) == (way == "few_pages")
    for pages in llm.engine.store.kinds:
        assert len(pages.free) + pages.reclaimable() == pages.count


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("recursive", {"depth": 2}),
        ("token", {"depth": 1}),
        ("expert", {"router_threshold": 0.3}),
        ("expert_sharing", {"router_threshold": 0.8}),
    ],
    ids=str,
)
def test_routing_options_of_a_request(kind: str, options: dict):
    """Beside requests without them, in one engine."""
    llm = LLM(model_of(kind), lanes=6, turn_at=2)
    plain, own = GREEDY, SamplingParams(max_tokens=NEW, logprobs=3, last_depth=True, **options)
    done = llm.generate([prompt for prompt in PROMPTS for _ in range(2)], [plain, own] * len(PROMPTS))
    for number, completion in enumerate(done):
        same(completion, kind, **(options if number % 2 else {}))


@pytest.fixture
def parity():
    """examples/extension/parity.py, loaded for one test."""
    before = [dict(table) for table in (METHODS, STRATEGIES)]
    sys.modules["parity"] = module = ModuleType("parity")  # where dataclasses look up the types of their fields
    exec(compile(EXTENSION.read_text(), EXTENSION, "exec"), module.__dict__)
    yield {"routing": "parity", "sharing_strategy": "late_cycle", "num_recursions": 3, "num_hidden_layers": 7}
    del sys.modules["parity"]
    for table, old in zip((METHODS, STRATEGIES), before, strict=True):
        table.clear()
        table.update(old)


def assert_greedy(done: Completion, model: MoRForCausalLM) -> None:
    """Each token is the most likely one in a pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([[*done.prompt, *done.tokens]])).logits
    assert logits[0, len(done.prompt) - 1 : -1].argmax(1).tolist() == list(done.tokens)


def test_an_extension_is_served(parity: dict):
    model = model_of("parity", **parity)
    for done in LLM(model, lanes=4, turn_at=1, chunk=8).generate(PROMPTS, GREEDY):
        assert done.depths == tuple(3 if token % 2 == 0 else 1 for token in (*done.prompt, *done.tokens))
        assert_greedy(done, model)


def test_a_layer_that_a_recursion_runs_twice_has_keys_of_each_use(monkeypatch):
    layers = [(0, 0), (1, 0), (0, 0), (0, 1), (1, 1), (0, 1)]
    monkeypatch.setitem(STRATEGIES, "there_and_back", lambda depth, num_recursions: layers)
    settings = {"num_recursions": 2, "sharing_strategy": "there_and_back", "num_hidden_layers": 6}
    model = model_of("there_and_back", **settings, routing="token_choice")
    for done in LLM(model, lanes=4, turn_at=1, chunk=8).generate(PROMPTS, GREEDY):
        assert_greedy(done, model)


def test_prompt_logprobs():
    kind = "expert"
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    for done in LLM(model_of(kind), lanes=3, chunk=7, page_size=4).generate(PROMPTS * 2, params):
        assert done.tokens == ()
        assert done.finish_reason == "length"
        assert len(done.prompt_logprobs) == len(done.prompt)
        assert done.prompt_logprobs[0] is None
        row = expected(kind, PROMPTS, NEW)[PROMPTS.index(done.prompt)].logprobs
        for i, report in enumerate(done.prompt_logprobs[1:]):
            assert report.token == pytest.approx(row[i, done.prompt[i + 1]].item(), abs=TOLERANCE)
            assert list(report.top) == row[i].topk(2).indices.tolist()
