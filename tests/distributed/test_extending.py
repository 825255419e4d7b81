"""The claims of docs/extending.md: one file outside the package adds a sharing strategy and a routing method, and
nothing else is edited. The file is examples/extension/parity.py; salience.py uses what that one does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_runs import describe, differences, my_batches, train
from table import BLOCK, LAYOUTS, MICRO_BATCH, ONE, SEQ_LENGTH, STEPS, VOCABULARY, Layout
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mor_megatron.config import schema
from mor_megatron.config.cli import parse_config, read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.huggingface.export import read_checkpoint, to_model, write
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.accounting import (
    count_parameters,
    measured_fractions,
    router_parameters,
    training_flops_per_token,
)
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.methods import METHODS
from mor_megatron.recursion.plan import STRATEGIES
from mor_megatron.training.evaluate import evaluate

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import import_hf

FILE = Path(__file__).parents[2] / "examples" / "extension" / "parity.py"
PARITY = f"""--extension {FILE} --routing parity --sharing-strategy late_cycle --num-recursions 2
    --num-layers {1 + 2 * BLOCK}"""
SALIENCE = f"""--extension {Path(__file__).with_name("salience.py")} --routing salience --num-recursions 3
    --sharing-strategy two_first_cycle --num-layers {3 + 3 * BLOCK}"""
SIZE = f"""--hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --max-position-embeddings {SEQ_LENGTH}
    --init-method-std 0.1 --vocab-size {VOCABULARY} --make-vocab-size-divisible-by 6 --seq-length {SEQ_LENGTH}
    --micro-batch-size {MICRO_BATCH} --train-iters {STEPS} --optimizer sgd --lr 0.2 --clip-grad 0.5
    --lr-wsd-decay-iters 0"""


@pytest.fixture(autouse=True)
def registered():
    """What the file registers is gone after a test."""
    methods, strategies, section = dict(METHODS), dict(STRATEGIES), schema.RecursionConfig
    yield
    for registry, before in ((METHODS, methods), (STRATEGIES, strategies)):
        registry.clear()
        registry.update(before)
    schema.RecursionConfig = section
    for name in (FILE.stem, "salience"):
        sys.modules.pop(name, None)


def config_of(layout: Layout = ONE, *flags: str, model: str = PARITY) -> Config:
    divided = [
        *("--global-batch-size", str(layout.global_batch), "--zero-stage", str(layout.zero)),
        *("--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp)),
        *(["--sequence-parallel"] if layout.sequence_parallel else []),
    ]
    return validate(read_config([*model.split(), *SIZE.split(), *divided, *flags]), layout.world_size)


def pair_of(name: str) -> tuple[Layout, Layout]:
    """A layout, and one process that has its batch."""
    (layout,) = [layout for layout in LAYOUTS if layout.name == name]
    return layout, replace(ONE, global_batch=layout.global_batch)


def train_in(layout: Layout, model: str = PARITY):
    """In a worker: the file is loaded there as well."""
    return train(config_of(layout, model=model))


def losses_in(layout: Layout, model: str) -> dict[str, float | None]:
    """Of every selection and every fixed depth."""
    config = config_of(layout, "--eval-iters", "1", "--eval-fixed-depths", model=model)
    initialize_distributed(config)
    return evaluate(build_model(config), my_batches(config, step=1), config, iteration=0)


@pytest.mark.parametrize("name", ["tp2-sp", "pp2", pytest.param("dp2-zero3", marks=pytest.mark.slow)])
def test_it_trains_alike_in_every_layout(workers, lone_worker, name: str):
    layout, one = pair_of(name)
    (expected,) = lone_worker.run(1, ONE.groups, train_in, one)
    got = workers.run(layout.world_size, layout.groups, train_in, layout)[0]
    found = differences(got, expected)
    assert not found, describe(found)
    fractions = expected.reports[-1].routing
    assert fractions["tokens_per_recursion_0"] == 1.0
    assert 0.2 < fractions["tokens_per_recursion_1"] < 0.8, "some tokens go deep"
    moved = expected.final["router.gate.out.weight"] - expected.initial["router.gate.out.weight"]
    assert moved.abs().max() > 0, "the gate is trained"


@pytest.mark.parametrize("name", [pytest.param("tp2-sp", marks=pytest.mark.slow), "pp2", "dp2-zero3"])
def test_a_module_of_its_own_and_looking_ahead_train_alike_in_every_layout(workers, lone_worker, name: str):
    layout, one = pair_of(name)
    (expected,) = lone_worker.run(1, ONE.groups, train_in, one, SALIENCE)
    found = differences(workers.run(layout.world_size, layout.groups, train_in, layout, SALIENCE)[0], expected)
    assert not found, describe(found)
    assert expected.reports[-1].routing["tokens_per_recursion_2"] == 0.5
    assert expected.buffers["router.steps"] == STEPS


@pytest.mark.parametrize("model", [PARITY, SALIENCE])
def test_losses_of_fixed_depths_are_alike_in_a_ring(workers, lone_worker, model: str):
    (ring,) = [layout for layout in LAYOUTS if layout.name == "pp2"]
    (expected,) = lone_worker.run(1, ONE.groups, losses_in, ONE, model)
    found = workers.run(2, ring.groups, losses_in, ring, model)[0]
    assert found == pytest.approx(expected, rel=2e-6)  # fp32: the same sums in another order, once
    assert len(set(expected.values())) >= 3, "depths and selections differ"


def test_its_settings_are_settings(capsys):
    for flag in ("--help", "--print-config"):
        with pytest.raises(SystemExit):
            parse_config([*PARITY.split(), *SIZE.split(), "--parity-period", "3", flag])
        shown = capsys.readouterr().out
        assert "parity-period" in shown
    assert "parity-period: 3" in shown
    with pytest.raises(ValueError, match="parity-period=1 sends every token deep: use 2 or more"):
        config_of(ONE, "--parity-period", "1")
    with pytest.raises(ValueError, match="parity-period=0 is out of range: use 1 or more"):
        config_of(ONE, "--parity-period", "0")
    with pytest.raises(ValueError, match=r"num-layers=10 does not fit .* with sharing-strategy=late_cycle"):
        config_of(ONE, "--num-layers", "10")
    plan = config_of().plan
    assert ([layer.index for layer in plan.first], len(plan.last), plan.block_size) == ([0], 0, BLOCK)


def test_it_is_counted(process_group):
    config = config_of(ONE, "--make-vocab-size-divisible-by", str(VOCABULARY))
    model = build_model(config)
    assert count_parameters(config).unique == sum(weight.numel() for weight in model.parameters())
    assert router_parameters(config) == 32
    ids = torch.arange(2 * SEQ_LENGTH).view(2, SEQ_LENGTH) % VOCABULARY
    context = RoutingContext()
    with FlopCounterMode(display=False) as counter:
        model(Batch(ids, ids.roll(-1, dims=1)), context).mean().backward()
    counted = counter.get_flop_counts()["Global"]
    measured = sum(flops for operation, flops in counted.items() if "attention" not in str(operation))
    fractions = measured_fractions({name: float(value) for name, value in context.metrics.items()}, 2)
    products = replace(config, data=replace(config.data, seq_length=0))  # kernels of attention are no plain products
    passes = sum(1.0 if layer.recursion is None else fractions[layer.recursion] for layer in config.plan.layers)
    norms = 2 * 32 * (2 * passes + 1)  # gradients of norm weights are products with ones, and not counted by us
    expected = training_flops_per_token(products, fractions).model + norms
    assert measured == pytest.approx(ids.numel() * expected, rel=1e-6)


@pytest.fixture
def saved(process_group, tmp_path) -> Path:
    """Trained for three iterations, stopped, and resumed for three more."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from mor_megatron.pretraining.pretrain import pretrain

    corpus = str(tmp_path / "text")
    builder = IndexedDatasetBuilder(f"{corpus}.bin", dtype=np.uint16)
    for start in range(60):
        builder.add_document(torch.arange(start, start + 40) % VOCABULARY, [40])
    builder.finalize(f"{corpus}.idx")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--data-path", corpus, "--split", "80,20,0", "--train-iters", "6", "--eval-iters", "0"]
    flags += ["--peak-tflops", "1"]
    pretrain(config_of(ONE, *flags, "--save", str(whole)))
    pretrain(config_of(ONE, *flags, "--save", str(parts), "--exit-interval", "3"))
    pretrain(config_of(ONE, *flags, "--save", str(parts), "--load", str(parts)))
    ends = [read_checkpoint(path).weights for path in (whole, parts)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()), "it resumes bit for bit"
    return parts


@torch.no_grad()
def test_it_resumes_is_exported_and_generates(saved: Path, tmp_path: Path, modules_of_exports):
    from mor_megatron.huggingface.importing import read_export
    from mor_megatron.huggingface.verify import training_model

    checkpoint = read_checkpoint(saved)
    output = write(to_model(checkpoint.weights, checkpoint.config), None, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert type(exported.model.router).__module__.endswith(".parity")
    ids = torch.arange(3 * 16).view(3, 16) % VOCABULARY
    ours = training_model(checkpoint.weights, checkpoint.config)(Batch(ids))
    found = exported(ids)
    torch.testing.assert_close(found.logits, ours, atol=1e-5, rtol=0)  # fp32: the same sums in another order
    assert torch.equal(found.depths, torch.where(ids % 2 == 0, 2, 1).to(torch.int8))
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    cached, plain = (exported.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (3, 22)
    weights, config = read_export(output)
    assert config.recursion.parity_period == 2
    assert all(torch.equal(weights[name], value) for name, value in checkpoint.weights.items()), "it is imported again"


@torch.no_grad()
def test_a_module_of_its_own_is_exported_evaluated_and_imported(process_group, tmp_path: Path):
    from mor_megatron.evaluation.likelihood import likelihood
    from mor_megatron.evaluation.modes import modes_of
    from mor_megatron.evaluation.sequences import Piece
    from mor_megatron.huggingface.convert_config import export_config
    from mor_megatron.huggingface.importing import write_checkpoint
    from mor_megatron.huggingface.modeling_mor import MoRForCausalLM

    config = config_of(ONE, "--make-vocab-size-divisible-by", str(VOCABULARY), model=SALIENCE)
    model = build_model(config).eval()
    model.router.steps.fill_(7.0)
    weights = {name: value for name, value in model.state_dict().items() if value is not None}
    exported = to_model(weights, config)
    ids = torch.arange(3 * 16).view(3, 16) % VOCABULARY
    for selection in ("capacity", "threshold"):
        ours = model(Batch(ids), RoutingContext(selection=selection))
        torch.testing.assert_close(exported(ids, selection=selection).logits, ours, atol=1e-5, rtol=0)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    cached, plain = (exported.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(cached, plain)
    found = likelihood(exported, [Piece(ids[0], ids[0].roll(-1))], modes_of(exported.config), batch_size=1)
    assert [result.mode.name for result in found.results] == ["topk", "threshold", "depth 1", "depth 2", "depth 3"]
    assert found.calibration is None, "it names no module whose logits a threshold reads"
    write_checkpoint(weights, config, tmp_path / "imported")
    again = read_checkpoint(tmp_path / "imported").weights
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert again["router.steps"] == 7.0
    fresh = MoRForCausalLM(export_config(config)).model.router.scorer
    assert 0.03 < fresh.inner.std() < 0.3, "drawn with initializer_range=0.1"
    assert torch.equal(fresh.out, torch.ones(32))


def test_a_dense_model_begins_one_of_its_sharing_strategy(tmp_path: Path, monkeypatch):
    """With a checkpoint that names the file."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=5)).save_pretrained(tmp_path / "llama")
    words = f"--model {tmp_path / 'llama'} --output {tmp_path / 'run'} --num-recursions 2 --sharing-strategy late_cycle"
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *words.split(), "--extension", str(FILE)])
    assert import_hf.main() == 0
    recursion = read_checkpoint(tmp_path / "run").config.recursion
    assert (recursion.sharing_strategy, recursion.extension) == ("late_cycle", str(FILE))


def test_parameters_outside_a_submodule_are_refused(process_group, monkeypatch):
    def build(self, hidden_size, dtype):
        self.bare = torch.nn.Parameter(torch.empty(1, hidden_size))

    config = config_of(ONE, model=SALIENCE)
    monkeypatch.setattr(METHODS["salience"], "build", build)
    with pytest.raises(ValueError, match="routing=salience has the parameters bare outside a submodule"):
        build_model(config)


def test_a_plan_that_comes_back_to_an_earlier_rank_is_refused(monkeypatch):
    layers = [(0, 0), (1, 0), (0, 0), (0, 1), (1, 1), (0, 1)]
    monkeypatch.setitem(STRATEGIES, "there_and_back", lambda depth, num_recursions: layers)
    model = f"--extension {FILE} --routing parity --sharing-strategy there_and_back --num-recursions 2 --num-layers 6"
    assert config_of(model=model).plan.is_cyclic
    with pytest.raises(ValueError, match="there_and_back comes back to an earlier layer within a pass over the ranks"):
        config_of(replace(ONE, pp=2), model=model)


def test_the_depth_that_a_pipeline_needs_counts_every_use(monkeypatch):
    def doubled(depth, num_recursions):
        block, rest = divmod(depth, 2 * num_recursions)
        return [] if rest else [(slot, r) for r in range(num_recursions) for slot in range(block) for _ in range(2)]

    monkeypatch.setitem(STRATEGIES, "doubled", doubled)
    model = f"--extension {FILE} --routing parity --sharing-strategy doubled --num-recursions 2 --num-layers"
    with pytest.raises(ValueError, match=r"does not fit a block of 1 layer .*use .*--num-layers 8 or more"):
        config_of(replace(ONE, pp=2), model=f"{model} 4")
    assert config_of(replace(ONE, pp=2), model=f"{model} 8").plan.block_size == 2
