"""Settings that nothing will read, and settings that leave something untrained: what the user is warned about."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from typing import Any

from mor_megatron.config.schema import Config
from mor_megatron.data.corpora import is_cut
from mor_megatron.recursion.methods import METHODS, method_of
from mor_megatron.recursion.setting import rule_of

logger = logging.getLogger(__name__)

# Who reads a setting: its names, the condition, and the condition in words.
_READERS: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("split", lambda c: is_cut(c.data), "--data-path"),
    ("num_query_groups", lambda c: c.model.group_query_attention, "--group-query-attention"),
    ("rope_scaling_factor", lambda c: c.model.use_rope_scaling, "--use-rope-scaling"),
    ("sequence_parallel", lambda c: c.parallel.tensor_model_parallel_size > 1, "--tensor-model-parallel-size above 1"),
    (
        "pipeline_layers overlap_p2p_comm",
        lambda c: c.parallel.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size above 1",
    ),
    (
        "check_routing_consistency",
        lambda c: method_of(c.recursion.routing).routes and c.parallel.tensor_model_parallel_size > 1,
        "a --routing other than none and --tensor-model-parallel-size above 1",
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
    return not list(_unread_because(config, name))


def warn_of_unread(config: Config) -> None:
    """Warn about every setting that was changed and that this configuration does not read."""
    for part in sections(config):
        for entry in fields(part):
            value = getattr(part, entry.name)
            if value != entry.default:
                for condition in _unread_because(config, entry.name):
                    say(f"{entry.name.replace('_', '-')}={value} is ignored: it is read only with {condition}")
    for warning in method_of(config.recursion.routing).warnings(config.recursion):
        say(warning)


def _unread_because(config: Config, name: str) -> Iterator[str]:
    """The conditions, in words, under which a field is read and which do not hold."""
    for names, holds, condition in _READERS:
        if name in names.split() and not holds(config):
            yield condition
    for entry in fields(config.recursion):
        if entry.name == name:
            yield from _unread_of_recursion(config, entry)


def _unread_of_recursion(config: Config, entry: Field) -> Iterator[str]:
    """A setting of routing methods is read by those that declare it; what its rule says comes on top."""
    recursion, rule = config.recursion, rule_of(entry)
    readers = [method for method in METHODS.values() if entry.name in {own.name for own in fields(method.Settings)}]
    if readers and method_of(recursion.routing) not in readers:
        yield f"--routing {' or '.join(method.name for method in readers)}"
    elif rule.read_with is not None and not rule.read_with[1](recursion):
        yield rule.read_with[0]


def say(message: str) -> None:
    """Warn once: every rank validates the same settings, and one voice is enough."""
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(message)


def sections(config: Config) -> tuple[Any, ...]:
    """The parts of a configuration, in order."""
    return tuple(getattr(config, section.name) for section in fields(config))
