"""Requests come, go and are cancelled at random: each gets what it would get alone, and no page is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving_models import VOCAB, Expected, expected, fewest_bytes, model_of

from mor_megatron.serving import Engine, EngineOptions, Event, Request, SamplingParams

NEW = 7
SCHEDULED = ("expert_additive", "token", "expert_sharing", "recursive", "expert_mlp_cycle")
_generator = torch.Generator().manual_seed(5)
_ids = torch.randint(0, VOCAB, (30,), generator=_generator).tolist()
PROMPTS = tuple(
    tuple(ids)
    for ids in (_ids[:1], _ids[:8], _ids[:12], _ids[:16], _ids[:13], [*_ids[:12], 3, 1], _ids[20:27], _ids[5:17])
)
"""Some begin alike; lengths are just a number of pages, or not."""


@dataclass
class Client:
    """A request, and what was heard of it."""

    prompt: int
    arrives: int
    leaves: int | None
    new: int
    last_depth: bool
    events: list[Event] = field(default_factory=list)
    request: Request | None = None

    def start(self, engine: Engine) -> None:
        params = SamplingParams(max_tokens=self.new, logprobs=0, last_depth=self.last_depth)
        self.request = engine.add(list(PROMPTS[self.prompt]), params, self.events.append)

    def check(self, wanted: Expected) -> None:
        """Against the same prompt alone."""
        request, events = self.request, self.events
        was_cancelled = request.finish_reason == "cancelled"
        assert request.finish_reason == "length" or (was_cancelled and self.leaves is not None)
        assert was_cancelled or len(request.generated) == self.new
        assert tuple(request.generated) == wanted.tokens[: len(request.generated)]
        assert tuple(request.depths) == wanted.depths[: len(request.depths)]
        assert self.leaves is not None or len(request.depths) == len(request.tokens) - (not self.last_depth)
        assert [event.token for event in events if event.token is not None] == request.generated
        assert "".join(event.text for event in events) == request.shown
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [request.finish_reason]
        for i, event in enumerate(events):
            if event.token is not None:
                at = len(request.prompt) + i - 1
                assert event.depth == wanted.depths[at]
                logprob = wanted.logprobs[at, event.token].item()
                assert event.logprob.token == pytest.approx(logprob, abs=1e-6)  # reported in fp32


clients = st.builds(
    Client,
    prompt=st.integers(0, len(PROMPTS) - 1),
    arrives=st.integers(0, 20),
    leaves=st.one_of(st.none(), st.none(), st.integers(0, 40)),
    new=st.integers(1, NEW),
    last_depth=st.booleans(),
)
ways = st.fixed_dictionaries(
    {
        "lanes": st.integers(1, 5),
        "turn_at": st.integers(1, 5),
        "chunk": st.sampled_from((2, 5, 8, 40)),
        "page_size": st.sampled_from((1, 2, 3, 4, 12)),
        "prefix_cache": st.booleans(),
    }
)


def run(kind: str, crowd: list[Client], way: dict, spare: float | None) -> Engine:
    """All clients, each starting and leaving at its step.

    Args:
        spare: pages beyond what the longest request needs, as a fraction of these; None: as many as can be used.
    """
    model = model_of(kind, torch.float64)
    if spare is not None:
        way = {**way, "kv_bytes": int(fewest_bytes(model, 16 + NEW, way["page_size"]) * (1 + spare))}
    engine = Engine(model, None, EngineOptions(**way))
    step = 0
    while engine.has_work or any(client.request is None for client in crowd):
        for client in crowd:
            if client.arrives == step:
                client.start(engine)
            if client.leaves is not None and max(client.leaves, client.arrives) == step:
                engine.cancel(client.request)
        engine.step()
        step += 1
        assert step < 5000
    return engine


def check(kind: str, crowd: list[Client], way: dict, spare: float | None) -> None:
    engine = run(kind, crowd, way, spare)
    wanted = expected(kind, PROMPTS, NEW, torch.float64)
    for client in crowd:
        client.check(wanted[client.prompt])
    if engine.prefixes is not None:
        engine.prefixes.clear()
    assert engine.runner.cohorts == []
    for pages in engine.store.kinds:
        assert sorted(pages.free) == list(range(1, pages.count + 1))
        assert not pages.references.any()
        assert not pages.cached.any()
        assert not pages.rows[:-1].any()


crowds = given(
    kind=st.sampled_from(SCHEDULED),
    crowd=st.lists(clients, min_size=1, max_size=4),
    way=ways,
    spare=st.one_of(st.none(), st.floats(0, 1)),
)
patient = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=[Phase.generate]
)


@settings(patient, max_examples=120)
@crowds
def test_every_schedule_gives_what_each_gets_alone(kind, crowd, way, spare):
    check(kind, crowd, way, spare)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(patient, max_examples=10_000)
@crowds
def test_ten_thousand_schedules(kind, crowd, way, spare):
    check(kind, crowd, way, spare)
