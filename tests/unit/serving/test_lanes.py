"""The functions of static shapes, which an accelerator replays as CUDA graphs, give what `generate` gives."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from serving_models import KINDS, LONGEST, fewest_bytes, model_of
from test_engine_equals_generate import GREEDY, PROMPTS, same

from mor_megatron.recursion.token_choice import TokenChoice
from mor_megatron.serving import LLM, Engine, EngineOptions, SamplingParams
from mor_megatron.serving.fused import fuse
from mor_megatron.serving.graphs import build_lanes
from mor_megatron.serving.kernel import PLAIN

NEW = 10
FUSED = ("vanilla", "expert_bias_scaled")
WAYS = {
    "depth_wise": {"lanes": 3, "turn_at": 1},
    "few_pages": {"lanes": 5, "turn_at": 2, "chunk": 12, "page_size": 4},
}


def use_lanes(engine: Engine) -> None:
    runner, count = engine.runner, engine.options.lanes
    runner.lanes = build_lanes(runner.model, engine.store, runner.rotation, count, PLAIN, enforce_eager=True)


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, "depth_wise") for kind in KINDS if kind not in FUSED]
    + [(kind, "few_pages") for kind in ("expert", "token_sharing")],
)
def test_lanes_equal_generate(kind: str, way: str):
    model, options = model_of(kind), dict(WAYS[way])
    if way == "few_pages":
        options["kv_bytes"] = fewest_bytes(model, 42, options["page_size"])
    llm = LLM(model, max_length=LONGEST, **options)
    use_lanes(llm.engine)
    prompts = PROMPTS if way == "few_pages" else PROMPTS[::2]
    for done in llm.generate(prompts, GREEDY):
        same(done, kind)
    assert (llm.engine.scheduler.preemptions > 0) == (way == "few_pages")
    for pages in llm.engine.store.kinds:
        assert len(pages.free) + pages.reclaimable() == pages.count


def test_rows_outside_of_lanes_share_passes_and_turns():
    """Requests with a depth of their own, and log-probabilities of whole prompts."""
    llm = LLM(model_of("expert"), lanes=6, turn_at=6)
    use_lanes(llm.engine)
    own = SamplingParams(max_tokens=NEW, logprobs=3, last_depth=True, depth=2)
    done = llm.generate([p for p in PROMPTS[:4] for _ in range(2)], [GREEDY, own] * 4)
    for number, completion in enumerate(done):
        same(completion, "expert", **({"depth": 2} if number % 2 else {}))


def test_a_method_that_needs_the_host_has_no_lanes(monkeypatch, caplog):
    def close(self, r, stream):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(TokenChoice, "close", close)
    served = Engine(model_of("token"), None, EngineOptions(lanes=2))
    with caplog.at_level(logging.WARNING):
        use_lanes(served)
    assert served.runner.lanes is None
    assert "no lanes for routing=token_choice" in caplog.text


@pytest.mark.parametrize("kind", FUSED)
def test_fused_parts_equal_generate(kind: str):
    """With what training fuses on a CPU."""
    llm = LLM(model_of(kind), lanes=3)
    llm.engine.runner.model = fused = fuse(model_of(kind))
    use_lanes(llm.engine)
    names = {type(module).__name__ for module in fused.modules()}
    assert {"FusedNorm", "FusedAttention", "FusedMLP"} <= names
    for done in llm.generate(PROMPTS[::3], GREEDY):
        same(done, kind)


def test_parts_that_compute_something_else_are_not_fused():
    class Quantised(torch.nn.Linear):
        """As `nn.Linear`, but of another type."""

    model = copy.deepcopy(model_of("vanilla"))
    layer = model.model.layers[0]
    layer.mlp.up_proj.__class__ = Quantised
    fused = fuse(model).model.layers
    assert type(fused[0].mlp) is type(layer.mlp)
    assert type(fused[1].mlp) is not type(layer.mlp)
