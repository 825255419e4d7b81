"""Properties of the model: storages once, causality, documents, fixed depth, losses independent of micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from models import (
    RECURSIONS,
    RELAXED,
    SEQ,
    VOCAB,
    random_ids,
    small_config,
    small_model,
    training_batch,
    weights_in_their_modules,
)

from mor_megatron.data.batch import Batch
from mor_megatron.model import attention
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.accounting import count_parameters
from mor_megatron.recursion.context import MEAN_DEPTH, TOKENS_PER_RECURSION, RoutingContext
from mor_megatron.recursion.token_choice import DEPTH_FRACTION

FP32_TOL = 2e-6  # logits of about 1 through eight layers, summed in another order

pytestmark = pytest.mark.usefixtures("process_group")
ROUTED = [name for name, r in RECURSIONS.items() if r.get("routing")]
EXPERT = [name for name, r in RECURSIONS.items() if r.get("routing") == "expert_choice"]


@pytest.mark.parametrize("name", [*RECURSIONS, *RELAXED])
@pytest.mark.parametrize("untied", [False, True])
def test_each_physical_layer_is_stored_once(name, untied):
    model = small_model(name, untie_embeddings_and_output_weights=untied, make_vocab_size_divisible_by=1)
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    assert sum(storages.values()) == count_parameters(model.run_config).unique
    assert len(model.layers) == model.plan.num_physical_layers


@pytest.mark.parametrize("name", RECURSIONS)
def test_every_weight_is_used_through_its_module(name):
    """Untied: Megatron-core hands a tied embedding to the head as an argument."""
    model, ids = small_model(name, untie_embeddings_and_output_weights=True), random_ids()
    expected = _logits(model, ids)
    with weights_in_their_modules(model):
        assert torch.equal(_logits(model, ids), expected)


def _logits(model, ids, **context):
    with torch.no_grad():
        return model(Batch(ids), RoutingContext(**context))


def _changed_before(model, position, **context):
    """Largest change of a logit before `position` when all tokens from there on change."""
    ids = random_ids()
    other = ids.clone()
    other[:, position:] = (other[:, position:] + 7) % VOCAB
    before, after = _logits(model, ids, **context), _logits(model, other, **context)
    assert not torch.equal(before[:, position:], after[:, position:])
    return (before - after)[:, :position].abs().max().item()


@pytest.mark.parametrize("name", RECURSIONS)
def test_threshold_selection_is_causal(name):
    model = small_model(name).eval()
    assert _changed_before(model, SEQ // 2, selection="threshold") <= FP32_TOL
    for position in (1, SEQ - 1):
        assert _changed_before(model, position, selection="threshold") <= FP32_TOL


@pytest.mark.parametrize("name", EXPERT)
def test_topk_selection_is_not_causal(name):
    model = small_model(name).eval()
    assert max(_changed_before(model, position, selection="capacity") for position in range(2, SEQ)) > 1e-3


@pytest.mark.parametrize("name", [name for name in RECURSIONS if name not in EXPERT])
def test_selections_coincide_without_expert_choice(name):
    model = small_model(name).eval()
    ids = random_ids()
    assert torch.equal(_logits(model, ids, selection="capacity"), _logits(model, ids, selection="threshold"))


@pytest.mark.parametrize("name", RECURSIONS)
@pytest.mark.parametrize("selection", ["threshold", "capacity"])
def test_a_sequence_does_not_see_its_batch_mates(name, selection):
    model, ids = small_model(name).eval(), random_ids(batch=4)
    alone = torch.cat([_logits(model, row[None], selection=selection) for row in ids])
    torch.testing.assert_close(_logits(model, ids, selection=selection), alone, rtol=0, atol=FP32_TOL)


@pytest.mark.parametrize("name", RECURSIONS)
def test_documents_in_one_sample_equal_documents_alone(name):
    model = small_model(name).eval()
    ids, cuts = random_ids(batch=2), (11, 20, SEQ)
    documents, positions, alone = torch.zeros_like(ids), torch.zeros_like(ids), []
    start = 0
    for number, end in enumerate(cuts):
        documents[:, start:end] = number
        positions[:, start:end] = torch.arange(end - start)
        alone.append(_logits(model, ids[:, start:end], selection="threshold"))
        start = end
    batch = Batch(ids, position_ids=positions, document_ids=documents)
    with torch.no_grad():
        packed = model(batch, RoutingContext(selection="threshold"))
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=FP32_TOL)


@pytest.mark.parametrize("name", EXPERT)
def test_documents_are_separate_under_topk_too(name):
    """Within a fixed selection, a later document must not read an earlier one through attention."""
    model = small_model(name).eval()
    ids = random_ids(batch=2)
    documents = (torch.arange(SEQ) >= SEQ // 2).long().expand_as(ids)
    embedded = model.embedding(ids, position_ids=None).detach().requires_grad_()
    model.embedding.forward = lambda *args, **kwargs: embedded
    logits = model(Batch(ids, document_ids=documents), RoutingContext())
    logits[:, SEQ // 2 :].sum().backward()
    assert embedded.grad[: SEQ // 2].abs().max() == 0.0
    assert embedded.grad[SEQ // 2 :].abs().max() > 0.0


@pytest.mark.parametrize("name", [name for name, r in RECURSIONS.items() if r])
def test_fixed_depth(name):
    model, ids = small_model(name).eval(), random_ids()
    num_recursions = model.plan.num_recursions
    outputs = []
    for depth in range(1, num_recursions + 1):
        context = RoutingContext(fixed_depth=depth)
        with torch.no_grad():
            outputs.append(model(Batch(ids), context))
        if name in ROUTED:
            assert float(context.metrics[MEAN_DEPTH]) == depth
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))
    with pytest.raises(ValueError, match="exceeds num-recursions"):
        _logits(model, ids, fixed_depth=num_recursions + 1)


def test_a_residual_gate_of_one_is_the_recursive_model():
    """What up-training begins with, at full capacity."""
    config = small_config("expert_relaxed")
    recursion = replace(config.recursion, capacity=(1.0, 1.0, 1.0), router_gating="residual", router_alpha=2.0)
    routed = build_model(replace(config, recursion=recursion))
    for weight in routed.router.parameters():
        weight.data.zero_()
    plain = build_model(replace(config, recursion=replace(recursion, routing="none")))
    plain.load_state_dict(routed.state_dict(), strict=False)
    assert (_logits(routed, random_ids()) - _logits(plain, random_ids())).abs().max() < FP32_TOL


def test_fixed_depth_is_at_least_one():
    with pytest.raises(ValueError, match="fixed_depth=0"):
        RoutingContext(fixed_depth=0)


@pytest.mark.parametrize("name", RECURSIONS)
def test_losses_do_not_depend_on_the_cut(name):
    """Two micro-batches of two give the gradients and metrics of one of four."""
    ids = random_ids(batch=4)

    def run(pieces):
        model = small_model(name)
        metrics = {}
        for piece in ids.chunk(pieces):
            context = RoutingContext(router_loss_scale=1 / pieces)
            (model(training_batch(piece), context).sum() / ids.numel()).backward()
            for key, value in context.metrics.items():
                metrics[key] = metrics.get(key, 0.0) + float(value) / pieces
        return {n: p.grad for n, p in model.named_parameters()}, metrics

    (whole, whole_metrics), (cut, cut_metrics) = run(1), run(2)
    assert cut_metrics == pytest.approx(whole_metrics, abs=1e-6)
    for parameter, gradient in whole.items():
        torch.testing.assert_close(
            cut[parameter], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_authors_scaling_grows_with_the_number_of_micro_batches():
    def router_gradient(scale, **recursion):
        config = small_config("expert")
        config = replace(config, recursion=replace(config.recursion, **recursion))
        model = build_model(config)
        (0.0 * model(training_batch(random_ids()), RoutingContext(router_loss_scale=scale)).sum()).backward()
        return model.router.routers[1].out.weight.grad

    mean = router_gradient(0.25)
    authors = router_gradient(0.25, router_aux_loss_per_microbatch=True)
    torch.testing.assert_close(authors, 4 * mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RECURSIONS)
def test_vocabulary_padding_changes_nothing(name):
    ids = random_ids()
    plain, padded = (
        small_model(name, make_vocab_size_divisible_by=1),
        small_model(name, make_vocab_size_divisible_by=96),
    )
    weights = plain.state_dict()
    embedding = padded.state_dict()["embedding.word_embeddings.weight"].clone()
    embedding[:VOCAB] = weights["embedding.word_embeddings.weight"]
    weights["embedding.word_embeddings.weight"] = embedding
    padded.load_state_dict(weights)
    losses = [model(training_batch(ids), RoutingContext()) for model in (plain, padded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=FP32_TOL)
    assert padded.embedding.word_embeddings.weight.shape[0] == 96
    losses[1].mean().backward()
    assert padded.embedding.word_embeddings.weight.grad[VOCAB:].abs().max() == 0.0


def test_capacity_warmup_counts_iterations():
    config = small_config("expert")
    config = replace(config, recursion=replace(config.recursion, capacity_warmup_iters=10))
    model = build_model(config)
    for iteration in (1, 5, 10, 11):
        progress = min(1.0, iteration / 10)
        for _ in range(2):  # several micro-batches of one iteration select alike
            context = RoutingContext(iteration=iteration)
            model(training_batch(random_ids()), context)
            for r, target in enumerate(model.plan.capacities):
                capacity = target + (1 - target) * 0.5 * (1 + math.cos(math.pi * progress))
                kept = float(context.metrics[TOKENS_PER_RECURSION.format(r)])
                assert kept == pytest.approx(max(1, int(capacity * SEQ)) / SEQ)
    context = RoutingContext(iteration=1)
    model.eval()(training_batch(random_ids()), context)
    assert float(context.metrics[TOKENS_PER_RECURSION.format(2)]) == pytest.approx(int(SEQ / 3) / SEQ)


def test_balance_warmup_sends_everyone_to_full_depth():
    config = small_config("token_loss_free")
    config = replace(config, recursion=replace(config.recursion, router_balance_warmup_iters=2))
    model = build_model(config)
    for iteration, depth in ((1, 3.0), (2, 3.0), (3, None)):
        context = RoutingContext(iteration=iteration)
        model(training_batch(random_ids()), context)
        mean_depth = float(context.metrics[MEAN_DEPTH])
        assert mean_depth == depth if depth else mean_depth < 3.0
        model.after_step(context.metrics, iteration)
        assert bool(model.router.balance_bias.any()) == (depth is None)


def test_loss_free_bias_moves_towards_balance():
    model = small_model("token_loss_free")
    rate = model.run_config.recursion.router_bias_update_rate
    model.after_step({DEPTH_FRACTION.format(r): f for r, f in enumerate((0.7, 0.2, 0.1))}, 1)
    torch.testing.assert_close(model.router.balance_bias, torch.tensor([-rate, rate, rate]))


def test_auxiliary_router_trains_only_itself():
    ids = random_ids()
    model = small_model("expert_aux_router")
    (0.0 * model(training_batch(ids), RoutingContext()).sum()).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched == {f"router.aux_routers.{r}.out.weight" for r in range(3)}
    assert all(p.lr_mult == 10.0 for p in model.router.aux_routers.parameters())


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match="max-position-embeddings"):
        small_model("vanilla")(Batch(random_ids(length=SEQ + 1)))


@pytest.mark.parametrize("name", RECURSIONS)
def test_threshold_may_keep_nobody(name):
    model, ids = small_model(name).eval(), random_ids()
    if name in EXPERT:
        for router in [*model.router.routers, *(model.router.aux_routers or [])]:
            router.forward = lambda x: x.new_full((*x.shape[:-1], 1), -1.0)
    context = RoutingContext(selection="threshold")
    with torch.no_grad():
        assert torch.isfinite(model(Batch(ids), context)).all()
    if name in EXPERT:
        assert float(context.metrics[MEAN_DEPTH]) == 1.0


@pytest.mark.parametrize("name", RECURSIONS)
def test_bf16_trains(name):
    config = small_config(name)
    model = build_model(replace(config, training=replace(config.training, bf16=True)))
    reference = small_model(name)
    losses = [m(training_batch(random_ids()), RoutingContext()).mean() for m in (model, reference)]
    losses[0].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=0.02)  # 8 bits of mantissa


@pytest.mark.parametrize("name", ["expert_sharing", "expert_sharing_update", "token_sharing"])
@pytest.mark.parametrize("documents", [False, True])
def test_query_blocks_only_skip_masked_keys(name, documents, monkeypatch):
    ids = random_ids()
    document_ids = torch.arange(SEQ).div(10, rounding_mode="floor").expand_as(ids) if documents else None

    def run(block):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        model = small_model(name)
        losses = model(Batch(ids, labels=ids.roll(-1, dims=1), document_ids=document_ids), RoutingContext())
        losses.sum().backward()
        return losses.detach(), [p.grad for p in model.parameters()]

    (whole, whole_gradients), (blocks, block_gradients) = run(SEQ), run(3)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=FP32_TOL)
    for ours, expected in zip(block_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_loss_free_bias_moves_the_choice_and_not_the_weight():
    model, ids = small_model("token_loss_free").eval(), random_ids()
    model.router.balance_bias.copy_(torch.tensor([0.0, 10.0, 0.0]))
    biased = RoutingContext(trace={})
    with torch.no_grad():
        logits = model(Batch(ids), biased)
    assert (biased.trace["depth"] == 1).all()
    model.router.balance_bias.mul_(2.0)
    assert torch.equal(_logits(model, ids), logits)


def test_all_rows_are_no_slice():
    """The gradient of a slice is filled with zeros and copied into, also where nothing is cut off."""
    open_nodes, seen = [small_model("vanilla")(training_batch(random_ids())).grad_fn], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes += [each for each, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "SplitRotateFunctionBackward" in names
    assert "SliceBackward0" not in names
