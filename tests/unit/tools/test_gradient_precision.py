"""The precision benchmark on few micro-batches: its claims about the modes hold, and the plot is drawn."""

import pytest
from gradient_precision import BRANCHES, NAIVE, SUM, UNTIED, measure, plot, table


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_branches_sum_in_fp32_and_a_bf16_sum_is_worse(tmp_path):
    rows = measure([2], [1, 16], say=lambda line: None)
    assert [(row["num_recursions"], row["micro_batches"]) for row in rows] == [(2, 1), (2, 16)]
    first, last = (row["errors"] for row in rows)
    for name in BRANCHES:
        assert last[name] == pytest.approx(last["schedule, ZeRO 0"], rel=1e-5)
        assert 0 < last[name] < 1.05 * first[name], "more micro-batches must not add error"
    assert last[SUM] < 1e-6
    assert last[NAIVE] > 1.2 * last["schedule, ZeRO 0"]
    assert last[UNTIED] > 0.5 * last["schedule, ZeRO 0"]
    assert len(table(rows).splitlines()) == 3
    plot(rows, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000
