"""DeepSpeed's configuration: what follows from our flags, and a user's own file on top of it.

A setting that a flag decides may stand in the file only with the flag's value; one that training relies on, only with
the value it relies on; whatever else DeepSpeed knows passes through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_megatron.config.schema import Config

GRADIENT_BUCKET = 50_000_000
"""Gradients that are reduced together, in elements. DeepSpeed copies them into buffers of this size, fp32: one under
ZeRO 2 and 3, two if reduction overlaps. Its own 500 million would be 4 GB however small the model."""


@dataclass(frozen=True)
class _Decided:
    """A DeepSpeed setting that is not the file's to choose."""

    by: str
    """The flag and its value, or the reason."""
    allowed: Any
    """What the file may say."""


def deepspeed_settings(config: Config, cuda: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, nested as DeepSpeed takes it.

    Its batch sizes only satisfy DeepSpeed: accumulation is ours, and so are norm and clipping.

    Args:
        config: validated.
        cuda: whether the process has a CUDA device; decides what is `auto`.
    Raises:
        ValueError: the file of `--deepspeed-config` cannot be read, is no JSON object, or contradicts a flag.
    """
    training = config.training
    settings = _own_settings(config, cuda)
    if training.deepspeed_config is None:
        return settings
    decided = _decided(config, cuda)
    for key, value in _leaves(_read(training.deepspeed_config)):
        if value == "auto":  # Hugging Face's word for what the caller decides
            continue
        section = key.split(".")[0]
        known = decided.get(key) or decided.get(section)
        if known is None:
            _put(settings, key, value)
        elif value != known.allowed:
            raise ValueError(
                f"{known.by} contradicts {key}={json.dumps(value)} ({training.deepspeed_config}): "
                f"{'remove it there' if known.allowed is None else 'change one of them'}"
            )
    return settings


def overlaps_reduction(config: Config, cuda: bool) -> bool:
    """Whether gradients are reduced while the backward pass goes on."""
    training = config.training
    if training.overlap_grad_reduce == "auto":
        return cuda and training.zero_stage >= 2
    return training.overlap_grad_reduce == "on"


def check_engine(config: Config) -> None:
    """Refuse what DeepSpeed's engine cannot do for us.

    Raises:
        ValueError: in one line, with the remedy.
    """
    training, stages = config.training, config.parallel.pipeline_model_parallel_size
    if training.optimizer_cpu_offload and training.zero_stage == 0:
        raise ValueError(
            "optimizer-cpu-offload needs a sharded optimizer, and zero-stage=0: use --zero-stage 1, 2 or 3"
        )
    if training.optimizer_cpu_offload and stages > 1:
        raise ValueError(
            f"optimizer-cpu-offload needs DeepSpeed's own backward pass, which pipeline-model-parallel-size={stages} "
            "leaves to the schedule: use 1, or leave the optimizer on the device"
        )
    if training.fp16 and training.zero_stage == 0:
        raise ValueError("fp16 with zero-stage=0 would sum gradients in fp16: use --zero-stage 1, 2 or 3, or --bf16")
    if training.fp16 and not (math.log2(training.initial_loss_scale).is_integer() and training.initial_loss_scale >= 1):
        raise ValueError(
            f"initial-loss-scale={training.initial_loss_scale:g} is not a power of two of 1 or more, so that scaling "
            "would round: use one such as 65536"
        )
    if training.fp16 and training.initial_loss_scale < training.min_loss_scale:
        raise ValueError(
            f"initial-loss-scale={training.initial_loss_scale:g} is below min-loss-scale={training.min_loss_scale}: "
            "raise the one or lower the other"
        )
    if training.overlap_grad_reduce == "on" and training.zero_stage < 2:
        raise ValueError(
            f"overlap-grad-reduce=on does not go with zero-stage={training.zero_stage}, which reduces once, after the "
            "last backward pass: use --zero-stage 2 or 3, or auto"
        )
    if training.deepspeed_config is not None:
        deepspeed_settings(config)


_FREE = (
    "steps_per_print",
    "timers.throughput.enabled",
    "zero_optimization.overlap_comm",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.reduce_bucket_size",
)
"""Keys that we set and a file may change; `overlap_comm` only while its flag says auto."""


def _own_settings(config: Config, cuda: bool) -> dict[str, Any]:
    training = config.training
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "overlap_comm": overlaps_reduction(config, cuda),
        "reduce_bucket_size": GRADIENT_BUCKET,
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed would send the fp32 sums of a bf16 run as bf16.
        "communication_data_type": "fp32",
        "steps_per_print": None,
        # It waits for the device at the beginning and at the end of every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if training.optimizer_cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        settings["zero_force_ds_cpu_optimizer"] = False  # PyTorch's fused AdamW is vectorised on CPUs as well
    if training.bf16:
        settings["bf16"] = {"enabled": True, "immediate_grad_update": training.zero_stage == 1}
    if training.fp16:
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": round(math.log2(training.initial_loss_scale)),
            "loss_scale_window": training.loss_scale_window,
            "min_loss_scale": training.min_loss_scale,
            "hysteresis": training.hysteresis,
        }
    if training.precision != "fp32" and training.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _decided(config: Config, cuda: bool) -> dict[str, _Decided]:
    """Dotted key, or a whole section, -> who decides it."""
    training, optimizer = config.training, config.optimizer
    flags = {
        "train_batch_size": ("global-batch-size", training.global_batch_size),
        "train_micro_batch_size_per_gpu": ("micro-batch-size", training.micro_batch_size),
        "gradient_clipping": ("clip-grad", optimizer.clip_grad),
        "zero_optimization.stage": ("zero-stage", training.zero_stage),
        "bf16.enabled": ("bf16", training.bf16),
        "fp16.enabled": ("fp16", training.fp16),
        "fp16.initial_scale_power": ("initial-loss-scale", round(math.log2(training.initial_loss_scale))),
        "fp16.loss_scale_window": ("loss-scale-window", training.loss_scale_window),
        "fp16.min_loss_scale": ("min-loss-scale", training.min_loss_scale),
        "fp16.hysteresis": ("hysteresis", training.hysteresis),
        "pipeline.stages": ("pipeline-model-parallel-size", config.parallel.pipeline_model_parallel_size),
        "tensor_parallel.autotp_size": ("tensor-model-parallel-size", config.parallel.tensor_model_parallel_size),
    }
    shown = {**vars(training), **vars(optimizer), **vars(config.parallel)}
    decided = {
        key: _Decided(f"{flag}={_show(shown[flag.replace('-', '_')])}", allowed)
        for key, (flag, allowed) in flags.items()
    }
    offload = "cpu" if training.optimizer_cpu_offload else "none"
    decided["zero_optimization.offload_optimizer.device"] = _Decided(
        f"optimizer-cpu-offload={_show(training.optimizer_cpu_offload)}", offload
    )
    if training.overlap_grad_reduce != "auto" or training.zero_stage < 2:
        decided["zero_optimization.overlap_comm"] = _Decided(
            f"overlap-grad-reduce={training.overlap_grad_reduce} (zero-stage={training.zero_stage})",
            overlaps_reduction(config, cuda),
        )
    decided["optimizer"] = _Decided(f"optimizer={optimizer.optimizer} (and its flags)", None)
    decided["scheduler"] = _Decided(f"lr-decay-style={optimizer.lr_decay_style}", None)
    decided["gradient_accumulation_steps"] = _Decided("accumulation over global-batch-size", None)
    for key, value in _leaves(_own_settings(config, cuda)):
        if key not in _FREE:
            decided.setdefault(key, _Decided(f"training, which needs {key}={json.dumps(value)},", value))
    return decided


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(path: str) -> dict[str, Any]:
    try:
        parsed = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"deepspeed-config={path} cannot be read ({error.strerror}): give the path of a JSON file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"deepspeed-config={path} is not UTF-8 text: give the path of a JSON file") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"deepspeed-config={path}:{error.lineno}:{error.colno} is not valid JSON ({error.msg}): mend it there"
        ) from error
    if not isinstance(parsed, dict):
        raise ValueError(f'deepspeed-config={path} is not a JSON object: write {{ "setting": value, ... }}')
    return parsed


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[name] = value
