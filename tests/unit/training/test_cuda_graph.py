"""CUDA graphs of a micro-batch, with a tape in the graph's place: the same operators on the same memory, no Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_train_step import EXPERT, RECURSIVE, cut, global_batch, make_config, make_engine, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mor_megatron.config.cli import read_config
from mor_megatron.config.validate import validate
from mor_megatron.distributed.initialize import _choose_stream
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.training import cuda_graph
from mor_megatron.training.train_step import train_step

SIZES = "--num-layers 8 --num-recursions 3 --vocab-size 64"
GRAPH = f"{SIZES} --enable-cuda-graph --bf16"
REFUSED = {
    "--routing token_choice": "routing=token_choice, which runs another number of tokens",
    "--pipeline-model-parallel-size 2": "pipeline-model-parallel-size=2, ",
    "--tensor-model-parallel-size 2": "tensor-model-parallel-size=2, ",
    "--zero-stage 3": "zero-stage=3 and precision bf16, ",
    "--bf16 false": "zero-stage=1 and precision fp32, ",
    "--optimizer-cpu-offload": "optimizer-cpu-offload=True, ",
    "--reset-attention-mask": "reset-attention-mask=True, ",
}

RELAXED = replace(EXPERT, relaxation="lora", lora_rank=3, recursion_norms=True, recursion_embedding=True)


class Tape(TorchDispatchMode):
    """Runs operators and remembers them. Each is run again on the tensors it had, into the tensors that it gave."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        out = func(*args, **(kwargs or {}))
        # What autograd changes in place later must still be what the operator had and gave.
        self.calls.append((func, *tree_map(_alias, (args, kwargs or {}, out))))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _alias(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def tapes(process_group, monkeypatch):
    """The tapes that were recorded in the place of graphs. Recording must not count as running."""
    tapes: list[Tape] = []

    def build(engine):
        def capture(body):
            before = [gradient.clone() for gradient in engine.flat_gradients()]
            with Tape() as tape:
                body()
            for gradient, value in zip(engine.flat_gradients(), before, strict=True):
                gradient.copy_(value)
            tapes.append(tape)
            return tape.replay

        monkeypatch.setattr(cuda_graph, "capture", capture)
        monkeypatch.setattr(cuda_graph, "uses_cuda_graph", lambda config: True)
        return tapes

    return build


def config_of(recursion, **training):
    config = make_config((True, 1), recursion=recursion, micro_batch_size=1, optimizer="adam", clip_grad=0.5)
    return validate(replace(config, training=replace(config.training, enable_cuda_graph=True, **training)))


def batches(iteration, size=1):
    """Odd iterations count every token."""
    batch = global_batch(iteration)
    mask = torch.ones_like(batch.loss_mask) if iteration % 2 else batch.loss_mask
    return cut(replace(batch, loss_mask=mask), size)


def run(config, tapes=None, steps=8):
    engine = make_engine(config)
    recorded = tapes(engine) if tapes else None
    used = replace(config, training=replace(config.training, enable_cuda_graph=tapes is not None))
    reports = [train_step(engine, batches(i), used, i, 0.01) for i in range(1, 1 + steps)]
    return reports, weights(engine), recorded


@pytest.mark.parametrize(
    ("recursion", "training"),
    [
        (replace(EXPERT, capacity_warmup_iters=2), {}),
        pytest.param(EXPERT, {"recompute_granularity": "full"}, marks=pytest.mark.slow),
        pytest.param(RECURSIVE, {}, marks=pytest.mark.slow),
        pytest.param(RELAXED, {}, marks=pytest.mark.slow),
    ],
    ids=["expert-warm-up", "recompute", "recursive", "relaxed"],
)
def test_replays_train_as_eager_passes_do(tapes, recursion, training):
    """Masks count other numbers of tokens in each micro-batch, and in each iteration the factor of the loss differs."""
    config = config_of(recursion, **training)
    (expected, expected_weights, _), (got, got_weights, recorded) = run(config), run(config, tapes)
    assert got == expected
    for name, value in expected_weights.items():
        assert torch.equal(got_weights[name], value), name
    assert len(recorded) == 1, "one capture for all iterations"


def test_a_new_shape_is_captured_again(tapes):
    config = config_of(EXPERT)
    engine = make_engine(config)
    recorded = tapes(engine)
    for i in range(1, 5):
        train_step(engine, batches(i), config, i, 0.01)
    larger = replace(config, training=replace(config.training, micro_batch_size=2))
    assert train_step(engine, batches(5, 2), larger, 5, 0.01).applied
    assert len(recorded) == 2


@pytest.mark.parametrize(("flags", "reason"), REFUSED.items())
def test_is_refused_with_the_reason(flags, reason):
    with pytest.raises(ValueError, match=f"enable-cuda-graph=True does not go with {reason}.*: .*leave"):
        validate(read_config(f"{GRAPH} --routing expert_choice {flags}".split()), world_size=2)


def test_a_method_must_say_that_its_shapes_stand_still():
    assert RoutingMethod.static_from(None) is None
    config = validate(read_config(f"{GRAPH} --routing expert_choice --capacity-warmup-iters 7".split()))
    assert config.routing_method.static_from(config.recursion) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_a_machine_without_cuda_is_refused():
    with pytest.raises(ValueError, match="enable-cuda-graph=True, but this machine has no CUDA"):
        cuda_graph.uses_cuda_graph(validate(read_config(GRAPH.split())))


@pytest.mark.parametrize(("flags", "moved"), [(GRAPH, 1), (SIZES, 0)])
def test_a_model_is_built_on_the_stream_on_which_it_is_captured(monkeypatch, flags, moved):
    """On the default stream, which a capture must not depend on, autograd would add the gradients."""
    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1] if streams else "default")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "another")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    config = read_config(flags.split())
    for _ in range(2):
        _choose_stream(config)
    assert streams == ["another"] * moved
