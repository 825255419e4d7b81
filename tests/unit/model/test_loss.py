"""Head and loss in chunks equal the whole ones, and never have all logits in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from models import random_ids, small_config
from torch import Tensor

from mor_megatron.data.batch import Batch
from mor_megatron.model import mor_model
from mor_megatron.model.loss import chunked_losses, whole_losses
from mor_megatron.model.mor_model import build_model

pytestmark = pytest.mark.usefixtures("process_group")

LENGTH, BATCH, WIDTH, VOCABULARY, PADDED = 10, 3, 16, 61, 64
FP32_TOL = 1e-6  # of the largest: sums in another order


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows, the head's weight, labels, and which tokens count: not the first."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(LENGTH, BATCH, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=draw).to(dtype).requires_grad_()
    counted = (torch.rand(LENGTH, BATCH, generator=draw) > 0.3).float()
    counted[0, 0] = 0.0
    return hidden, weight, torch.randint(VOCABULARY, (LENGTH, BATCH), generator=draw), counted


def run(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor | None, chunk: int) -> list[Tensor]:
    """Losses, and gradients of hidden rows and weight; chunk 0 is the whole loss."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    if chunk == 0:
        losses = whole_losses(hidden @ weight.t(), labels, VOCABULARY)
    else:
        losses = chunked_losses(hidden, weight, labels, counted, chunk, VOCABULARY, sequence_parallel=False)
    total = losses if counted is None else losses * counted
    (3.0 * total.sum(dtype=torch.float64)).backward()
    return [losses.detach(), hidden.grad, weight.grad]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("chunk", [1, 7, 30, 100])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_whole_loss(chunk, masked):
    hidden, weight, labels, counted = problem()
    counted = counted if masked else None
    close(run(hidden, weight, labels, counted, chunk), run(hidden, weight, labels, counted, 0), FP32_TOL)


def test_in_bf16_sums_over_chunks_are_fp32():
    """Against fp64: rounding of the logits' gradients to 8 bits remains, as in the whole loss."""
    hidden, weight, labels, counted = problem(torch.bfloat16)
    exact = run(hidden.double(), weight.double(), labels, counted, 0)
    for chunk in (2, 100):
        found = run(hidden, weight, labels, counted, chunk)
        close([x.double() for x in found], [x.double() for x in exact], 1e-2)


def test_no_token_counts():
    hidden, weight, labels, counted = problem()
    _, grad_hidden, grad_weight = run(hidden, weight, labels, torch.zeros_like(counted), 7)
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_a_gradient_that_is_no_multiple_is_refused():
    hidden, weight, labels, counted = problem()
    losses = chunked_losses(hidden, weight, labels, counted, 7, VOCABULARY, sequence_parallel=False)
    with pytest.raises(RuntimeError, match="no multiple of the tokens' weights"):
        losses.sum().backward()


@pytest.mark.parametrize("trains", [True, False])
def test_logits_are_never_whole(trains):
    """Beside the gradients of hidden rows and weight, there is a chunk of logits and what has a few numbers a row."""
    length, vocabulary, chunk = 512, 1024, 32
    hidden = torch.randn(length, 1, WIDTH, requires_grad=trains)
    weight, labels = torch.randn(vocabulary, WIDTH, requires_grad=trains), torch.zeros(length, 1, dtype=torch.int64)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with LiveBytes() as memory, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = chunked_losses(hidden, weight, labels, None, chunk, vocabulary, sequence_parallel=False)
        if trains:
            losses.sum().backward()
    gradients = 4 * (hidden.numel() + weight.numel()) if trains else 0
    rows = 16 * 4 * length
    assert sum(kept) <= gradients + rows
    assert memory.peak <= gradients + 2 * 4 * chunk * vocabulary + rows


@pytest.mark.parametrize("untied", [True, False])
def test_in_a_model(untied, monkeypatch):
    calls = []
    monkeypatch.setattr(mor_model, "chunked_losses", lambda *args: calls.append(args) or chunked_losses(*args))
    config = small_config("vanilla", num_layers=2, vocab_size=VOCABULARY, untie_embeddings_and_output_weights=untied)
    ids = random_ids() % VOCABULARY
    batch = Batch(ids, ids.roll(-1, dims=1), loss_mask=(ids > 9).float())
    found = []
    for chunk in (None, 40):
        model = build_model(replace(config, training=replace(config.training, loss_chunk_rows=chunk)))
        (model(batch) * batch.loss_mask).sum().backward()
        found.append([weight.grad for weight in model.parameters()])
    close(found[1], found[0], 2 * FP32_TOL)  # gradients of the loss go through two layers
    assert len(calls) == 1, "a micro-batch of fewer rows than a chunk is computed as a whole on a CPU"
