"""How settings fit together: every cross-field check and every derived default, in one place.

`validate` is pure but for log messages; it returns the configuration that the rest of the program reads.
"""

from __future__ import annotations

from dataclasses import fields, replace

from mor_megatron.config.cuda_graph import check_cuda_graph
from mor_megatron.config.deepspeed_settings import check_engine
from mor_megatron.config.layout import check_batch, check_layout, default_batch
from mor_megatron.config.run_length import global_batch_size, resolve_length
from mor_megatron.config.run_schema import PATHS_PER_SPLIT
from mor_megatron.config.schema import Config
from mor_megatron.config.unread import say, warn_of_unread
from mor_megatron.recursion.methods import method_of
from mor_megatron.recursion.plan import effective_depth
from mor_megatron.recursion.relaxation import resolve_relaxation
from mor_megatron.recursion.setting import check

FUSED_ATTENTION = ("cudnn", "flash")
FUSED_LARGEST_HEAD = 256
"""Width of the widest head that either computes."""


def validate(config: Config, world_size: int = 1) -> Config:
    """Check a configuration and fill in what follows from other fields. Validating twice changes nothing.

    Filled in: the effective `num_layers`, `kv_channels`, `capacity`, `router_func`, `router_alpha`, `lora_alpha`,
    `global_batch_size`, `train_iters` unless `train_samples` is given, and the ends of the learning rate's decay in the
    same unit; `sequence_parallel` is off with one tensor-parallel rank. A setting that nothing will read is warned
    about.

    Args:
        config: as parsed.
        world_size: ranks of the run, >= 1.
    Raises:
        ValueError: settings contradict each other; the message names field, value and remedy.
    """
    return validate_run(validate_model(config), world_size)


def validate_model(config: Config) -> Config:
    """Check what the model is, and fill in its part: what a checkpoint or an export of it needs, on any machine.

    Raises:
        ValueError: as `validate`.
    """
    check(config.model)
    check(config.recursion)
    return _recursion(_model(config))


def validate_run(config: Config, world_size: int) -> Config:
    """Check how a model is trained on `world_size` ranks, and fill in the rest.

    Args:
        config: from `validate_model`.
    Raises:
        ValueError: as `validate`.
    """
    for section in fields(config):
        check(getattr(config, section.name))
    config = _training(resolve_length(_data(config)), world_size)
    check_engine(config)
    check_cuda_graph(config)
    _check_freeze(config)
    _check_faults(config)
    _check_evaluation_alone(config)
    _check_profile(config, world_size)
    warn_of_unread(config)
    return _without_effect_off(config)


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
            near = _nearest_multiples(model.hidden_size, 2 * heads)  # of even width
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
    return replace(config, model=model)


def _recursion(config: Config) -> Config:
    recursion = config.recursion
    count, strategy = recursion.num_recursions, recursion.sharing_strategy
    method = method_of(recursion.routing)
    if method.routes and count == 1:
        raise ValueError(f"routing={recursion.routing} needs num-recursions above 1: give --num-recursions 2 or more")
    if recursion.kv_mode != "caching" and count == 1:
        raise ValueError(
            f"kv-mode={recursion.kv_mode} shares keys and values between recursions, and num-recursions=1 has one: "
            "use kv-mode=caching or --num-recursions 2 or more"
        )
    depth = effective_depth(config.model.num_layers, count, strategy, recursion.depth_rounding)
    if depth != config.model.num_layers:
        say(
            f"num-layers={config.model.num_layers} becomes {depth} (depth-rounding={recursion.depth_rounding}, "
            f"num-recursions={count}, sharing-strategy={strategy})"
        )
    recursion = method.resolve(recursion, count)
    config = replace(config, model=replace(config.model, num_layers=depth), recursion=recursion)
    if method.routes and not config.plan.is_cyclic:
        raise ValueError(
            f"sharing-strategy={strategy} has no contiguous recursion to route to with routing="
            f"{recursion.routing}: use cycle or middle_cycle"
        )
    return replace(config, recursion=resolve_relaxation(recursion, config.plan))


def _data(config: Config) -> Config:
    length, longest = config.data.seq_length, config.model.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"seq-length={length} exceeds max-position-embeddings={longest}: shorten the one or raise the other"
        )
    config.data.proportions()
    named = [name for name in ("data_path", "data_args_path", "per_split_data_args_path") if getattr(config.data, name)]
    named += [name for name in PATHS_PER_SPLIT if getattr(config.data, name)][:1]
    if len(named) > 1:
        first, second = (name.replace("_", "-") for name in named[:2])
        undo = " (--data-path without a value undoes a preset's)" if first == "data-path" else ""
        raise ValueError(
            f"{first} and {second} both say where the data is: use --data-path with --split, or --train-data-path, "
            f"--valid-data-path and --test-data-path, or a file of either{undo}"
        )
    if config.data.tokenizer_model is not None and config.data.tokenizer_type is None:
        raise ValueError(
            f"tokenizer-model={config.data.tokenizer_model} without tokenizer-type: "
            "give --tokenizer-type, such as SentencePieceTokenizer or HuggingFaceTokenizer"
        )
    return config


def _training(config: Config, world_size: int) -> Config:
    assert world_size >= 1
    training = config.training
    if training.bf16 and training.fp16:
        raise ValueError("bf16=True and fp16=True exclude each other: use --bf16, or --fp16 alone")
    _check_kernels(config)
    check_layout(config, world_size)
    check_batch(config, world_size)
    training = replace(training, global_batch_size=default_batch(config, world_size))
    first = global_batch_size(training, 0)
    if training.train_samples is not None and training.train_samples < first:
        raise ValueError(
            f"train-samples={training.train_samples} is less than the first global batch, {first} sequences: give "
            f"--train-samples {first} or more, or a smaller batch"
        )
    return replace(config, training=training)


def _check_kernels(config: Config) -> None:
    """Refuse kernels that are asked for and cannot compute this run on any machine."""
    training, backend = config.training, config.training.attention_backend
    if training.precision != "fp32":
        if backend in FUSED_ATTENTION and config.model.kv_channels > FUSED_LARGEST_HEAD:
            raise ValueError(
                f"attention-backend={backend} has heads of up to {FUSED_LARGEST_HEAD}, and kv-channels="
                f"{config.model.kv_channels}: use auto or sdpa, or more attention heads"
            )
        return
    if backend in FUSED_ATTENTION:
        raise ValueError(
            f"attention-backend={backend} computes in 16 bits, and this run in fp32: add --bf16, or use auto"
        )
    if training.transformer_impl == "transformer_engine":
        raise ValueError(
            "transformer-impl=transformer_engine multiplies fp32 as TF32, which keeps 10 bits: add --bf16, or use auto"
        )


def _check_freeze(config: Config) -> None:
    freeze, routing = config.optimizer.freeze, config.recursion.routing
    method = method_of(routing)
    if freeze == "all-but-routers" and not method.routes:
        raise ValueError(f"freeze={freeze} trains routers, and routing={routing} has none: use --freeze none")
    untrained = method.untrained(config.recursion)
    if freeze == "all-but-routers" and untrained is not None:
        raise ValueError(f"freeze={freeze} leaves nothing that learns, as {untrained}")
    if freeze == "base" and not config.recursion.is_relaxed:
        raise ValueError(
            f"freeze={freeze} trains what tells recursions apart, and nothing does here: use --freeze none, or "
            "give --relaxation lora"
        )


def _check_faults(config: Config) -> None:
    rollbacks = config.faults.max_rollbacks
    if rollbacks and (config.checkpoint.save is None or config.checkpoint.save_interval is None):
        raise ValueError(f"max-rollbacks={rollbacks} needs checkpoints to go back to: give --save and --save-interval")


def _check_evaluation_alone(config: Config) -> None:
    if not config.training.skip_train:
        return
    if config.checkpoint.load is None and config.checkpoint.branch_from is None:
        raise ValueError("skip-train=True evaluates a checkpoint: give --load")
    if config.training.eval_iters == 0:
        raise ValueError("skip-train=True with eval-iters=0 would do nothing: give --eval-iters")


def _check_profile(config: Config, world_size: int) -> None:
    logging = config.logging
    if not logging.profile:
        return
    if logging.profile_step_end <= logging.profile_step_start:
        raise ValueError(
            f"profile-step-end={logging.profile_step_end} is not after profile-step-start="
            f"{logging.profile_step_start}: raise the one or lower the other"
        )
    iterations = config.training.train_iters
    if iterations is not None and logging.profile_step_start >= iterations:
        raise ValueError(
            f"profile-step-start={logging.profile_step_start} is not before the end of the run, train-iters="
            f"{iterations}: give a smaller --profile-step-start"
        )
    if logging.tensorboard_dir is None and config.checkpoint.save is None:
        raise ValueError("profile=True has no place for its trace: give --tensorboard-dir or --save")
    if not all(0 <= rank < world_size for rank in logging.profile_ranks):
        shown = " ".join(map(str, logging.profile_ranks))
        raise ValueError(f"profile-ranks={shown} is out of range: use ranks from 0 to {world_size - 1}")


def _without_effect_off(config: Config) -> Config:
    """Switch off what would be done, or refused, although it is ignored.

    Megatron-core refuses sequence parallelism of one rank. An evaluation alone keeps no record, and a signal ends it.
    """
    parallel = config.parallel
    cuts = parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
    config = replace(config, parallel=replace(parallel, sequence_parallel=cuts))
    if not config.training.skip_train:
        return config
    return replace(
        config,
        checkpoint=replace(config.checkpoint, save=None),
        faults=replace(config.faults, exit_signal_handler=False),
        logging=replace(config.logging, tensorboard_dir=None, wandb_project=None, profile=False),
    )


def _divisors(number: int) -> str:
    return _either([d for d in range(1, number + 1) if number % d == 0])


def _nearest_multiples(number: int, unit: int) -> str:
    below = number - number % unit
    return _either([multiple for multiple in (below, below + unit) if multiple > 0])


def _either(numbers: list[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if len(numbers) > 1 else map(str, numbers))
