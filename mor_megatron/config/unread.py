"""Settings that nothing will read, and settings that leave something untrained: what the user is warned about."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from mor_megatron.config.schema import Config
from mor_megatron.data.corpora import is_cut

logger = logging.getLogger(__name__)

ALPHAS = {"sigmoid": 0.1, "tanh": 0.1, "softmax": 1.0, "none": 1.0}
"""Router function -> its default `router_alpha`."""

# Who reads a setting: its names, the condition, and the condition in words.
_READERS: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("split", lambda c: is_cut(c.data), "--data-path"),
    ("num_query_groups", lambda c: c.model.group_query_attention, "--group-query-attention"),
    ("rope_scaling_factor", lambda c: c.model.use_rope_scaling, "--use-rope-scaling"),
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
    ("test_data_path", lambda c: c.training.skip_train, "--skip-train"),
    (
        "save tensorboard_dir wandb_project log_params_norm log_timers profile",
        lambda c: not c.training.skip_train,
        "--skip-train false",
    ),
    ("profile_step_start profile_step_end profile_ranks", lambda c: c.logging.profile, "--profile"),
    ("save_interval async_save on_save_failure keep_last", lambda c: c.checkpoint.save is not None, "--save"),
    ("keep_every", lambda c: c.checkpoint.keep_last is not None, "--keep-last"),
    (
        "load_strict finetune no_load_optim no_load_rng",
        lambda c: c.checkpoint.load is not None or c.checkpoint.branch_from is not None,
        "--load or --branch-from",
    ),
    ("ckpt_step exit_on_missing_checkpoint", lambda c: c.checkpoint.load is not None, "--load"),
    ("no_load_optim no_load_rng", lambda c: not c.checkpoint.finetune, "--finetune false, which loads weights only"),
    ("max_rollbacks", lambda c: c.faults.loss_spike_factor is not None, "--loss-spike-factor"),
    ("wandb_exp_name", lambda c: c.logging.wandb_project is not None, "--wandb-project"),
)


def is_read(config: Config, name: str) -> bool:
    """Whether this configuration reads a field."""
    return all(holds(config) for names, holds, _ in _READERS if name in names.split())


def warn_of_unread(config: Config) -> None:
    """Warn about every setting that was changed and that this configuration does not read."""
    changed = {
        entry.name: getattr(part, entry.name)
        for part in sections(config)
        for entry in fields(part)
        if getattr(part, entry.name) != entry.default
    }
    if config.recursion.router_func == "none" and config.recursion.router_alpha == ALPHAS["none"]:
        changed.pop("router_alpha", None)
    for names, holds, condition in _READERS:
        for name in names.split():
            if name in changed and not holds(config):
                shown = f"{name.replace('_', '-')}={changed[name]}"
                say(f"{shown} is ignored: it is read only with {condition}")
    recursion = config.recursion
    if recursion.routing == "expert_choice" and recursion.router_aux_loss_coeff == 0:
        say(
            "router-aux-loss-coeff=0 leaves the causal threshold untrained, so that threshold evaluation and "
            "generation select at random: use a value above 0"
        )
    balanced = recursion.router_balance == "loss" and recursion.router_balance_coeff > 0
    if recursion.routing == "token_choice" and recursion.router_gating == "additive" and not balanced:
        say(
            "router-gating=additive without a balancing loss leaves the depth router without a gradient: use "
            "--router-gating weighted or --router-balance loss"
        )


def say(message: str) -> None:
    """Warn once: every rank validates the same settings, and one voice is enough."""
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(message)


def sections(config: Config) -> tuple[Any, ...]:
    """The parts of a configuration, in order."""
    return tuple(getattr(config, section.name) for section in fields(config))
