"""Cross-field checks: what is refused and with which remedy, what is filled in, what is warned about."""

from __future__ import annotations

import logging
import re

import pytest

from mor_megatron.config.cli import read_config, to_yaml
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate, validate_model, validate_run

EXPERT = "--num-layers 8 --num-recursions 3 --routing expert_choice"
RAMP = "--train-samples 99 --global-batch-size 32 --micro-batch-size 4 --rampup-batch-size"
TOKEN = "--num-layers 8 --num-recursions 3 --routing token_choice"


def run(flags: str, world_size: int = 1) -> Config:
    return validate(read_config(flags.split()), world_size)


# flags -> what the message must contain: the field with its value, then the remedy.
REFUSED = {
    "frozen without relaxation": (
        "--num-recursions 2 --num-layers 6 --freeze base",
        "freeze=base",
        "--relaxation lora",
    ),
    "frozen without routers": ("--freeze all-but-routers", "freeze=all-but-routers .*routing=none", "--freeze none"),
    "frozen with routers that learn nothing": (
        f"{EXPERT} --freeze all-but-routers --router-gating additive --router-aux-loss-coeff 0",
        "freeze=all-but-routers .*router-gating=additive",
        "--router-gating weighted, or --router-aux-loss-coeff above 0",
    ),
    "frozen with a depth router that learns nothing": (
        f"{TOKEN} --freeze all-but-routers --router-gating additive --router-balance loss_free",
        "freeze=all-but-routers .*router-gating=additive",
        "--router-gating weighted or --router-balance loss",
    ),
    "zero layers": ("--num-layers 0", "num-layers=0", "use 1 or more"),
    "negative decay": ("--weight-decay -0.1", "weight-decay=-0.1", "use 0 or more"),
    "zero lr": ("--lr 0", "lr=0.0", "use a value above 0"),
    "lr not a number": ("--lr nan", "lr=nan", "use a value above 0"),
    "infinite lr": ("--lr inf", "lr=inf", "use a value above 0"),
    "beta": ("--adam-beta2 1", "adam-beta2=1.0", "from 0 to below 1"),
    "zero save interval": ("--save x --save-interval 0", "save-interval=0", "use 1 or more"),
    "heads": (
        "--num-attention-heads 3",
        "hidden-size=256 .*num-attention-heads=3",
        "use 252 or 258, or .*--kv-channels",
    ),
    "odd head": ("--kv-channels 5", "kv-channels=5", "use 4 or 6"),
    "groups missing": ("--group-query-attention", "group-query-attention=True", "give --num-query-groups"),
    "groups": (
        "--group-query-attention --num-query-groups 3",
        "num-query-groups=3 .*num-attention-heads=4",
        "use 1, 2 or 4",
    ),
    "positions": ("--seq-length 4096", "seq-length=4096 .*max-position-embeddings=2048", "shorten .* or raise"),
    "depth": (
        "--num-layers 9 --num-recursions 3",
        "num-layers=9 .*num-recursions=3",
        "use 8 or 11, or --depth-rounding down or up",
    ),
    "too shallow": ("--num-layers 3 --num-recursions 3", "num-layers=3", "use at least 5"),
    "flash in fp32": ("--attention-backend flash", "attention-backend=flash computes in 16 bits", "add --bf16"),
    "cuDNN in fp32": ("--attention-backend cudnn", "attention-backend=cudnn computes in 16 bits", "add --bf16"),
    "flash with wide heads": (
        "--attention-backend flash --bf16 --kv-channels 512",
        "attention-backend=flash .*256, and kv-channels=512",
        "use auto or sdpa",
    ),
    "Transformer Engine in fp32": (
        "--transformer-impl transformer_engine",
        "transformer-impl=transformer_engine multiplies fp32 as TF32",
        "add --bf16, or use auto",
    ),
    "routing without recursion": (
        "--routing expert_choice",
        "routing=expert_choice .*num-recursions",
        "give --num-rec",
    ),
    "routing over sequence": (
        f"{EXPERT} --sharing-strategy middle_sequence",
        "sharing-strategy=middle_sequence",
        "use cycle or middle_cycle",
    ),
    "sharing without recursion": ("--kv-mode sharing", "kv-mode=sharing .*num-recursions=1", "use kv-mode=caching or"),
    "softmax for experts": (f"{EXPERT} --router-func softmax", "router-func=softmax", "use sigmoid or tanh or none"),
    "tanh for tokens": (f"{TOKEN} --router-func tanh", "router-func=tanh", "use softmax or sigmoid"),
    "no function for tokens": (f"{TOKEN} --router-func none", "router-func=none", "use softmax or sigmoid"),
    "capacity count": (f"{EXPERT} --capacity 1 0.5", "capacity=1 0.5", "give 3, such as 1 0.667 0.333"),
    "capacity range": (f"{EXPERT} --capacity 1 0.5 0", "capacity=1 0.5 0", "such as 1 0.667 0.333"),
    "capacity not a number": (f"{EXPERT} --capacity 1 nan 0.5", "capacity=1 nan 0.5", "such as 1 0.667 0.333"),
    "capacity first": (f"{EXPERT} --capacity 0.9 0.6 0.3", "capacity=0.9 0.6 0.3", "use 1 0.667 0.333"),
    "capacity increasing": (f"{EXPERT} --capacity 1 0.3 0.6", "capacity=1 0.3 0.6", "use 1 0.667 0.333"),
    "alpha": (f"{EXPERT} --router-alpha 0", "router-alpha=0.0", "above 0"),
    "split words": ("--split all", "split='all'", "such as 969,30,1"),
    "split of nothing": ("--split 0,0,0", "split='0,0,0'", "such as 969,30,1"),
    "split in four": ("--split 1,1,1,1", "split='1,1,1,1'", "such as 969,30,1"),
    "tokenizer type": ("--tokenizer-model a.model", "tokenizer-model=a.model", "give --tokenizer-type"),
    "min lr": ("--lr 0.1 --min-lr 0.2", "min-lr=0.2 .*lr=0.1", "lower min-lr or raise lr"),
    "long warm-up": ("--lr-warmup-iters 101", "lr-warmup-iters=101 .*lr-decay-iters=100", "warm up for less"),
    "long decay": (
        "--lr-warmup-iters 50 --lr-wsd-decay-iters 51",
        "lr-wsd-decay-iters=51 .*lr-warmup-iters=50",
        "use at most 50",
    ),
    "two sources of data": (
        "--data-path a --valid-data-path b",
        "data-path and valid-data-path both",
        "--data-path without",
    ),
    "evaluation of nothing": ("--skip-train", "skip-train=True evaluates a checkpoint", "give --load"),
    "evaluation on nothing": (
        "--skip-train --load x --eval-iters 0",
        "skip-train=True with eval-iters=0",
        "--eval-iters",
    ),
    "profile backwards": (
        "--profile --save x --profile-step-end 10",
        "profile-step-end=10 is not after profile-step-start=10",
        "raise the one",
    ),
    "profile after the end": (
        "--profile --save x --train-iters 10",
        "profile-step-start=10 .*train-iters=10",
        "give a smaller --profile-step-start",
    ),
    "less than a batch": (
        "--train-samples 3 --global-batch-size 4 --micro-batch-size 2",
        "train-samples=3 .* 4 sequences",
        "give --train-samples 4 or more",
    ),
    "profile nowhere": ("--profile", "profile=True has no place", "--tensorboard-dir or --save"),
    "profile of others": ("--profile --save x --profile-ranks 0 1", "profile-ranks=0 1", "ranks from 0 to 0"),
    "two lengths": ("--train-iters 5 --train-samples 50", "train-iters=5 and train-samples=50", "--train-iters None"),
    "samples in iterations": ("--lr-decay-samples 9", "lr-decay-samples=9 .*train-iters=100", "give --lr-decay-iters"),
    "iterations in samples": (
        "--train-samples 50 --lr-warmup-iters 9",
        "lr-warmup-iters=9 .*train-samples=50",
        r"give --lr-warmup-samples \(--lr-warmup-iters 0 undoes",
    ),
    "two warm-ups": (
        "--lr-warmup-iters 9 --lr-warmup-fraction 0.1",
        "lr-warmup-iters=9 and lr-warmup-fraction=0.1",
        "leave one out",
    ),
    "warm-up beyond the end": ("--lr-warmup-fraction 1.5", "lr-warmup-fraction=1.5", "from 0 to 1"),
    "warm-up and decay": (
        "--train-samples 50 --lr-warmup-fraction 0.5 --lr-wsd-decay-samples 26",
        "lr-wsd-decay-samples=26 after lr-warmup-fraction=0.5",
        "use at most 25",
    ),
    "ramp in iterations": ("--rampup-batch-size 4 4 50", "rampup-batch-size=4 4 50 .*train-iters", "--train-samples"),
    "ramp in two numbers": (f"{RAMP} 4 4", "rampup-batch-size=4 4 is not", "three numbers above 0"),
    "ramp in uneven steps": (f"{RAMP} 4 12 50", "global-batch-size=32 in whole steps", "INCREMENT that divides"),
    "ramp of uneven batches": (f"{RAMP} 4 2 50", "rampup-batch-size=4 2 50", "micro-batch-size 2, .*multiples of 4"),
    "timeout": ("--distributed-timeout-minutes 0", "distributed-timeout-minutes=0.0", "use a value above 0"),
    "tensor parallel": ("--tensor-model-parallel-size 0", "tensor-model-parallel-size=0", "use 1 or more"),
    "pipeline": ("--pipeline-model-parallel-size -1", "pipeline-model-parallel-size=-1", "use 1 or more"),
    "consistency": ("--check-routing-consistency 0", "check-routing-consistency=0", "use 1 or more"),
    "two precisions": ("--bf16 --fp16", "bf16=True and fp16=True", "use --bf16, or --fp16 alone"),
    "global batch": (
        "--micro-batch-size 4 --global-batch-size 10",
        "global-batch-size=10 .*micro-batch-size=4",
        "use --micro-batch-size 2, which keeps the global batch, or --global-batch-size 8 or 12",
    ),
}


@pytest.mark.parametrize(("flags", "fault", "remedy"), REFUSED.values(), ids=REFUSED)
def test_refused_with_field_value_and_remedy(flags, fault, remedy):
    with pytest.raises(ValueError, match=f"{fault}.*{remedy}") as error:
        run(flags)
    assert "\n" not in str(error.value)


def test_global_batch_depends_on_the_number_of_ranks():
    assert run("--micro-batch-size 4", 3).training.global_batch_size == 12
    assert run("--micro-batch-size 4 --global-batch-size 24", 3).training.global_batch_size == 24
    with pytest.raises(ValueError, match="3 data-parallel ranks: use --global-batch-size 12 or 24"):
        run("--micro-batch-size 4 --global-batch-size 16", 3)


def test_derived_defaults():
    config = run(EXPERT)
    assert config.model.kv_channels == 64
    assert config.recursion.capacity == (1.0, 2 / 3, 1 / 3)
    assert (config.recursion.router_func, config.recursion.router_alpha) == ("sigmoid", 0.1)
    assert run(f"{EXPERT} --router-alpha 0.3").recursion.router_alpha == 0.3
    token = run(TOKEN).recursion
    assert (token.router_func, token.router_alpha, token.capacity) == ("softmax", 1.0, None)
    assert run(f"{TOKEN} --router-func sigmoid").recursion.router_alpha == 0.1


@pytest.mark.parametrize(
    ("iterations", "decay"), [(9438, 1888), (8883, 1777), (12619, 2524), (14161, 2832), (14216, 2843), (14672, 2934)]
)
def test_decay_defaults_to_the_papers_fifth(iterations, decay):
    optimizer = run(f"--train-iters {iterations}").optimizer
    assert (optimizer.lr_decay_iters, optimizer.lr_wsd_decay_iters) == (iterations, decay)


def test_default_decay_gives_way_to_a_long_warm_up():
    assert run("--train-iters 100 --lr-warmup-iters 90").optimizer.lr_wsd_decay_iters == 10


@pytest.mark.parametrize(("rounding", "depth"), [("down", 8), ("up", 11)])
def test_depth_rounding_becomes_the_depth_and_is_told(rounding, depth, caplog):
    config = run(f"--num-layers 9 --num-recursions 3 --depth-rounding {rounding}")
    assert config.model.num_layers == depth
    assert f"num-layers=9 becomes {depth}" in caplog.text


# flags -> the setting that is warned about
IGNORED = {
    "split of own corpora": ("--train-data-path a --split 9,1,0", "split=9,1,0 is ignored.*--data-path"),
    "record of an evaluation": (
        "--skip-train --load x --tensorboard-dir y",
        "tensorboard-dir=y is ignored.*skip-train",
    ),
    "test of a training": ("--train-data-path a --test-data-path b", "test-data-path=.* is ignored.*--skip-train"),
    "ranks of no profile": ("--profile-ranks 0 1", "profile-ranks=.* is ignored.*--profile"),
    "groups": ("--num-query-groups 2", "num-query-groups=2 is ignored.*--group-query-attention"),
    "strategy": ("--sharing-strategy cycle", "sharing-strategy=cycle is ignored"),
    "rounding": ("--depth-rounding up", "depth-rounding=up is ignored"),
    "second router for tokens": (f"{TOKEN} --router-objective aux_router", "aux_router is ignored.*expert_choice"),
    "router of a recursive model": ("--num-recursions 2 --router-type mlp", "router-type=mlp is ignored"),
    "z-loss of a vanilla model": ("--router-z-loss-coeff 1", "router-z-loss-coeff=1.0 is ignored"),
    "capacity of a recursive model": ("--num-recursions 2 --capacity 1 0.5", "capacity=.* is ignored.*expert_choice"),
    "capacity of token choice": (f"{TOKEN} --capacity 1 0.5 0.5", "capacity=.* is ignored.*expert_choice"),
    "aux loss of token choice": (f"{TOKEN} --router-aux-loss-coeff 1", "router-aux-loss-coeff=1.0 is ignored"),
    "alpha without function": (f"{EXPERT} --router-func none --router-alpha 0.5", "router-alpha=0.5 is ignored"),
    "lr of an absent router": (f"{EXPERT} --router-aux-lr-mult 5", "router-aux-lr-mult=5.0 is ignored.*aux_router"),
    "balance of expert choice": (f"{EXPERT} --router-balance loss_free", "router-balance=loss_free is ignored"),
    "coefficient without loss": (
        f"{TOKEN} --router-balance loss_free --router-balance-coeff 1",
        "router-balance-coeff=1.0 is ignored",
    ),
    "rate without bias": (f"{TOKEN} --router-bias-update-rate 1", "router-bias-update-rate=1.0 is ignored.*loss_free"),
    "floor of a constant": ("--lr-decay-style constant --min-lr 1e-4", "min-lr=0.0001 is ignored"),
    "WSD of cosine": ("--lr-decay-style cosine --lr-wsd-decay-iters 5", "lr-wsd-decay-iters=5 is ignored.*WSD"),
    "beta of SGD": ("--optimizer sgd --adam-beta1 0.5", "adam-beta1=0.5 is ignored"),
    "momentum of Adam": ("--sgd-momentum 0.5", "sgd-momentum=0.5 is ignored"),
    "interval without directory": ("--save-interval 5", "save-interval=5 is ignored.*--save"),
    "sequence of one rank": ("--sequence-parallel", "sequence-parallel=True is ignored.*--tensor-model-parallel-size"),
    "split of one rank": ("--pipeline-layers 4 4", "pipeline-layers=.* is ignored.*--pipeline-model-parallel-size"),
    "consistency of one rank": (f"{EXPERT} --check-routing-consistency 5", "check-routing-consistency=5 is ignored"),
    "overlap of one rank": (
        "--overlap-p2p-comm off",
        "overlap-p2p-comm=off is ignored.*--pipeline-model-parallel-size",
    ),
    "unit of core attention": (
        "--recompute-granularity selective --recompute-unit recursion",
        "recompute-unit=recursion is ignored.*--recompute-granularity full",
    ),
    "name without project": ("--wandb-exp-name a", "wandb-exp-name=a is ignored.*--wandb-project"),
    "untrained threshold": (f"{EXPERT} --router-aux-loss-coeff 0", "leaves the causal threshold untrained"),
    "untrained selection": (
        f"{EXPERT} --router-gating additive --router-objective aux_router",
        "router-gating=additive with router-objective=aux_router leaves the routers that select without a gradient",
    ),
    "untrained depths": (f"{TOKEN} --router-gating additive --router-balance none", "without a gradient"),
}


@pytest.mark.parametrize(("flags", "message"), IGNORED.values(), ids=IGNORED)
def test_ignored_settings_are_warned_about(flags, message, caplog):
    run(flags)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert re.search(message, caplog.text)


QUIET = {
    "vanilla": "",
    "recursive": "--num-recursions 2 --sharing-strategy sequence",
    "recursive sharing": "--num-recursions 2 --kv-mode sharing",
    "expert": EXPERT,
    "expert, no function": f"{EXPERT} --router-func none",
    "expert, second router": f"{EXPERT} --router-objective aux_router --router-aux-lr-mult 5",
    "token": TOKEN,
    "token, loss-free": f"{TOKEN} --router-balance loss_free --router-bias-update-rate 0.01",
    "cosine": "--lr-decay-style cosine --min-lr 1e-4",
    "constant": "--lr-decay-style constant",
    "sgd": "--optimizer sgd --sgd-momentum 0.5",
    "samples": "--train-samples 90 --lr-warmup-fraction 0.1 --global-batch-size 8 --rampup-batch-size 4 4 20 "
    "--micro-batch-size 2",
    "saving": "--save runs/a --save-interval 5",
}


@pytest.mark.parametrize("flags", QUIET.values(), ids=QUIET)
def test_sound_settings_are_accepted_quietly_and_validating_again_changes_nothing(flags, caplog, tmp_path):
    config = run(flags, world_size=2)
    assert validate(config, 2) == config
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert validate(read_config(["--config", str(path)]), 2) == config
    assert caplog.text == ""


def test_only_the_first_rank_warns(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run("--save-interval 5")
    assert caplog.text == ""


def test_a_model_is_checked_apart_from_the_ranks_that_train_it(caplog):
    flags = f"{EXPERT} --tensor-model-parallel-size 3 --micro-batch-size 0 --split all --save-interval 5".split()
    config = validate_model(read_config(flags))
    assert config.recursion.capacity == (1.0, 2 / 3, 1 / 3)
    assert config.training.global_batch_size is None
    assert caplog.text == ""
    with pytest.raises(ValueError, match="micro-batch-size=0"):
        validate_run(config, 3)
    with pytest.raises(ValueError, match="hidden-size=0"):
        validate_model(read_config(["--hidden-size", "0"]))


def test_what_follows_from_settings_is_a_property_of_them():
    assert [run(flags).training.precision for flags in ("", "--bf16", "--fp16")] == ["fp32", "bf16", "fp16"]
    assert run("").model.key_value_heads == 4
    assert run("--group-query-attention --num-query-groups 2").model.key_value_heads == 2
    pipeline = "--pipeline-model-parallel-size 2"
    assert run(f"{EXPERT} {pipeline}", 2).is_ring
    assert not run(EXPERT).is_ring
    assert not run(pipeline, 2).is_ring
    assert not run(f"--num-recursions 2 --sharing-strategy sequence {pipeline}", 2).is_ring
