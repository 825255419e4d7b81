"""Runs of the parallel benchmark: the tied pipeline is the same model, the trace is complete, the bytes add up."""

from __future__ import annotations

import itertools
from collections import Counter

import parallel
import pytest
from parallel_jobs import CLOCK, FOOTPRINT, Layout, Settings, perform
from schedule_clock import BACKWARD, FORWARD

SMALL = Settings(
    forward_ms=0.0, backward_ms=0.0, hidden_size=64, ffn_hidden_size=96, vocab_size=128, seq_length=24,
    global_batch_size=4, clock_seq_length=24, clock_microbatches=4, clock_iterations=2,
)  # fmt: skip
LAYOUTS = (
    Layout("1 process", zero=0),
    Layout("ring", pp=2, zero=0),
    Layout("tied", pp=2, zero=0, tied=True),
)
ROUTED = Layout("routed ring", pp=2, zero=0, routing="expert_choice")
STATE = SMALL.hidden_size * SMALL.seq_length * 4  # bytes of one micro-batch's hidden state
TURNS = SMALL.num_recursions


@pytest.fixture(scope="module")
def footprints(workers):
    return {
        layout.name: workers.run(layout.world_size, layout, perform, FOOTPRINT, layout, SMALL) for layout in LAYOUTS
    }


def test_all_layouts_train_the_same_model(footprints):
    losses = [rank["loss"] for ranks in footprints.values() for rank in ranks]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=2e-6)
    assert losses[0] > 1.0


def test_the_ring_holds_half_of_the_layers_and_tied_stages_hold_the_block(footprints):
    (one,) = footprints["1 process"]
    layer = one["layer_weights"] / 6  # first, four shared, last; the final norm and the rest are far below a layer
    assert [rank["layer_weights"] / layer for rank in footprints["ring"]] == pytest.approx([3, 3], abs=0.02)
    assert [rank["layer_weights"] / layer for rank in footprints["tied"]] == pytest.approx([5, 5], abs=0.02)
    for ranks in footprints.values():
        for rank in ranks:
            assert rank["gradients"] == rank["weights"]
            assert rank["optimizer"] == pytest.approx(2 * rank["weights"], rel=1e-3)  # and step counters


def test_what_is_sent_without_routing_is_hidden_state(footprints):
    forward_and_back = 2 * SMALL.global_batch_size * STATE
    ring, tied = ([rank["sent"]["p2p"] for rank in footprints[name]] for name in ("ring", "tied"))
    # Round the ring of two, 2 Nr - 1 hops each way; through the tied stages, one each way.
    assert sum(ring) == forward_and_back * (2 * TURNS - 1)
    assert sum(tied) == forward_and_back
    assert not any("tied gradients" in rank["sent"] for rank in footprints["ring"])


def test_tied_stages_sum_the_gradients_of_block_and_embedding(footprints):
    (one,) = footprints["1 process"]
    for rank in footprints["tied"]:
        # A ring all-reduce between two sends each byte once.
        assert rank["sent"]["tied gradients"] == pytest.approx(one["layer_weights"] * 4 / 6 + 128 * 64 * 4, rel=0.01)


@pytest.fixture(scope="module")
def traces(workers):
    """One iteration of each."""

    def trace(layout):
        reports = workers.run(layout.world_size, layout, perform, CLOCK, layout, SMALL)
        return parallel.recorded_iterations(reports)[0]

    return {layout: trace(layout) for layout in (LAYOUTS[2], ROUTED)}


@pytest.mark.parametrize("layout", [LAYOUTS[2], ROUTED], ids=lambda layout: layout.name)
def test_a_trace_is_a_whole_schedule(layout, traces):
    events = traces[layout]
    chunks = 1 if layout.tied else TURNS
    counts = Counter((e.rank, e.kind, e.microbatch, e.chunk) for e in events)
    kinds = (FORWARD, BACKWARD)
    assert counts == Counter(
        (rank, kind, m, chunk)
        for rank in range(2)
        for kind in kinds
        for m in range(SMALL.clock_microbatches)
        for chunk in range(chunks)
    )
    by_place = {(e.rank, e.kind, e.microbatch, e.chunk): e for e in events}
    for (rank, kind, m, chunk), event in by_place.items():
        if kind == FORWARD:  # the chunk before it, on its own way round, was over
            before = (rank - 1, kind, m, chunk) if rank else (1, kind, m, chunk - 1)
            assert before not in by_place or by_place[before].end <= event.start
        else:
            assert by_place[rank, FORWARD, m, chunk].end <= event.start
    for rank in range(2):
        mine = sorted((e for e in events if e.rank == rank), key=lambda e: e.start)
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_messages_stay_within_stream_and_working_rows(traces):
    rows = parallel.message_rows(traces[ROUTED], ROUTED, SMALL)
    assert [(row["recursion"], row["sender"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert [row["working_rows"] for row in rows] == [24, 24, 16, 16, 8]
    assert all(row["working_rows"] <= row["rows"] <= row["limit"] + row["channels"] for row in rows)
    # The residual stream comes along in the last chunk only.
    assert rows[3]["rows"] < SMALL.clock_seq_length <= rows[4]["rows"]
