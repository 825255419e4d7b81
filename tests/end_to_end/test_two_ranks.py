"""Two data-parallel ranks over gloo: the same numbers as one rank, bit-identical resumes, skipped steps on both.

One pair of ranks does all the work (`two_ranks_worker.py`); the tests read what it wrote.
"""

import json

import pytest
from forked_ranks import running
from small_runs import (
    MODES,
    RESUMED,
    assert_same_checkpoint,
    mode_name,
    read_metrics,
    read_weights,
)
from two_ranks_worker import config_of

from mor_megatron.pretraining.pretrain import pretrain

LAYOUT_TOL = 2e-6  # two ranks add the same fp32 gradients in another order; eight SGD steps


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("two_ranks")
    with running([corpus, str(output)], 2, output / "logs", program="tests/end_to_end/two_ranks_worker.py") as ranks:
        assert ranks.join() == [0, 0], ranks.output(0)[-3000:] + ranks.output(1)[-6000:]
    return output


@pytest.mark.parametrize("mode", RESUMED, ids=mode_name)
def test_five_and_five_is_ten(two_ranks, mode):
    whole, parts = (two_ranks / f"{mode_name(mode)}-{name}" for name in ("whole", "parts"))
    assert len(read_metrics(whole)) == 12
    assert read_metrics(parts) == read_metrics(whole)
    for iteration in (5, 10):
        assert_same_checkpoint(whole, parts, iteration)


@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_compute_what_one_does(process_group, two_ranks, corpus, tmp_path, zero):
    """Samples, loss, norm, router metrics, validation losses and weights; SGD, which does not hide a factor."""
    pretrain(config_of(corpus, mode=(False, zero), save=str(tmp_path), optimizer="sgd", train_iters=8))
    one, two = read_metrics(tmp_path), read_metrics(two_ranks / f"sgd-zero{zero}")
    assert len(one) == len(two) == 9
    for expected, got in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=LAYOUT_TOL)
    weights = [read_weights(path, 8) for path in (tmp_path, two_ranks / f"sgd-zero{zero}")]
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).abs().max() <= LAYOUT_TOL * max(1.0, expected.abs().max()), name


@pytest.fixture(scope="module")
def results(two_ranks):
    return json.loads((two_ranks / "results.json").read_text())


@pytest.mark.parametrize(("fault", "faulty_ranks"), [("nan on rank 1", [1]), ("overflow of the sum", [])])
@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_all_ranks_skip_together(results, mode, fault, faulty_ranks):
    ranks = results["faults"][mode_name(mode)][fault]
    for rank in ranks:
        assert rank["applied"] is False
        assert rank["faulty_ranks"] == faulty_ranks
        assert rank["unchanged"] is True
        assert rank["then_applied"] is True
    assert ranks[0]["checksum"] == ranks[1]["checksum"]


def test_giving_up_names_rank_and_iteration(results):
    assert results["give up"].startswith(
        "iteration 3: loss nan, loss or gradient not finite on rank 1, 3 steps in a row"
    )
    assert "max-skipped-steps=2" in results["give up"]
