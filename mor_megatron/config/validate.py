"""How settings fit together: every cross-field check and every derived default, in one place.

`validate` is pure but for log messages; it returns the configuration that the rest of the program reads.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

from mor_megatron.config.deepspeed_settings import check_engine
from mor_megatron.config.layout import check_batch, check_layout, default_batch
from mor_megatron.config.schema import Config
from mor_megatron.recursion.plan import default_capacities, effective_depth

logger = logging.getLogger(__name__)

FLASH_LARGEST_HEAD = 256
"""Widest head that flash-attn computes."""


def validate(config: Config, world_size: int = 1) -> Config:
    """Check a configuration and fill in what follows from other fields. Validating twice changes nothing.

    Filled in: the effective `num_layers`, `kv_channels`, `capacity`, `router_func`, `router_alpha`,
    `global_batch_size`, `lr_decay_iters` and `lr_wsd_decay_iters`; `sequence_parallel` is off with one tensor-parallel
    rank. A setting that nothing will read is warned about.

    Args:
        config: as parsed.
        world_size: ranks of the run, >= 1.
    Raises:
        ValueError: settings contradict each other; the message names field, value and remedy.
    """
    _check_ranges(config)
    for step in (_model, _recursion, _data, _optimizer):
        config = step(config)
    config = _training(config, world_size)
    check_engine(config)
    _check_faults(config)
    _warn_of_ignored(config)
    return _without_effect_off(config)


_AT_LEAST_1 = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
    max_position_embeddings vocab_size make_vocab_size_divisible_by num_recursions seq_length lr_decay_iters
    micro_batch_size global_batch_size train_iters eval_interval save_interval keep_last keep_every log_interval
    tensor_model_parallel_size pipeline_model_parallel_size check_routing_consistency
    initial_loss_scale loss_scale_window min_loss_scale hysteresis exit_interval"""
_AT_LEAST_0 = """init_method_std capacity_warmup_iters router_aux_loss_coeff router_aux_lr_mult router_z_loss_coeff
    router_balance_coeff router_bias_update_rate router_balance_warmup_iters num_workers min_lr lr_warmup_iters
    lr_wsd_decay_iters weight_decay clip_grad seed eval_iters max_skipped_steps max_rollbacks"""
_ABOVE_0 = """norm_epsilon rotary_base router_alpha router_temperature lr adam_eps distributed_timeout_minutes
    peak_tflops exit_duration_in_mins"""
_BELOW_1 = "adam_beta1 adam_beta2 sgd_momentum"
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (_AT_LEAST_1, "1 or more", lambda value: value >= 1),
    (_AT_LEAST_0, "0 or more", lambda value: value >= 0),
    (_ABOVE_0, "a value above 0", lambda value: value > 0),
    (_BELOW_1, "a value from 0 to below 1", lambda value: 0 <= value < 1),
)


def _check_ranges(config: Config) -> None:
    values = {entry.name: getattr(part, entry.name) for part in _sections(config) for entry in fields(part)}
    for names, wanted, holds in _RANGES:
        for name in names.split():
            value = values[name]
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name.replace('_', '-')}={value} is out of range: use {wanted}")


def _model(config: Config) -> Config:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.group_query_attention:
        if groups is None:
            raise ValueError(
                "group-query-attention=True without num-query-groups: give --num-query-groups, "
                f"a divisor of num-attention-heads={heads}"
            )
        if heads % groups:
            raise ValueError(
                f"num-query-groups={groups} does not divide num-attention-heads={heads}: use {_divisors(heads)}"
            )
    if model.kv_channels is None:
        if model.hidden_size % heads:
            near = _nearest_multiples(model.hidden_size, heads)
            raise ValueError(
                f"hidden-size={model.hidden_size} is not a multiple of num-attention-heads={heads}: "
                f"use {near}, or give --kv-channels"
            )
        model = replace(model, kv_channels=model.hidden_size // heads)
    if model.kv_channels % 2:
        raise ValueError(
            f"kv-channels={model.kv_channels} is odd, and rotary embeddings turn pairs: "
            f"use {_nearest_multiples(model.kv_channels, 2)}"
        )
    if config.data.seq_length > model.max_position_embeddings:
        raise ValueError(
            f"seq-length={config.data.seq_length} exceeds max-position-embeddings={model.max_position_embeddings}: "
            "shorten the one or raise the other"
        )
    return replace(config, model=model)


def _recursion(config: Config) -> Config:
    recursion = config.recursion
    count, strategy = recursion.num_recursions, recursion.sharing_strategy
    if recursion.routing != "none":
        if count == 1:
            raise ValueError(
                f"routing={recursion.routing} needs num-recursions above 1: give --num-recursions 2 or more"
            )
        if strategy not in ("cycle", "middle_cycle"):
            raise ValueError(
                f"sharing-strategy={strategy} has no contiguous recursion to route to with routing="
                f"{recursion.routing}: use cycle or middle_cycle"
            )
    if recursion.kv_mode != "caching" and count == 1:
        raise ValueError(
            f"kv-mode={recursion.kv_mode} shares keys and values between recursions, and num-recursions=1 has one: "
            "use kv-mode=caching or --num-recursions 2 or more"
        )
    depth = effective_depth(config.model.num_layers, count, strategy, recursion.depth_rounding)
    if depth != config.model.num_layers:
        _say(
            f"num-layers={config.model.num_layers} becomes {depth} (depth-rounding={recursion.depth_rounding}, "
            f"num-recursions={count}, sharing-strategy={strategy})"
        )
    recursion = _routing_defaults(recursion)
    if recursion.routing == "expert_choice":
        _check_capacity(recursion.capacity, count)
    return replace(config, model=replace(config.model, num_layers=depth), recursion=recursion)


_ROUTER_FUNCS = {"expert_choice": ("sigmoid", "tanh", "none"), "token_choice": ("softmax", "sigmoid")}
_ALPHAS = {"sigmoid": 0.1, "tanh": 0.1, "softmax": 1.0, "none": 1.0}


def _routing_defaults(recursion):
    if recursion.routing == "none":
        return recursion
    allowed = _ROUTER_FUNCS[recursion.routing]
    func = recursion.router_func or allowed[0]
    if func not in allowed:
        raise ValueError(f"router-func={func} does not go with routing={recursion.routing}: use {' or '.join(allowed)}")
    if recursion.router_objective == "aux_router" and recursion.routing != "expert_choice":
        raise ValueError(
            f"router-objective=aux_router does not go with routing={recursion.routing}, which is causal already: "
            "use router-objective=aux_loss or routing=expert_choice"
        )
    capacity = recursion.capacity
    if recursion.routing == "expert_choice" and capacity is None:
        capacity = default_capacities(recursion.num_recursions)
    alpha = _ALPHAS[func] if recursion.router_alpha is None else recursion.router_alpha
    return replace(recursion, router_func=func, router_alpha=alpha, capacity=capacity)


def _check_capacity(capacity: tuple[float, ...], count: int) -> None:
    shown = f"capacity={' '.join(f'{value:g}' for value in capacity)}"
    usual = " ".join(f"{value:.3g}" for value in default_capacities(count))
    if len(capacity) != count:
        raise ValueError(
            f"{shown} has {len(capacity)} values for num-recursions={count}: give {count}, such as {usual}"
        )
    if not all(0 < value <= 1 for value in capacity):
        raise ValueError(f"{shown} leaves the range above 0 to 1: use fractions of the tokens, such as {usual}")
    if capacity[0] != 1:
        raise ValueError(f"{shown} does not start with 1, but the first recursion takes every token: use {usual}")
    if any(later > earlier for earlier, later in pairwise(capacity)):
        raise ValueError(f"{shown} increases, but a recursion selects among the tokens of the one before: use {usual}")


def _data(config: Config) -> Config:
    parts = config.data.split.split(",")
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or sum(shares) <= 0:
        raise ValueError(
            f"split={config.data.split!r} is not a division into training, validation and test: "
            "use up to three numbers of 0 or more, such as 969,30,1"
        )
    if config.data.tokenizer_model is not None and config.data.tokenizer_type is None:
        raise ValueError(
            f"tokenizer-model={config.data.tokenizer_model} without tokenizer-type: "
            "give --tokenizer-type, such as SentencePieceTokenizer or HuggingFaceTokenizer"
        )
    return config


def _optimizer(config: Config) -> Config:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"min-lr={optimizer.min_lr} exceeds lr={optimizer.lr}: lower min-lr or raise lr")
    decay_end = optimizer.lr_decay_iters or config.training.train_iters
    wsd = optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style == "WSD" and wsd is None:
        # A fifth, rounded: 1888 of the paper's 9438 iterations.
        wsd = min(round(decay_end / 5), max(decay_end - optimizer.lr_warmup_iters, 0))
    if optimizer.lr_warmup_iters > decay_end:
        raise ValueError(
            f"lr-warmup-iters={optimizer.lr_warmup_iters} exceeds lr-decay-iters={decay_end} "
            "(default train-iters): warm up for less, or decay later"
        )
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_warmup_iters + wsd > decay_end:
        raise ValueError(
            f"lr-wsd-decay-iters={wsd} after lr-warmup-iters={optimizer.lr_warmup_iters} does not fit "
            f"lr-decay-iters={decay_end} (default train-iters): use at most {decay_end - optimizer.lr_warmup_iters}"
        )
    return replace(config, optimizer=replace(optimizer, lr_decay_iters=decay_end, lr_wsd_decay_iters=wsd))


def _training(config: Config, world_size: int) -> Config:
    assert world_size >= 1
    training = config.training
    if training.bf16 and training.fp16:
        raise ValueError("bf16=True and fp16=True exclude each other: use --bf16, or --fp16 alone")
    _check_kernels(config)
    check_layout(config, world_size)
    check_batch(config, world_size)
    return replace(config, training=replace(training, global_batch_size=default_batch(config, world_size)))


def _check_kernels(config: Config) -> None:
    """Refuse kernels that are asked for and cannot compute this run on any machine."""
    training = config.training
    if training.bf16 or training.fp16:
        if training.attention_backend == "flash" and config.model.kv_channels > FLASH_LARGEST_HEAD:
            raise ValueError(
                f"attention-backend=flash has heads of up to {FLASH_LARGEST_HEAD}, and kv-channels="
                f"{config.model.kv_channels}: use auto or sdpa, or more attention heads"
            )
        return
    if training.attention_backend == "flash":
        raise ValueError("attention-backend=flash computes in 16 bits, and this run in fp32: add --bf16, or use auto")
    if training.transformer_impl == "transformer_engine":
        raise ValueError(
            "transformer-impl=transformer_engine multiplies fp32 as TF32, which keeps 10 bits: add --bf16, or use auto"
        )


def _check_faults(config: Config) -> None:
    factor, rollbacks = config.faults.loss_spike_factor, config.faults.max_rollbacks
    if factor is not None and not 1 < factor < math.inf:
        raise ValueError(f"loss-spike-factor={factor:g} is out of range: use a value above 1, such as 2")
    if rollbacks and (config.checkpoint.save is None or config.checkpoint.save_interval is None):
        raise ValueError(f"max-rollbacks={rollbacks} needs checkpoints to go back to: give --save and --save-interval")


def _without_effect_off(config: Config) -> Config:
    """Megatron-core refuses sequence parallelism of one rank, which is merely ignored here."""
    parallel = config.parallel
    cuts = parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
    return replace(config, parallel=replace(parallel, sequence_parallel=cuts))


# Who reads a setting: its names, the condition, and the condition in words.
_READERS: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("num_query_groups", lambda c: c.model.group_query_attention, "--group-query-attention"),
    ("depth_rounding sharing_strategy", lambda c: c.recursion.num_recursions > 1, "--num-recursions above 1"),
    (
        "router_type router_func router_alpha router_temperature router_gating router_objective router_z_loss_coeff",
        lambda c: c.recursion.routing != "none",
        "--routing expert_choice or token_choice",
    ),
    (
        "capacity capacity_warmup_iters router_aux_loss_coeff router_aux_loss_per_microbatch",
        lambda c: c.recursion.routing == "expert_choice",
        "--routing expert_choice",
    ),
    ("router_aux_lr_mult", lambda c: c.recursion.router_objective == "aux_router", "--router-objective aux_router"),
    ("router_alpha", lambda c: c.recursion.router_func != "none", "a --router-func other than none"),
    (
        "router_balance router_balance_warmup_iters",
        lambda c: c.recursion.routing == "token_choice",
        "--routing token_choice",
    ),
    (
        "router_balance_coeff router_balance_scope",
        lambda c: c.recursion.routing == "token_choice" and c.recursion.router_balance == "loss",
        "--routing token_choice --router-balance loss",
    ),
    (
        "router_bias_update_rate",
        lambda c: c.recursion.routing == "token_choice" and c.recursion.router_balance == "loss_free",
        "--routing token_choice --router-balance loss_free",
    ),
    ("sequence_parallel", lambda c: c.parallel.tensor_model_parallel_size > 1, "--tensor-model-parallel-size above 1"),
    (
        "pipeline_layers overlap_p2p_comm",
        lambda c: c.parallel.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size above 1",
    ),
    (
        "check_routing_consistency",
        lambda c: c.recursion.routing != "none" and c.parallel.tensor_model_parallel_size > 1,
        "--routing expert_choice or token_choice and --tensor-model-parallel-size above 1",
    ),
    ("min_lr", lambda c: c.optimizer.lr_decay_style != "constant", "a --lr-decay-style other than constant"),
    ("lr_wsd_decay_iters lr_wsd_decay_style", lambda c: c.optimizer.lr_decay_style == "WSD", "--lr-decay-style WSD"),
    ("adam_beta1 adam_beta2 adam_eps", lambda c: c.optimizer.optimizer == "adam", "--optimizer adam"),
    ("sgd_momentum", lambda c: c.optimizer.optimizer == "sgd", "--optimizer sgd"),
    ("fused_optimizer", lambda c: c.optimizer.optimizer == "adam", "--optimizer adam"),
    ("initial_loss_scale loss_scale_window min_loss_scale hysteresis", lambda c: c.training.fp16, "--fp16"),
    ("recompute_unit", lambda c: c.training.recompute_granularity == "full", "--recompute-granularity full"),
    ("eval_fixed_depths", lambda c: c.training.eval_iters > 0, "--eval-iters above 0"),
    ("save_interval async_save on_save_failure keep_last", lambda c: c.checkpoint.save is not None, "--save"),
    ("keep_every", lambda c: c.checkpoint.keep_last is not None, "--keep-last"),
    ("load_strict finetune", lambda c: c.checkpoint.load is not None, "--load"),
    ("max_rollbacks", lambda c: c.faults.loss_spike_factor is not None, "--loss-spike-factor"),
    ("wandb_exp_name", lambda c: c.logging.wandb_project is not None, "--wandb-project"),
)


def _warn_of_ignored(config: Config) -> None:
    changed = {
        entry.name: getattr(part, entry.name)
        for part in _sections(config)
        for entry in fields(part)
        if getattr(part, entry.name) != entry.default
    }
    if config.recursion.router_func == "none" and config.recursion.router_alpha == _ALPHAS["none"]:
        changed.pop("router_alpha", None)
    for names, is_read, condition in _READERS:
        for name in names.split():
            if name in changed and not is_read(config):
                shown = f"{name.replace('_', '-')}={changed[name]}"
                _say(f"{shown} is ignored: it is read only with {condition}")
    recursion = config.recursion
    if recursion.routing == "expert_choice" and recursion.router_aux_loss_coeff == 0:
        _say(
            "router-aux-loss-coeff=0 leaves the causal threshold untrained, so that threshold evaluation and "
            "generation select at random: use a value above 0"
        )
    balanced = recursion.router_balance == "loss" and recursion.router_balance_coeff > 0
    if recursion.routing == "token_choice" and recursion.router_gating == "additive" and not balanced:
        _say(
            "router-gating=additive without a balancing loss leaves the depth router without a gradient: use "
            "--router-gating weighted or --router-balance loss"
        )


def _say(message: str) -> None:
    # Every rank validates the same settings; one voice is enough.
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(message)


def _sections(config: Config) -> tuple[Any, ...]:
    return tuple(getattr(config, section.name) for section in fields(config))


def _divisors(number: int) -> str:
    return _either([d for d in range(1, number + 1) if number % d == 0])


def _nearest_multiples(number: int, unit: int) -> str:
    below = number - number % unit
    return _either([multiple for multiple in (below, below + unit) if multiple > 0])


def _either(numbers: list[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if len(numbers) > 1 else map(str, numbers))
