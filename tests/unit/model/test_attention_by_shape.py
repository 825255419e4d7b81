"""Attention as a GPU computes it, against the CPU's way: frames, masks, boundaries, and how many shapes there are.

`varlen_attn` and range attention have no CPU implementation: plain functions with their signatures stand in.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import RECURSIONS, SEQ, random_ids, small_config, training_batch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mor_megatron.model import attention_by_shape, attention_check, frame, layer_spec, ranges
from mor_megatron.model.attention_by_shape import AttentionKernels
from mor_megatron.model.frame import Frame
from mor_megatron.model.mor_model import build_model
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows
from mor_megatron.recursion.routing import kept

TOL = 1e-5  # fp32 through eight layers: other kernels add up in another order
BATCH = 3
HOPPER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
ROWS = frozenset({SEQ, kept(2 / 3, SEQ), kept(1 / 3, SEQ)})
BY_SHAPE = AttentionKernels(HOPPER, ROWS)
VARLEN = AttentionKernels(HOPPER, ROWS, no_ranges="forced")
SDPA = AttentionKernels(HOPPER, ROWS, no_varlen="forced", no_ranges="forced")
DOCUMENTS = torch.arange(SEQ).div(10, rounding_mode="floor").expand(BATCH, SEQ)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)) -> Tensor:
    """PyTorch 2.11's varlen_attn, sequence by sequence: q [T, N, D], k and v [T, G, D] -> [T, N, D]."""
    assert window_size == (-1, 0)
    assert cu_q is cu_k
    assert cu_q.dtype == torch.int32
    assert cu_q[-1] == len(q)
    assert cu_q.diff().max() <= max_q == max_k
    out = []
    for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        parts = (x[a:b].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def plain_ranges(query, key, value, first, last, queries, block, scale=None) -> Tensor:
    """`range_attention` through the whole matrix of scores."""
    assert queries.shape == (4, key.shape[1], -(-len(key) // block))
    return ranges.attend(query, key, value, first, last, scale)


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Stand-ins, and small frames so that a short sequence has several lengths."""
    monkeypatch.setattr(attention_by_shape, "_varlen_attn", lambda: (plain_varlen, {}))
    monkeypatch.setattr(attention_by_shape, "_range_attention", lambda: plain_ranges)
    monkeypatch.setattr(frame, "STEP", 8)


def build(config, kernels: AttentionKernels | None, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(layer_spec, "attention_kernels", lambda config: kernels)
        return build_model(config)


def run(model, documents: bool) -> dict[str, Tensor]:
    """Losses and every gradient."""
    model.zero_grad()
    batch = training_batch(random_ids(BATCH))
    losses = model(replace(batch, document_ids=DOCUMENTS if documents else None), RoutingContext())
    losses.mean().backward()
    return {"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", RECURSIONS)
@pytest.mark.parametrize("kernels", [BY_SHAPE, VARLEN, SDPA], ids=["by_shape", "varlen", "sdpa"])
def test_equals_the_way_of_the_cpu(process_group, monkeypatch, name, kernels):
    config = small_config(name, group_query_attention=True, num_query_groups=2)
    ours, expected = build(config, kernels, monkeypatch), build(config, None, monkeypatch)
    for documents in (False, True):
        got, wanted = run(ours, documents), run(expected, documents)
        differences = {parameter: float((got[parameter] - wanted[parameter]).abs().max()) for parameter in wanted}
        worst = max(differences, key=differences.get)
        assert differences[worst] < TOL, f"{worst} differs by {differences[worst]}, documents={documents}"


def test_recomputed(process_group, monkeypatch):
    config = small_config("expert_sharing")
    again = replace(config, training=replace(config.training, recompute_granularity="selective"))
    got, expected = (run(build(c, BY_SHAPE, monkeypatch), True) for c in (again, config))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Spy:
    """What reaches the kernels, and the shapes that reach cuDNN, which makes a plan for each."""

    def __init__(self, monkeypatch):
        self.shapes: set = set()
        self.calls = {"cudnn": 0, "varlen": 0, "ranges": 0, "other": 0}
        self.backends: list[SDPBackend] = []
        chosen, attend = attention_by_shape.sdpa_kernel, attention_by_shape.AttentionByShape._attend

        def choose(backends, set_priority):
            self.backends = backends
            return chosen(backends, set_priority)

        def sdpa(module, query, key, value, mask):
            self.record("cudnn" if self.backends[0] == SDPBackend.CUDNN_ATTENTION else "other", query, key)
            return attend(module, query, key, value, mask)

        def by_range(query, key, value, *arguments):
            self.record("ranges", query, key)
            return plain_ranges(query, key, value, *arguments)

        def varlen(query, key, value, *arguments, **options):
            self.record("varlen", query, key)
            return plain_varlen(query, key, value, *arguments, **options)

        monkeypatch.setattr(attention_by_shape, "sdpa_kernel", choose)
        monkeypatch.setattr(attention_by_shape.AttentionByShape, "_attend", sdpa)
        monkeypatch.setattr(attention_by_shape, "_range_attention", lambda: by_range)
        monkeypatch.setattr(attention_by_shape, "_varlen_attn", lambda: (varlen, {}))

    def record(self, kernel: str, query: Tensor, key: Tensor) -> None:
        self.calls[kernel] += 1
        if kernel == "cudnn":
            self.shapes.add((query.shape, query.stride(), key.shape, key.stride(), query.dtype))


@pytest.mark.parametrize(
    ("name", "selection", "kernels", "shapes"),
    [
        ("vanilla", "capacity", {"cudnn"}, 1),
        ("recursive", "capacity", {"cudnn"}, 1),
        ("expert", "capacity", {"cudnn", "other"}, 3),
        ("expert", "threshold", {"cudnn", "ranges"}, 1),
        ("expert_sharing", "capacity", {"cudnn", "ranges"}, 1),
        ("expert_sharing_update", "capacity", {"cudnn", "ranges"}, 1),
        ("expert_sharing", "threshold", {"cudnn", "ranges"}, 1),
        ("token", "capacity", {"cudnn", "ranges"}, 1),
        ("token_sharing", "capacity", {"cudnn", "ranges"}, 1),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_few_shapes_over_many_micro_batches(process_group, monkeypatch, name, selection, kernels, shapes, documents):
    config = small_config(name, num_layers=5)
    if name.startswith("expert"):  # k changes in every iteration
        config = replace(config, recursion=replace(config.recursion, capacity_warmup_iters=15))
    spy, model = Spy(monkeypatch), build(config, BY_SHAPE, monkeypatch)
    for step in range(20):
        batch = replace(training_batch(random_ids(BATCH, seed=step)), document_ids=DOCUMENTS if documents else None)
        with torch.no_grad():
            model(batch, RoutingContext(selection=selection, iteration=step + 1))
    if documents:
        assert {kernel for kernel, calls in spy.calls.items() if calls} == {"ranges"}
    else:
        assert {kernel for kernel, calls in spy.calls.items() if calls} == kernels
        assert len(spy.shapes) <= shapes


def active_sets() -> dict[str, ActiveTokens]:
    """Regular, ragged, ragged with an empty sequence, all."""
    torch.manual_seed(0)
    scattered = torch.rand(SEQ, BATCH) < 0.4
    scattered[:, 1] = False
    regular = torch.rand(SEQ, BATCH).argsort(0)[:13].sort(0).values * BATCH + torch.arange(BATCH)
    everything = ActiveTokens(SEQ, BATCH)
    return {
        "regular": everything.take(regular),
        "ragged": LocalRows().keep(everything, torch.rand(SEQ, BATCH) < 0.4)[0],
        "an empty sequence": LocalRows().keep(everything, scattered)[0],
        "all": everything,
    }


@pytest.mark.parametrize("rows", active_sets())
@pytest.mark.parametrize("keys_of_all", [False, True])
def test_each_row_has_the_range_that_it_sees(rows, keys_of_all):
    active = active_sets()[rows]
    if active.is_all and keys_of_all:
        return
    for documents in (torch.zeros_like(DOCUMENTS), DOCUMENTS):
        laid = Frame(active, documents, keys_of_all)
        first, last = (x.unsqueeze(2) for x in laid.visible)
        keys = torch.arange(laid.num_keys)
        seen = (first <= keys) & (keys <= last)
        # The same of each token by its position, in a plain loop.
        taken = [[int(t) for t, b in zip(*places(active), strict=True) if b == column] for column in range(BATCH)]
        for b, positions in enumerate(taken):
            keys = range(SEQ) if keys_of_all else positions
            for i, t in enumerate(positions):
                expected = [j for j, s in enumerate(keys) if s <= t and documents[b, s] == documents[b, t]]
                assert seen[b, i].nonzero().view(-1).tolist() == expected
            assert not seen[b, len(positions) :].any()
        for block in (3, 8, 64):
            found = ranges.ranges(*laid.visible, laid.num_keys, block)
            for b, start in itertools.product(range(BATCH), range(0, laid.num_keys, block)):
                part = seen[b, :, start : start + block]
                whole = part.all(1) if part.shape[1] == block else torch.zeros(len(part), dtype=torch.bool)
                bounds = found.queries[:, b, start // block].tolist()
                assert torch.arange(len(part))[slice(*bounds[:2])].tolist() == part.any(1).nonzero().view(-1).tolist()
                assert torch.arange(len(part))[slice(*bounds[2:])].tolist() == whole.nonzero().view(-1).tolist()


@pytest.mark.parametrize(("kept_rows", "kernel"), [(SEQ * 2 // 3, "ranges"), (SEQ - 1, "cudnn")])
def test_nearly_all_rows_attend_among_all_tokens(monkeypatch, kept_rows, kernel):
    spy = Spy(monkeypatch)
    rows = torch.arange(SEQ * BATCH).view(SEQ, BATCH)[-kept_rows:]
    heads = attention_check.Heads(4, 2, 16, torch.float32, "cpu")
    pattern, inputs = attention_check.random_case(heads, ActiveTokens(SEQ, BATCH, rows), keys_of_all=True)
    attention = attention_by_shape.AttentionByShape(*attention_check.LAYER, kernels=BY_SHAPE)
    found = attention_check.outputs_and_gradients(attention, pattern, inputs)
    assert {name for name, calls in spy.calls.items() if calls} == {kernel}
    assert max(attention_check.errors(found, attention_check.expected(pattern, inputs))) < TOL


def test_frames():
    for name, active in active_sets().items():
        rows = torch.randn(*active.shape, 2, 4)
        flat = rows.flatten(2)
        most = int(torch.tensor(places(active)[1]).bincount().max())
        for laid in (Frame(active, None, False), Frame(active, None, False, exact=True)):
            assert laid.length == (most if laid.exact else -(-most // 8) * 8)
            assert torch.equal(laid.take(laid.put(rows).flatten(2)), flat), name
            nth = [0] * BATCH
            for row, b in zip(flat.flatten(0, 1), places(active)[1], strict=True):
                assert torch.equal(laid.put(rows).flatten(2)[nth[b], b], row)
                nth[b] += 1
            assert not any(laid.put(rows)[n:, b].any() for b, n in enumerate(nth))
        if not active.is_all:
            laid = Frame(active, None, True, spread=True)
            for row, t, b in zip(flat.flatten(0, 1), *places(active), strict=True):
                assert torch.equal(laid.put(rows).flatten(2)[t, b], row)
            assert torch.equal(laid.take(laid.put(rows).flatten(2)), flat)


@pytest.mark.parametrize("count", [0, 3])
def test_rows_of_a_single_sequence_are_not_copied(count):
    active = ActiveTokens(SEQ, 1, torch.tensor([[1], [4], [9]])[:count], (count,))
    rows = torch.randn(count, 1, 2, 4)
    laid = Frame(active, DOCUMENTS[:1], False, exact=True)
    assert count == 0 or laid.put(rows) is rows
    assert torch.equal(laid.take(laid.put(rows).flatten(2)), rows.flatten(2))
    assert laid.visible[1].tolist() == [list(range(count)) or [-1]]


def places(active: ActiveTokens) -> tuple[list[int], list[int]]:
    """Positions and sequences of the active tokens."""
    rows = torch.arange(SEQ * BATCH) if active.is_all else active.rows.view(-1)
    return (rows // BATCH).tolist(), (rows % BATCH).tolist()


@pytest.mark.parametrize("keys_of_all", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_nothing_is_read_from_the_device(ragged, keys_of_all):
    """Tensors on "meta" have no values: reading one is an error."""
    rows = torch.empty((20, 1) if ragged else (13, BATCH), dtype=torch.int64, device="meta")
    active = ActiveTokens(SEQ, BATCH, rows, (5, 0, 15) if ragged else None)
    documents = torch.empty(BATCH, SEQ, dtype=torch.int64, device="meta")
    query = torch.empty(*rows.shape, 4, 8, device="meta", requires_grad=True)
    for spread in {False, keys_of_all}:
        laid = Frame(active, documents, keys_of_all, spread=spread)
        assert laid.take(laid.put(query).flatten(2)).shape == (*rows.shape, 32)
        assert laid.mask.shape == (BATCH, 1, laid.length, laid.num_keys)
        assert laid.ranges.queries.shape == (4, BATCH, -(-laid.num_keys // ranges.BLOCK))
    if ragged:
        assert laid.cu_seqlens.shape == (BATCH + 1,)
