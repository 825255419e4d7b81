"""Likelihood of text under a model, in each of its modes, on any number of data-parallel ranks.

The model is of the class that travels with an export (`inference.loading.load_model`). This class is common to exports
and checkpoints of any layout, needs no process group, and is the one that users run. Tests compare it with the training
stack: for losses in `tests/end_to_end/test_evaluate.py`, for logits and depths in `tests/unit/huggingface`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.evaluation.modes import THRESHOLD, TOPK, Mode
from mor_megatron.evaluation.routing import Calibration, router_logits
from mor_megatron.evaluation.sequences import IGNORED, Padded, Piece, pad
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM


@dataclass(frozen=True)
class ModeResult:
    """Results of one mode."""

    mode: Mode
    nll: float
    """Mean negative log-likelihood of a prediction, nats."""
    perplexity: float
    bits_per_byte: float | None
    """Bits of all predictions divided by the bytes of the predicted text; None without a tokenizer."""
    fractions: tuple[float, ...]
    """Fraction of tokens that take each recursion, [Nr]."""
    losses: tuple[float, ...]
    """Negative log-likelihood of each sequence, the sum over its predictions, nats, [sequences]."""

    @property
    def mean_depth(self) -> float:
        """Mean number of recursions per token."""
        return sum(self.fractions)


@dataclass(frozen=True)
class Likelihood:
    """Results on one text."""

    sequences: int
    tokens: int
    """Predictions."""
    nbytes: int | None
    """UTF-8 bytes of the predicted text; None without a tokenizer."""
    results: tuple[ModeResult, ...]
    same_depth: float | None
    """expert_choice: fraction of tokens with the same depth by threshold and by top-k."""
    calibration: list[dict] | None
    """expert_choice: see `routing.Calibration.report`."""


class _Sums:
    """Sums over batches and ranks, in float64."""

    def __init__(
        self,
        modes: Sequence[Mode],
        sequences: int,
        num_recursions: int,
        calibration: Calibration | None,
        device: torch.device,
    ):
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)
        """Numbers of sequences, predictions, bytes, and tokens that have the same depth in two modes."""
        self.losses = torch.zeros(len(modes), sequences, dtype=torch.float64, device=device)
        """Of each sequence; another rank's are 0."""
        self.depths = torch.zeros(len(modes), num_recursions + 1, dtype=torch.float64, device=device)
        """Number of tokens by the recursions that they took."""
        self.calibration = calibration

    def over_ranks(self) -> None:
        tensors = [self.counts, self.losses, self.depths]
        for tensor in tensors + ([] if self.calibration is None else self.calibration.tensors()):
            dist.all_reduce(tensor)


@torch.no_grad()
def likelihood(
    model: MoRForCausalLM,
    pieces: Sequence[Piece],
    modes: Sequence[Mode],
    batch_size: int,
    nbytes: Tensor | None = None,
) -> Likelihood:
    """Evaluate a text. Collective over all ranks of the process group, if there is one; they divide the pieces.

    Args:
        model: in evaluation mode; the same on every rank.
        pieces: at least one; the same on every rank.
        modes: from `modes_of`.
        batch_size: pieces per pass.
        nbytes: bytes of each token, [V] (`sequences.token_bytes`).
    Raises:
        ValueError: nothing is predicted.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, config = model.device, model.config
    calibration = None
    if any(mode.name == TOPK for mode in modes) and model.model.router.threshold_routers:
        calibration = Calibration(config.plan.capacities, config.router_threshold, device)
    sums = _Sums(modes, len(pieces), config.num_recursions, calibration, device)
    mine = range(rank, len(pieces), world)
    default, config.depth = config.depth, None  # a mode says how deep tokens go
    try:
        for start in range(0, len(mine), batch_size):
            taken = mine[start : start + batch_size]
            _add(model, pad([pieces[i] for i in taken]), taken, modes, sums, nbytes)
    finally:
        config.depth = default
    if world > 1:
        sums.over_ranks()
    return _results(modes, sums, nbytes is not None)


def _add(
    model: MoRForCausalLM, batch: Padded, places: range, modes: Sequence[Mode], sums: _Sums, nbytes: Tensor | None
) -> None:
    labels = batch.labels.to(model.device)
    counted = batch.labels[batch.labels != IGNORED]
    sums.counts[0] += len(batch.tokens)
    sums.counts[1] += len(counted)
    if nbytes is not None:
        sums.counts[2] += nbytes[counted].sum().item()
    depths: dict[str, Tensor] = {}
    for i, mode in enumerate(modes):
        if mode.name == TOPK and sums.calibration is not None:
            with router_logits(model) as logits:
                losses, depths[mode.name] = _run(model, batch, labels, mode)
            sums.calibration.add(logits, depths[mode.name])
        else:
            losses, depths[mode.name] = _run(model, batch, labels, mode)
        sums.losses[i, places.start : places.stop : places.step] = losses
        passed = depths[mode.name]
        sums.depths[i] += torch.bincount(passed[passed >= 0].long(), minlength=sums.depths.shape[1])
    if sums.calibration is not None:
        sums.counts[3] += (depths[TOPK] == depths[THRESHOLD])[depths[TOPK] >= 0].sum()


def _run(model: MoRForCausalLM, batch: Padded, labels: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """The sum of each sequence's losses [B], and the depths [B, S]."""
    output = model(batch.tokens.to(model.device), batch.mask.to(model.device), use_cache=False, **mode.options)
    totals = []
    for logits, wanted in zip(
        output.logits, labels, strict=True
    ):  # fp32 copies of the logits for one sequence at a time
        losses = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="none")
        totals.append(losses.sum(dtype=torch.float64))
    return torch.stack(totals), output.depths


def _results(modes: Sequence[Mode], sums: _Sums, has_bytes: bool) -> Likelihood:
    sequences, tokens, total_bytes, same_depth = sums.counts.tolist()
    if tokens == 0:
        raise ValueError("no token counts as a prediction: give other data")
    results = []
    for mode, losses, by_depth in zip(modes, sums.losses.tolist(), sums.depths.cpu(), strict=True):
        loss = math.fsum(losses)
        nll = loss / tokens
        passing = by_depth.flip(0).cumsum(0).flip(0) / by_depth.sum()  # [Nr + 1]: at least this deep
        bits = loss / math.log(2) / total_bytes if has_bytes and total_bytes > 0 else None
        results.append(
            ModeResult(mode, nll, math.exp(min(nll, 700.0)), bits, tuple(passing[1:].tolist()), tuple(losses))
        )
    seen = sums.depths[0].sum().item()
    return Likelihood(
        sequences=int(sequences),
        tokens=int(tokens),
        nbytes=int(total_bytes) if has_bytes else None,
        results=tuple(results),
        same_depth=None if sums.calibration is None else same_depth / seen,
        calibration=None if sums.calibration is None else sums.calibration.report(),
    )
