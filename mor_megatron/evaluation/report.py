"""The results of an evaluation, as a table and as a dictionary for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from mor_megatron.evaluation.likelihood import Likelihood
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.convert_config import training_config
from mor_megatron.planning.accounting import count_parameters, executed_flops_per_token


def summary(model: MoRConfig, found: Likelihood, seq_length: int) -> dict:
    """All results, by name.

    Args:
        model: configuration of the model.
        found: the measured values.
        seq_length: tokens per sequence; the FLOPs of attention depend on it.
    """
    config = training_config(model)
    config = replace(config, data=replace(config.data, seq_length=seq_length))
    modes = {}
    for result in found.results:
        modes[result.mode.name] = {
            "causal": result.mode.causal,
            "nll": result.nll,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "mean_depth": result.mean_depth,
            "fractions": list(result.fractions),
            "executed_flops_per_token": executed_flops_per_token(config, result.fractions),
            "losses": list(result.losses),
        }
    return {
        "sequences": found.sequences,
        "seq_length": seq_length,
        "tokens": found.tokens,
        "bytes": found.nbytes,
        "parameters": asdict(count_parameters(config)),
        "ways": modes,
        "same_depth": found.same_depth,
        "calibration": found.calibration,
    }


def table(facts: dict) -> str:
    """The summary as text."""
    modes = facts["ways"]
    count = len(next(iter(modes.values()))["fractions"])
    rows = [("", list(modes))]
    rows.append(("causal", ["yes" if mode["causal"] else "no" for mode in modes.values()]))
    rows += [
        ("negative log-likelihood (nats/token)", [f"{mode['nll']:.4f}" for mode in modes.values()]),
        ("perplexity", [f"{mode['perplexity']:.3f}" for mode in modes.values()]),
    ]
    if facts["bytes"]:
        rows.append(("bits per byte", [f"{mode['bits_per_byte']:.4f}" for mode in modes.values()]))
    if count > 1:
        rows.append(("mean depth", [f"{mode['mean_depth']:.3f}" for mode in modes.values()]))
        for r in range(count):
            rows.append((f"tokens at recursion {r}", [f"{mode['fractions'][r]:.1%}" for mode in modes.values()]))
    flops = [f"{mode['executed_flops_per_token'] / 1e6:,.2f}" for mode in modes.values()]
    rows.append(("executed forward FLOPs a token (1e6)", flops))
    size = f"{facts['bytes']:,} bytes, " if facts["bytes"] else ""
    parameters = facts["parameters"]
    lines = [
        f"{facts['tokens']:,} tokens predicted, {size}{facts['sequences']:,} sequences of {facts['seq_length']:,}",
        f"{parameters['unique']:,} parameters, {parameters['non_embedding']:,} without embedding",
        *_aligned(rows),
    ]
    if facts["calibration"] is not None:
        lines += ["", *_calibration(facts)]
    return "\n".join(lines)


def _calibration(facts: dict) -> list[str]:
    rows = [("score against top-k, by recursion", ["candidates", "kept", "threshold agrees", "calibration error"])]
    for entry in facts["calibration"]:
        cells = [f"{entry['candidates']:,}", f"{entry['kept']:.1%}", f"{entry['agreement']:.1%}"]
        rows.append((f"recursion {entry['recursion']}", [*cells, f"{entry['calibration_error']:.3f}"]))
    return [*_aligned(rows), f"threshold and top-k send {facts['same_depth']:.2%} of all tokens equally deep"]


def _aligned(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(rows[0][1]))]
    return [
        (name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))).rstrip()
        for name, cells in rows
    ]
