"""Single cases: cached prompts, preemption, limits, ends, events, threads, refusals."""

from __future__ import annotations

import queue
import threading
from collections import deque

import pytest
import torch
from serving_models import LONGEST, VOCAB, fewest_bytes, model_of

from mor_megatron.serving import LLM, Engine, EngineOptions, SamplingParams

KIND = "expert"
TEXT = tuple(torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(11)).tolist())


def engine(**options) -> Engine:
    return Engine(model_of(KIND), None, EngineOptions(**{"lanes": 2, "turn_at": 1, "page_size": 4, **options}))


def run(engine: Engine, prompt, **params):
    request = engine.add(list(prompt), SamplingParams(**{"max_tokens": 6, **params}))
    engine.drain()
    return request


def test_prompt_of_whole_pages_that_is_all_cached():
    """One token must be computed all the same: its logits choose the next."""
    served = engine()
    first, second = run(served, TEXT[:12]), run(served, TEXT[:12])
    assert (first.cached, second.cached) == (0, 8)
    assert second.generated == first.generated
    assert second.depths == first.depths
    assert run(served, TEXT[:13]).cached == 12


def test_a_continuation_is_cached_for_the_next_turn_of_a_chat():
    served = engine()
    first = run(served, TEXT[:10])
    second = run(served, [*first.tokens, 5, 6, 7])
    assert second.cached == 12  # of the 15 tokens that the first request left, whole pages
    assert second.generated == run(engine(), [*first.tokens, 5, 6, 7]).generated


def test_a_prefix_belongs_to_its_routing_options():
    served = engine()
    run(served, TEXT[:12])
    assert run(served, TEXT[:12], depth=1).cached == 0
    assert run(served, TEXT[:12], router_threshold=0.4).cached == 0
    assert run(served, TEXT[:12], prompt_logprobs=0).cached == 0  # its logits are needed


def test_preempted_request_finds_its_own_pages_and_follows_its_depths():
    served = engine(lanes=1)
    request = served.add(list(TEXT[:9]), SamplingParams(max_tokens=20))
    while len(request.generated) < 10:
        served.step()
    before = list(request.depths)
    served.scheduler.preempt(request)
    served.step()
    assert (request.preemptions, request.done) == (1, 16)
    assert request.cached == 0  # when it was first admitted
    served.prefixes.clear()
    served.scheduler.preempt(request)
    flipped = [3 - depth % 3 for depth in before]  # no router would say so
    request.depths = list(flipped)
    served.drain()
    assert request.depths[: len(flipped)] == flipped
    assert len(request.generated) == 20


def test_requests_that_enter_together_fit_together():
    """Their pages are taken one chunk at a time, but are counted before."""
    room = fewest_bytes(model_of(KIND), 40, 4)
    served = engine(lanes=8, chunk=4, kv_bytes=room, prefix_cache=False)
    made = [served.add(list(TEXT[i : i + 16]), SamplingParams(max_tokens=1)) for i in range(8)]
    served.drain()
    assert served.status().preemptions == 0
    assert [request.generated for request in made] == [
        run(engine(), request.prompt, max_tokens=1).generated for request in made
    ]


def test_limits():
    served = engine(max_length=20)
    assert run(served, TEXT[:19], max_tokens=9).finish_reason == "length"
    assert len(run(served, TEXT[:15], max_tokens=9).generated) == 5
    with pytest.raises(ValueError, match=r"prompt of 20 tokens leaves no room .* max_length=20"):
        served.add(list(TEXT[:20]))
    with pytest.raises(ValueError, match="prompt is empty"):
        served.add([])
    with pytest.raises(ValueError, match=f"prompt has {VOCAB}, which is not an id"):
        served.add([VOCAB])
    few = engine(kv_bytes=fewest_bytes(model_of(KIND), 12, 4))
    with pytest.raises(ValueError, match=r"room for 12 tokens that take all recursions: use fewer"):
        few.add(list(TEXT[:9]), SamplingParams(max_tokens=4))
    assert run(few, TEXT[:9], max_tokens=3).finish_reason == "length"
    assert run(served, TEXT[:5], max_tokens=0).finish_reason == "length"


@pytest.mark.parametrize("streamed", [True, False])
def test_ends(streamed: bool):
    """A token, an end of sequence and a string; with the events, and without."""
    served, heard = engine(), []

    def end(**params):
        heard.clear()
        on_event = heard.append if streamed else None
        request = served.add(list(TEXT[:7]), SamplingParams(max_tokens=10, **params), on_event)
        served.drain()
        if streamed:
            assert [event.finish_reason for event in heard][:-1] == [None] * (len(heard) - 1)
            assert heard[-1].finish_reason == request.finish_reason
            assert "".join(event.text for event in heard) == request.shown
        return request

    plain = end()
    tokens = plain.generated
    assert (plain.finish_reason, plain.stopped_by) == ("length", None)
    assert tokens[3] not in tokens[:3]
    by_id = end(stop_token_ids=[tokens[3]])
    assert (by_id.generated, by_id.finish_reason, by_id.stopped_by) == (tokens[:4], "stop", tokens[3])
    assert by_id.shown == "".join(f"{token} " for token in tokens[:3])
    served.ends = {tokens[3]}
    assert end().generated == tokens[:4]
    assert end(ignore_eos=True).generated == tokens
    later = end(min_tokens=7)
    assert len(later.generated) >= 7
    assert tokens[3] not in later.generated[:7]
    served.ends = set()
    string = f" {tokens[2]} {tokens[3]}"
    by_text = end(stop=["never", string])
    assert (by_text.finish_reason, by_text.stopped_by) == ("stop", string)
    assert by_text.shown + string == "".join(f"{token} " for token in tokens[:4]).rstrip()


def test_cancelled_requests_leave_nothing():
    served = engine()
    requests = [served.add(list(TEXT[:n]), SamplingParams(max_tokens=30)) for n in (9, 12, 5, 30)]
    for steps, request in zip((0, 3, 4, 1), requests, strict=True):
        for _ in range(steps):
            served.step()
        served.cancel(request)
    served.drain()
    served.cancel(requests[0])  # once more, when it has ended
    served.drain()
    done = served.add(list(TEXT[:5]), SamplingParams(max_tokens=2, last_depth=True))
    while done.finish_reason is None:
        served.step()
    served.scheduler.preempt(done)  # it would pass the model once more, for its last depth only
    served.cancel(done)
    served._read_inbox()
    assert (served.has_work, done.finish_reason) == (False, "length")
    assert {request.finish_reason for request in requests} == {"cancelled"}
    served.prefixes.clear()
    assert all(len(pages.free) == pages.count for pages in served.store.kinds)


def test_a_request_that_comes_and_goes_while_the_inbox_is_read():
    """Added and cancelled by another thread just when nothing more was found."""
    served, late = engine(), []

    class Inbox(deque):
        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found and not late:
                late.append(served.add(list(TEXT[:5])))
                served.cancel(late[0])
            return found

    served._inbox = Inbox()
    served.step()
    served.drain()
    assert late[0].finish_reason == "cancelled"


def test_status():
    served = engine(lanes=3, turn_at=2)
    run(served, TEXT[:12])
    for prompt in (TEXT[:13], TEXT[:5], TEXT[20:30], TEXT[30:]):
        served.add(list(prompt), SamplingParams(max_tokens=4))
    assert (served.status().waiting, served.status().running) == (4, 0)
    served.step()
    status = served.status()
    assert (status.waiting, status.running, status.cached_tokens, status.prompt_tokens) == (1, 3, 12 + 4, 40)
    assert sum(status.rows) > 0
    assert 0 < status.kv_use < 1
    served.drain()
    assert (served.status().running, served.status().kv_use, sum(served.status().rows)) == (0, 0, 0)


def test_requests_come_from_other_threads():
    served, events = engine(lanes=3), queue.Queue()

    def serve():
        while not served._closed or served.has_work:
            served.wait(timeout=5)
            served.drain()

    thread = threading.Thread(target=serve)
    thread.start()
    requests = [served.add(list(TEXT[:n]), SamplingParams(max_tokens=4), events.put) for n in (3, 8, 20)]
    heard = [events.get(timeout=60) for _ in range(12)]
    served.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
    for request in requests:
        assert [event.token for event in heard if event.request is request] == request.generated
    with pytest.raises(ValueError, match="the engine is closed"):
        served.add([1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="kv_mode=sharing_update replaces keys"):
        LLM(model_of("refused", num_recursions=3, routing="expert_choice", kv_mode="sharing_update"))
    with pytest.raises(ValueError, match="sharing_strategy=middle_sequence does not repeat one block"):
        LLM(model_of("refused", num_recursions=3, sharing_strategy="middle_sequence", num_hidden_layers=8))
    with pytest.raises(ValueError, match=f"max_length=65 exceeds the model's max_position_embeddings={LONGEST}"):
        engine(max_length=65)
    with pytest.raises(ValueError, match="kv_bytes=1000 has no room for a page of each recursion"):
        engine(kv_bytes=1000)
    with pytest.raises(ValueError, match="depth=4 must be between 1 and num_recursions=3"):
        engine().add([1], SamplingParams(depth=4))
    with pytest.raises(ValueError, match=r"top_p=1.5 is out of range"):
        SamplingParams(top_p=1.5)
    assert SamplingParams(stop="ab").stop == ("ab",)
    with pytest.raises(ValueError, match="lanes=0 is out of range: use 1 or more"):
        EngineOptions(lanes=0)
    with pytest.raises(ValueError, match="params has 1 values for 2 prompts"):
        LLM(model_of(KIND)).generate([[1], [2]], [SamplingParams()])


def test_model_from_a_directory_and_prompts_as_text(tmp_path):
    model_of(KIND).save_pretrained(tmp_path)
    (done,) = LLM(tmp_path, lanes=2).generate(["3 1 4"], SamplingParams(max_tokens=5))
    (same,) = LLM(model_of(KIND)).generate([[3, 1, 4]], SamplingParams(max_tokens=5))
    assert done == same
    assert done.text == "".join(f"{token} " for token in done.tokens)
