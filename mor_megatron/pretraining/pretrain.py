"""A whole pretraining run: everything is built, a checkpoint loaded, and the loop run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mor_megatron.checkpointing.kept_tokenizer import KeptTokenizer
from mor_megatron.checkpointing.load import load_checkpoint
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.tokenizers import configured_tokenizer, resolve_vocabulary
from mor_megatron.distributed.initialize import initialize_distributed, print_rank_0
from mor_megatron.distributed.launch import launched_world_size
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.planning.accounting import count_parameters, executed_flops_per_token
from mor_megatron.planning.report import describe_layout
from mor_megatron.pretraining.batches import Batches, build_data
from mor_megatron.pretraining.capabilities import capability_line
from mor_megatron.pretraining.loop import train
from mor_megatron.pretraining.outputs import claim_outputs
from mor_megatron.pretraining.stopping import Stopper
from mor_megatron.pretraining.writers import Writer
from mor_megatron.training.engine import build_engine
from mor_megatron.training.evaluate import evaluate
from mor_megatron.training.metrics import validation_line


def pretrain(config: Config) -> bool:
    """Train to the last iteration: resume, iterate, evaluate, save, report. Every rank calls it, in its main thread.

    With `skip_train`, a checkpoint is evaluated, and that is all.

    Returns:
        Whether it got there; False: it was told to stop, and saved if `save` is set.
    Raises:
        ValueError: the settings, data or checkpoint do not fit; the message names field, value and remedy.
        NonFiniteError: more than `max_skipped_steps` steps in a row were not finite.
        SaveError: the last checkpoint, or with `on_save_failure` stop any, could not be written.
    """
    config = validate(config, dist.get_world_size() if dist.is_initialized() else launched_world_size() or 1)
    with Stopper(config.faults) as stopper:
        initialize_distributed(config)
        with claim_outputs(config) as writers:
            return _pretrain(config, stopper, writers)


def _pretrain(config: Config, stopper: Stopper, writers: list[Writer]) -> bool:
    tokenizer = configured_tokenizer(config.data)
    config = resolve_vocabulary(config, tokenizer)
    kept = None if tokenizer is None else KeptTokenizer.of(config.data.tokenizer_type, tokenizer)
    batches = build_data(config, tokenizer)
    model, teacher = build_model(config), None
    if config.distillation.distill_from is not None and not config.training.skip_train:
        from mor_megatron.huggingface.teacher import load_teacher  # imports transformers, which other runs do without

        model.distillation = load_teacher(model, config, tokenizer)
        teacher = teacher_settings(config)
    engine = build_engine(model, config)
    print_rank_0(capability_line(config))
    progress = load_checkpoint(engine, config, kept)
    print_rank_0(_description(config))
    print_rank_0(describe_layout(config, dist.get_world_size(), torch.cuda.is_available(), teacher))
    if config.training.skip_train:
        _evaluate_splits(engine.module, config, progress.iteration, batches)
        return True
    return train(engine, config, progress, batches, stopper, kept, writers, teacher)


def _evaluate_splits(model: MoRModel, config: Config, iteration: int, batches: Batches) -> None:
    """Evaluate validation and test, those that there are, and print their losses; collective over all ranks."""
    for name, split in (("validation", batches.validation), ("test", batches.test)):
        if split is not None:
            losses = evaluate(model, split.batches(), config, iteration, split.corpora)
            print_rank_0(validation_line({"iteration": iteration} | losses, name))


def _description(config: Config) -> str:
    parameters = count_parameters(config)
    return (
        f"{config.model.num_layers} layers unrolled, routing {config.recursion.routing}, "
        f"{config.recursion.num_recursions} recursions, vocabulary {config.model.vocab_size}: "
        f"{parameters.unique:,} parameters ({parameters.non_embedding:,} without embedding), "
        f"{executed_flops_per_token(config) / 1e6:.1f} MFLOP a token forward"
    )
