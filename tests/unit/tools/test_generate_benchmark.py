"""The set-up of the generation benchmark: routing at the fractions of training, and the resulting keys and values."""

from __future__ import annotations

import generate
import pytest


def test_routing_and_keys_are_those_of_the_training_capacities():
    sizes = ["--hidden-size", "64", "--ffn-hidden-size", "96", "--vocab-size", "256"]
    lengths = ["--prompt", "64", "--new", "12", "--batch-sizes", "1", "4", "--rounds", "1", "1"]
    rows = {(row["batch"], row["model"]): row for row in generate.measure(generate.parse(sizes + lengths))}
    assert len(rows) == 2 * (1 + len(generate.MODELS))
    for (batch, name), row in rows.items():
        assert row["first_token_seconds"] > 0.0
        assert row["decode_tokens_per_second"] > 0.0
        if name in (generate.HF, generate.VANILLA, "recursive"):
            assert row.get("block_rows_to_vanilla", 1.0) == 1.0
            continue
        assert row["mean_depth"] == pytest.approx(2.0, abs=0.3), (batch, name)  # (Nr + 1) / 2, up to chance
        expected = 1 / 3 if "sharing" in name else row["mean_depth"] / 3
        assert row["block_rows_to_vanilla"] == pytest.approx(expected), (batch, name)
        assert row["prefill_flops_to_vanilla"] < 0.9


def test_every_batch_size_needs_its_rounds(capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--batch-sizes", "1", "8"])
    assert "--rounds has 3 values: give one for each of 2" in capsys.readouterr().err
