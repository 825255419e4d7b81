"""Results of the runs of a family, from their metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.data.tokenizers import configured_tokenizer, resolve_vocabulary
from mor_megatron.planning.accounting import (
    count_parameters,
    dense_equivalent,
    measured_fractions,
    training_flops_per_token,
)
from mor_megatron.scaling.family import Run
from mor_megatron.training.metrics import THRESHOLD_LOSS, TOPK_LOSS


@dataclass(frozen=True)
class RunResult:
    """A finished run: the trunk up to the branch, and the decay."""

    run: Run
    parameters: int
    """Number of unique parameters, without embedding and head."""
    unrolled: int
    """Number of parameters of the vanilla model of this depth, counted likewise."""
    tokens: int
    executed_flops: float
    """Executed training FLOPs: forward and backward, head included, tokens as they were routed; without recomputation
    and without a teacher's."""
    topk: float
    """Validation loss with whole-sequence selection, nats per token."""
    threshold: float
    """Validation loss with causal selection, nats per token."""

    def loss(self, name: str) -> float:
        """One of `TOPK_LOSS` and `THRESHOLD_LOSS`."""
        return {TOPK_LOSS: self.topk, THRESHOLD_LOSS: self.threshold}[name]


def read_result(run: Run) -> RunResult | None:
    """The result of a run; None if it has not finished.

    Raises:
        ValueError: its settings or metrics cannot be read, or its validation loss is not finite.
    """
    records = [*_records(run.trunk, 0, run.branch), *_records(run.decay, run.branch, run.iterations)]
    steps = [record for record in records if "lm_loss" in record]
    last = [record for record in records if TOPK_LOSS in record and record["iteration"] == run.iterations]
    if len(steps) < run.iterations or not last:
        return None
    if last[-1][TOPK_LOSS] is None or last[-1][THRESHOLD_LOSS] is None:
        raise ValueError(f"{run.decay}: the validation loss of iteration {run.iterations} is not finite")
    config = read_config(["--config", str(run.configs[1])])
    config = resolve_vocabulary(config, configured_tokenizer(config.data))
    return RunResult(
        run,
        count_parameters(config).non_embedding,
        count_parameters(dense_equivalent(config)).non_embedding,
        steps[-1]["consumed_tokens"],
        sum(executed_flops(config, steps)),
        last[-1][TOPK_LOSS],
        last[-1][THRESHOLD_LOSS],
    )


def executed_flops(config: Config, steps: list[dict]) -> Iterator[float]:
    """Executed training FLOPs of each iteration, from the fractions of tokens that the run reported."""
    tokens = config.training.global_batch_size * config.data.seq_length
    for step in steps:
        fractions = measured_fractions(step, config.recursion.num_recursions)
        yield tokens * training_flops_per_token(config, fractions).model


def _records(directory: Path, first: int, last: int) -> list[dict]:
    """Records of iterations first+1..last."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}): is the run still writing?") from error
    return [record for record in records if first < record["iteration"] <= last]
