"""Which model a checkpoint is of, and what a run that loads it has changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mor_megatron.checkpointing.shards import Sharding
from mor_megatron.config.schema import CHANGE, Config
from mor_megatron.config.settings import flag_name
from mor_megatron.config.unread import is_read
from mor_megatron.planning.stages import pipeline_plan
from mor_megatron.recursion.setting import Change, rule_of


@dataclass(frozen=True)
class Difference:
    """A setting that a run has otherwise than the checkpoint that it loads."""

    name: str
    """As users write it."""
    change: Change
    was: Any
    now: Any
    remedy: str | None = None
    """Other than that of its `Change`."""

    def __str__(self) -> str:
        return f"{self.name} was {_words(self.was)}, is now {_words(self.now)}"


def model_shape(config: Config) -> dict[str, Any]:
    """The settings that decide which function of its parameters the model is, and what shape they have."""
    decisive = (Change.WEIGHTS, Change.FUNCTION)
    shape = {flag_name(entry.name): value for entry, change, value in _settings(_plain(config)) if change in decisive}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in shape.items()}  # as JSON has it


def differences(saved: Config, wanted: Config) -> list[Difference]:
    """What differs between two runs, of the settings that both read and something depends on.

    Args:
        saved: resolved settings of the run that wrote a checkpoint.
        wanted: of the run that loads it.
    """
    before = {entry.name: value for entry, _, value in _settings(_plain(saved))}
    return [
        Difference(flag_name(entry.name), change, before[entry.name], value)
        for entry, change, value in _settings(_plain(wanted))
        if change is not Change.SILENT and entry.name in before and before[entry.name] != value
    ]


def corpus_differences(before: dict[str, int], now: dict[str, int]) -> list[Difference]:
    """Corpora of the same name that were written again: sizes in bytes, from `corpus_sizes`, differ."""
    return [
        Difference(f"size of {prefix}.bin", Change.REPORTED, before[prefix], size)
        for prefix, size in now.items()
        if prefix in before and before[prefix] != size
    ]


def argument_differences(before: str | None, now: str | None) -> list[Difference]:
    """Other corpora or weights in the file that names them, from `data_arguments`; a new file is another setting."""
    if None in (before, now) or before == now:
        return []
    return [Difference("the file of data arguments", Change.REPORTED, before, now)]


def _settings(config: Config) -> Iterator[tuple[Field, Change, Any]]:
    """Every setting that the configuration reads: its field, what its change means, its value."""
    for section in fields(config):
        part = getattr(config, section.name)
        for entry in fields(part):
            if is_read(config, section.name, entry):
                yield entry, rule_of(entry).change or section.metadata[CHANGE], getattr(part, entry.name)


def _plain(config: Config) -> Config:
    """One spelling of each model: no query groups where every head is one."""
    model = config.model
    if model.num_query_groups == model.num_attention_heads:
        model = replace(model, group_query_attention=False)
    return replace(config, model=model)


_REMEDIES = {
    Change.WEIGHTS: "give the model the same settings",
    Change.FUNCTION: "give the model the same settings, take the weights for another one with --finetune",
    Change.STATE: "use the same, or load weights only with --finetune, or all but its state with --no-load-optim",
}


def _words(value: Any) -> str:
    return (" ".join(map(str, value)) or "None") if isinstance(value, tuple) else str(value)


def layout(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """How state is divided among ranks and in which form."""
    parallel = config.parallel
    return {
        "tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "sequence-parallel": parallel.sequence_parallel,
        "pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "pipeline-layers": list(pipeline_plan(config).block_layers),
        "data-parallel ranks": data_parallel_size,
        "zero-stage": config.training.zero_stage,
        "precision": config.training.precision,
    }


def refuse(directory: Path, found: list[Difference], may_differ: set[Change]) -> None:
    """Refuse a checkpoint that a run with these settings cannot resume.

    Args:
        found: from `differences`.
        may_differ: besides what is only reported.
    Raises:
        ValueError: names the setting, both values and the remedy.
    """
    for each in found:
        if each.change is Change.REPORTED or each.change in may_differ:
            continue
        raise ValueError(
            f"{each.name}={_words(each.now)} does not fit {directory}, written with {each.name}={_words(each.was)}: "
            f"{each.remedy or _REMEDIES[each.change]}, or leave out --load"
        )


def require_same_parameters(
    directory: Path, saved: dict[str, Sharding], wanted: dict[str, Sharding], finetune: bool
) -> None:
    """Refuse a checkpoint that lacks a parameter, has another shape of it, or has one that the model would not load.

    Args:
        finetune: whether routers may be new, or not be wanted any more, and adapters and vectors of recursions be new.
    Raises:
        ValueError: names the parameter.
    """
    remedy = "give the model the same layers" if finetune else "give the model the same settings"
    for name in sorted({*saved, *wanted}):
        is_new = name not in saved and (".adapters." in name or name.startswith("recursion_embedding."))
        if finetune and (name.startswith("router.") or is_new):
            continue
        ours, theirs = (_shown(shardings.get(name)) for shardings in (wanted, saved))
        if ours != theirs:
            raise ValueError(f"{name} is {ours} in this model and {theirs} in {directory}: {remedy}")


def _shown(sharding: Sharding | None) -> str:
    if sharding is None:
        return "not there"
    how = "not divided" if sharding.dim is None else f"divided along dimension {sharding.dim} in {sharding.stride}"
    return f"of shape {list(sharding.unpadded)}, {how}"
