"""Every preset method with every preset size is valid, has the published shape, and causes no needless warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.planning.accounting import count_parameters, paper_flops_per_token

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
SIZES = ("tiny", "135m", "360m", "730m", "1.7b")
EXPERTS = tuple(f"mor_expert_nr{n}{kv}" for n in (2, 3, 4) for kv in ("", "_kv_sharing"))
METHODS = ("vanilla", "recursive_nr2", "recursive_nr3", "recursive_nr4", *EXPERTS, "mor_token_nr3")


def load(method: str, size: str, *flags: str) -> Config:
    files = [str(CONFIGS / f"{name}.yaml") for name in (method, size)]
    return validate(read_config(["--config", *files, *flags]))


def test_every_preset_file_is_listed_here():
    others = {"recipe"} | {path.stem for path in CONFIGS.glob("quickstart*.yaml")}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*SIZES, *METHODS} | others


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_is_valid_and_nothing_in_it_is_ignored(method, size, caplog):
    config = load(method, size)
    count = config.recursion.num_recursions
    assert f"nr{count}" in method or (method == "vanilla" and count == 1)
    assert (config.recursion.routing == "expert_choice") == method.startswith("mor_expert")
    assert (config.recursion.kv_mode == "sharing") == method.endswith("kv_sharing")
    assert "ignored" not in caplog.text
    assert config.training.train_iters == 100 or size != "tiny"
    if size != "tiny":
        assert config.data.seq_length * config.training.global_batch_size == 2_097_152
        # 16 sequences of 1.7B do not fit into 80 GB.
        assert config.training.micro_batch_size == (8 if size == "1.7b" else 16)
        assert (config.optimizer.lr, config.optimizer.adam_beta2, config.training.bf16) == (3e-3, 0.95, True)


# Effective depths; Nr=4 rounds up, the others down.
DEPTHS = {
    "135m": {2: 30, 3: 29, 4: 30},
    "360m": {2: 32, 3: 32, 4: 34},
    "730m": {2: 26, 3: 26, 4: 26},
    "1.7b": {2: 24, 3: 23, 4: 26},
}


@pytest.mark.parametrize("size", DEPTHS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_effective_depth(size, count):
    assert load(f"recursive_nr{count}", size).model.num_layers == DEPTHS[size][count]
    assert load(f"mor_expert_nr{count}", size).model.num_layers == DEPTHS[size][count]


@pytest.mark.parametrize(
    ("size", "method", "flags", "millions"),
    [
        ("135m", "vanilla", (), 106.2),
        ("360m", "vanilla", (), 314.6),
        ("730m", "vanilla", (), 654.4),
        ("1.7b", "vanilla", (), 1610.7),
        ("360m", "recursive_nr2", (), 167.2),
        ("360m", "recursive_nr3", (), 118.0),
        ("360m", "recursive_nr4", (), 98.3),
        ("360m", "recursive_nr4", ("--depth-rounding", "down"), 88.5),
    ],
)
def test_parameters_without_embedding(size, method, flags, millions):
    assert count_parameters(load(method, size, *flags)).non_embedding / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_360m_iterations_spend_the_papers_budget(method):
    config = load(method, "360m")
    flops = paper_flops_per_token(config) * config.data.seq_length * config.training.global_batch_size
    # 16.5e18 forward FLOPs; the published 14161 is one iteration above the quotient.
    assert config.training.train_iters == pytest.approx(16.5e18 / flops, abs=1.01)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(256, 4), (1024, 1)])
def test_more_ranks_than_a_micro_batch_fits_keep_the_recipe(ranks, micro_batch):
    """The batch is a part of the recipe; how it is cut is not."""
    files = [str(CONFIGS / f"{name}.yaml") for name in ("mor_expert_nr3", "360m")]
    kept = f"use --micro-batch-size {micro_batch}, which keeps the global batch, or --global-batch-size {16 * ranks}"
    with pytest.raises(ValueError, match=f"global-batch-size=1024 .*{ranks} data-parallel ranks: {kept}$"):
        validate(read_config(["--config", *files]), ranks)
    config = validate(read_config(["--config", *files, "--micro-batch-size", str(micro_batch)]), ranks)
    assert config.training.global_batch_size == 1024
