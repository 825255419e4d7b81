"""Attention as a GPU computes it, against the CPU's way: frames, masks, boundaries, and how many shapes there are.

`varlen_attn` has no CPU implementation, and FlexAttention none with a backward pass: plain functions with their
signatures stand in.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import RECURSIONS, SEQ, random_ids, small_config, training_batch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mor_megatron.model import attention_by_shape, block_mask, build_model, frame, layer_spec
from mor_megatron.model.attention_by_shape import AttentionKernels
from mor_megatron.model.frame import Frame
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows
from mor_megatron.recursion.routing import kept

TOL = 1e-5  # fp32 through eight layers: other kernels add up in another order
BATCH = 3
HOPPER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
ROWS = frozenset({SEQ, kept(2 / 3, SEQ), kept(1 / 3, SEQ)})
BY_SHAPE = AttentionKernels(HOPPER, ROWS)
SDPA = AttentionKernels(HOPPER, ROWS, no_varlen="forced", no_flex="forced")
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


def seen_by(mask) -> Tensor:
    """What FlexAttention computes under a block mask, [B, Q, K] bool; checks that both directions list the same."""
    parts = {}
    for name in ("", "full_"):
        queries, keys = (
            listed(getattr(mask, f"{name}{x}_num_blocks"), getattr(mask, f"{name}{x}_indices")) for x in ("kv", "q")
        )
        assert torch.equal(queries, keys.transpose(1, 2))
        parts[name] = queries
    assert not (parts[""] & parts["full_"]).any()
    size = block_mask.BLOCK
    blocks = {name: x.repeat_interleave(size, 1).repeat_interleave(size, 2) for name, x in parts.items()}
    batch, num_queries, num_keys = mask.kv_num_blocks.shape[0], *mask.seq_lengths
    b, q, k = torch.meshgrid(*(torch.arange(n) for n in (batch, num_queries, num_keys)), indexing="ij")
    partial, whole = (blocks[name][:, :, :num_keys] for name in ("", "full_"))
    return whole | (partial & mask.mask_mod(b, None, q, k))


def listed(counts: Tensor, columns: Tensor) -> Tensor:
    """Index lists of a block mask -> [B, rows, columns] bool."""
    assert counts.dtype == columns.dtype == torch.int32
    chosen = torch.arange(columns.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros(columns.shape).scatter(-1, columns.long(), chosen.float())[:, 0].bool()


def plain_flex(query, key, value, block_mask=None, scale=None, enable_gqa=False) -> Tensor:
    """flex_attention on its dense mask; a query that sees nothing gives 0."""
    seen = seen_by(block_mask).unsqueeze(1)
    some = seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, seen | ~some, scale=scale, enable_gqa=enable_gqa)
    return out * some


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Stand-ins, and small frames and blocks so that a short sequence has several."""
    monkeypatch.setattr(attention_by_shape, "_varlen_attn", lambda: (plain_varlen, {}))
    monkeypatch.setattr(attention_by_shape, "_flex_attention", lambda: plain_flex)
    monkeypatch.setattr(frame, "STEP", 8)
    monkeypatch.setattr(block_mask, "BLOCK", 4)


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
@pytest.mark.parametrize("kernels", [BY_SHAPE, SDPA], ids=["by_shape", "sdpa"])
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
    """What reaches the kernels that make something for every new shape."""

    def __init__(self, monkeypatch):
        self.keys: dict[str, set] = {"cudnn": set(), "flex": set()}
        self.calls = {"cudnn": 0, "varlen": 0, "flex": 0, "other": 0}
        self.backends: list[SDPBackend] = []
        chosen, attend = attention_by_shape.sdpa_kernel, attention_by_shape.AttentionByShape._attend

        def choose(backends, set_priority):
            self.backends = backends
            return chosen(backends, set_priority)

        def sdpa(module, query, key, value, mask):
            self.record("cudnn" if self.backends[0] == SDPBackend.CUDNN_ATTENTION else "other", query, key)
            return attend(module, query, key, value, mask)

        def flex(query, key, value, **options):
            self.record("flex", query, key)
            return plain_flex(query, key, value, **options)

        def varlen(query, key, value, *arguments, **options):
            self.record("varlen", query, key)
            return plain_varlen(query, key, value, *arguments, **options)

        monkeypatch.setattr(attention_by_shape, "sdpa_kernel", choose)
        monkeypatch.setattr(attention_by_shape.AttentionByShape, "_attend", sdpa)
        monkeypatch.setattr(attention_by_shape, "_flex_attention", lambda: flex)
        monkeypatch.setattr(attention_by_shape, "_varlen_attn", lambda: (varlen, {}))

    def record(self, kernel: str, query: Tensor, key: Tensor) -> None:
        self.calls[kernel] += 1
        if kernel in self.keys:
            self.keys[kernel].add((query.shape, query.stride(), key.shape, key.stride(), query.dtype))


@pytest.mark.parametrize(
    ("name", "selection", "kernels", "shapes"),
    [
        ("vanilla", "capacity", {"cudnn"}, 1),
        ("recursive", "capacity", {"cudnn"}, 1),
        ("expert", "capacity", {"cudnn", "other"}, 3),
        ("expert", "threshold", {"cudnn", "varlen"}, 1),
        ("expert_sharing", "capacity", {"cudnn", "flex"}, 1 + SEQ // 8),
        ("expert_sharing_update", "capacity", {"cudnn", "flex"}, 1 + SEQ // 8),
        ("expert_sharing", "threshold", {"cudnn", "flex"}, 1 + SEQ // 8),
        ("token", "capacity", {"cudnn", "varlen"}, 1),
        ("token_sharing", "capacity", {"cudnn", "flex"}, 1 + SEQ // 8),
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
        assert {kernel for kernel, calls in spy.calls.items() if calls} == {"flex"}
        assert len(spy.keys["flex"]) <= SEQ // 8 * (1 if "sharing" not in name else 2)
    else:
        assert {kernel for kernel, calls in spy.calls.items() if calls} == kernels
        assert sum(map(len, spy.keys.values())) <= shapes


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
def test_block_mask_shows_each_row_what_it_sees(rows, keys_of_all):
    active = active_sets()[rows]
    if active.is_all and keys_of_all:
        return
    for documents in (torch.zeros_like(DOCUMENTS), DOCUMENTS):
        compact = Frame(active, documents, keys_of_all)
        seen = seen_by(compact.block_mask)
        assert not seen[compact.visible[1] < 0].any()
        # The same of each token by its position, in a plain loop.
        taken = [[int(t) for t, b in zip(*places(active), strict=True) if b == column] for column in range(BATCH)]
        for b, positions in enumerate(taken):
            keys = range(SEQ) if keys_of_all else positions
            for i, t in enumerate(positions):
                expected = [j for j, s in enumerate(keys) if s <= t and documents[b, s] == documents[b, t]]
                assert seen[b, i].nonzero().view(-1).tolist() == expected
        blocks = seen.view(BATCH, -1, block_mask.BLOCK, compact.num_keys).any(2)
        assert torch.equal(blocks.any(-1), compact.block_mask.kv_num_blocks[:, 0] + full(compact) > 0)


def full(compact: Frame) -> Tensor:
    return compact.block_mask.full_kv_num_blocks[:, 0]


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


def places(active: ActiveTokens) -> tuple[list[int], list[int]]:
    """Positions and sequences of the active tokens."""
    rows = torch.arange(SEQ * BATCH) if active.is_all else active.rows.view(-1)
    return (rows // BATCH).tolist(), (rows % BATCH).tolist()


@pytest.mark.parametrize("keys_of_all", [False, True])
def test_flex_attention_itself_agrees(monkeypatch, keys_of_all):
    """Its forward pass runs on a CPU, with blocks of its own size."""
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(frame, "STEP", 256)
    monkeypatch.setattr(block_mask, "BLOCK", 128)
    compact = Frame(active_sets()["ragged"], DOCUMENTS, keys_of_all)
    query = torch.randn(BATCH, 4, compact.length, 16)
    key, value = (torch.randn(BATCH, 2, compact.num_keys, 16) for _ in range(2))
    got = flex_attention.flex_attention(query, key, value, block_mask=compact.block_mask, enable_gqa=True)
    expected = plain_flex(query, key, value, compact.block_mask, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOL)


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
        assert spread or laid.block_mask.seq_lengths == (laid.length, laid.num_keys)
    if ragged:
        assert laid.cu_seqlens.shape == (BATCH + 1,)
