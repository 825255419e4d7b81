"""Losses equal those of a plain loop over single sequences; depths, agreement and calibration equal explicit counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pairs import VOCAB, pair, random_ids

from mor_megatron.evaluation.likelihood import likelihood
from mor_megatron.evaluation.modes import modes_of
from mor_megatron.evaluation.report import summary, table
from mor_megatron.evaluation.routing import BINS, Calibration
from mor_megatron.evaluation.sequences import IGNORED, Piece
from mor_megatron.planning.accounting import executed_flops_per_token

pytestmark = pytest.mark.usefixtures("process_group")
LENGTHS = (31, 12, 20, 31, 5)


def pieces() -> list[Piece]:
    """Of unequal lengths; two predictions of the second do not count."""
    made = []
    for b, length in enumerate(LENGTHS):
        ids = random_ids(seed=b)[0, : length + 1]
        made.append(Piece(ids[:-1], ids[1:].clone()))
    made[1].labels[3:5] = IGNORED
    return made


@pytest.mark.parametrize("name", ["vanilla", "recursive", "expert", "expert_aux_router", "token"])
def test_losses_of_a_padded_batch_are_those_of_each_sequence_alone(name: str):
    model = pair(name)[1]
    modes = modes_of(model.config)
    found = likelihood(model, pieces(), modes, batch_size=3, nbytes=torch.full((VOCAB,), 2))
    counted = sum(LENGTHS) - 2
    assert (found.sequences, found.tokens, found.nbytes) == (5, counted, 2 * counted)
    for result in found.results:
        losses, passed = [], torch.zeros(model.config.num_recursions, dtype=torch.int64)
        for piece in pieces():
            with torch.no_grad():
                output = model(piece.tokens[None], **result.mode.options)
            loss = F.cross_entropy(output.logits[0], piece.labels, ignore_index=IGNORED, reduction="sum")
            losses.append(loss.item())
            passed += (output.depths[0] > torch.arange(len(passed))[:, None]).sum(1)
        total = sum(losses)
        assert result.losses == pytest.approx(losses, rel=1e-6), result.mode
        assert result.nll == pytest.approx(total / counted, rel=1e-6), result.mode
        assert result.perplexity == pytest.approx(math.exp(total / counted), rel=1e-6)
        assert result.bits_per_byte == pytest.approx(total / math.log(2) / (2 * counted), rel=1e-6)
        assert result.fractions == pytest.approx([n / sum(LENGTHS) for n in passed.tolist()])
    assert len({result.nll for result in found.results}) == len(modes), "ways were ignored"


WAYS = {
    "vanilla": ["full depth"],
    "recursive": ["full depth", "depth 1", "depth 2"],
    "expert": ["topk", "threshold", "depth 1", "depth 2", "depth 3"],
    "token": ["routed", "depth 1", "depth 2", "depth 3"],
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_and_what_is_causal(name: str):
    """Other tokens from position 20 on change the logits before it where selection looks ahead, and nowhere else."""
    model = pair(name)[1]
    modes = modes_of(model.config)
    assert [mode.name for mode in modes] == WAYS[name]
    assert modes_of(model.config, fixed_depths=False) == tuple(mode for mode in modes if "depth" not in mode.options)
    ids = random_ids()[:1]
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 7) % VOCAB
    for mode in modes:
        with torch.no_grad():
            before, after = (model(x, **mode.options).logits[:, :20] for x in (ids, changed))
        assert torch.allclose(before, after, atol=2e-6) == mode.causal, mode


def test_ways_do_not_depend_on_the_depth_of_the_configuration():
    model = pair("expert")[1]
    modes = modes_of(model.config, fixed_depths=False)
    expected = likelihood(model, pieces(), modes, batch_size=5)
    model.config.depth = 1
    try:
        assert likelihood(model, pieces(), modes, batch_size=5) == expected
        assert model.config.depth == 1
    finally:
        model.config.depth = None


def test_agreement_of_threshold_with_topk():
    """The sums over candidates, against the depths of both selections counted by hand."""
    model = pair("expert")[1]
    found = likelihood(model, pieces(), modes_of(model.config), batch_size=2)
    same, kept, candidates = 0, [0] * 3, [0] * 3
    for piece in pieces():
        with torch.no_grad():
            topk = model(piece.tokens[None], selection="capacity").depths[0]
            threshold = model(piece.tokens[None]).depths[0]
        same += int((topk == threshold).sum())
        for r in range(3):
            candidates[r] += int((topk >= r).sum())
            kept[r] += int((topk > r).sum())
    assert found.same_depth == pytest.approx(same / sum(LENGTHS))
    assert 0.1 < found.same_depth < 0.95, "the routers of this case decide nothing"
    assert [entry["recursion"] for entry in found.calibration] == [1, 2]  # recursion 0 keeps everyone
    for entry in found.calibration:
        r = entry["recursion"]
        assert entry["candidates"] == candidates[r] == sum(b["candidates"] for b in entry["bins"])
        assert entry["kept"] == pytest.approx(kept[r] / candidates[r])


def test_calibration_by_hand():
    """Four candidates at scores 0.05, 0.05, 0.95, 0.55, of which top-k keeps the second and the third."""
    logits = torch.tensor([0.05, 0.05, 0.95, 0.55]).logit()
    calibration = Calibration([1.0, 0.5], threshold=0.5, device=torch.device("cpu"))
    calibration.add([torch.zeros(4), logits], torch.tensor([[1, 2, 2], [-1, 1, -1]]))
    (entry,) = calibration.report()
    assert entry["candidates"] == 4
    assert entry["kept"] == 0.5
    assert entry["agreement"] == 0.5
    assert [b["candidates"] for b in entry["bins"]] == [2, 1, 1]
    assert [b["kept"] for b in entry["bins"]] == [0.5, 0.0, 1.0]
    assert entry["calibration_error"] == pytest.approx((abs(0.1 - 1) + 0.55 + 0.05) / 4)
    assert calibration.sums.shape == (2, BINS, 3)


def test_table_names_what_is_causal_and_counts_with_the_accounting():
    training, model = pair("expert")
    found = likelihood(
        model, pieces(), modes_of(model.config), batch_size=8, nbytes=torch.ones(VOCAB, dtype=torch.int64)
    )
    facts = summary(model.config, found, seq_length=training.run_config.data.seq_length)
    lines = table(facts).splitlines()
    assert next(line for line in lines if line.startswith("causal")).split() == ["causal", "no", *["yes"] * 4]
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]["unique"]
    depth_two = executed_flops_per_token(training.run_config, (1.0, 1.0, 0.0))
    assert facts["ways"]["depth 2"]["executed_flops_per_token"] == depth_two
    flops = [mode["executed_flops_per_token"] for mode in facts["ways"].values()]
    assert flops[2] < flops[3] < flops[4]
    assert flops[2] < flops[0] < flops[4]
    assert len({len(line) for line in lines[2:9]}) == 1, "columns do not stand under each other"
