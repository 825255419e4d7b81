"""A user's DeepSpeed file on top of our flags: what passes through, what is refused and how, what the flags mean."""

from __future__ import annotations

import json

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.deepspeed_settings import deepspeed_settings
from mor_megatron.config.validate import validate

FLAGS = "--micro-batch-size 2 --global-batch-size 8 --zero-stage 2 --clip-grad 0.5"


@pytest.fixture
def settings(tmp_path):
    """flags, what the file says (an object or bare text) -> DeepSpeed's settings."""

    def build(flags: str, content, cuda: bool = False) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        config = validate(read_config([*flags.split(), "--deepspeed-config", str(path)]))
        return deepspeed_settings(config, cuda)

    return build


def test_what_only_deepspeed_knows_passes_through(settings):
    file = {
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
        "zero_optimization": {"reduce_bucket_size": 1000, "sub_group_size": 2000},
        "comms_logger": {"enabled": True, "debug": False},
    }
    plain = deepspeed_settings(validate(read_config(FLAGS.split())))
    got = settings(FLAGS, file)
    assert got["wall_clock_breakdown"] is True
    assert got["steps_per_print"] == 5
    assert got["comms_logger"] == {"enabled": True, "debug": False}
    assert got["zero_optimization"] == {**plain["zero_optimization"], **file["zero_optimization"]}
    assert {key: got[key] for key in plain if key not in file} == {key: plain[key] for key in plain if key not in file}


def test_agreeing_settings_change_nothing(settings):
    """`auto` is Hugging Face's word for a value that the caller decides."""
    file = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto", "loss_scale_window": "auto"},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    }
    assert settings(FLAGS, file) == deepspeed_settings(validate(read_config(FLAGS.split())))


# flags on top of FLAGS, file -> flag with value, key with value
CONTRADICTIONS = {
    "stage": ("", {"zero_optimization": {"stage": 3}}, "zero-stage=2", "zero_optimization.stage=3"),
    "clipping": ("", {"gradient_clipping": 1.0}, "clip-grad=0.5", "gradient_clipping=1.0"),
    "micro batch": (
        "",
        {"train_micro_batch_size_per_gpu": 4},
        "micro-batch-size=2",
        "train_micro_batch_size_per_gpu=4",
    ),
    "batch": ("", {"train_batch_size": 16}, "global-batch-size=8", "train_batch_size=16"),
    "bf16": ("", {"bf16": {"enabled": True}}, "bf16=False", "bf16.enabled=true"),
    "fp16": ("--bf16", {"fp16": {"enabled": True}}, "fp16=False", "fp16.enabled=true"),
    "scale": (
        "--fp16 --initial-loss-scale 1024",
        {"fp16": {"initial_scale_power": 16}},
        "initial-loss-scale=1024",
        "fp16.initial_scale_power=16",
    ),
    "window": ("--fp16", {"fp16": {"loss_scale_window": 7}}, "loss-scale-window=1000", "fp16.loss_scale_window=7"),
    "offload": (
        "",
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "optimizer-cpu-offload=False",
        'zero_optimization.offload_optimizer.device="cpu"',
    ),
    "overlap": (
        "--overlap-grad-reduce off",
        {"zero_optimization": {"overlap_comm": True}},
        "overlap-grad-reduce=off",
        "zero_optimization.overlap_comm=true",
    ),
    "optimizer": ("", {"optimizer": {"type": "Lion"}}, "optimizer=adam", 'optimizer.type="Lion"'),
    "scheduler": ("", {"scheduler": {"type": "WarmupLR"}}, "lr-decay-style=WSD", 'scheduler.type="WarmupLR"'),
    "accumulation": ("", {"gradient_accumulation_steps": 4}, "global-batch-size", "gradient_accumulation_steps=4"),
    "boundary": (
        "",
        {"managed_gradient_accumulation": True},
        "managed_gradient_accumulation=false",
        "managed_gradient_accumulation=true",
    ),
    "reduction type": ("--bf16", {"communication_data_type": "bf16"}, '="fp32"', 'communication_data_type="bf16"'),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_both_values_and_the_file(settings, tmp_path, case):
    flags, file, flag, key = CONTRADICTIONS[case]
    with pytest.raises(ValueError) as error:
        settings(f"{FLAGS} {flags}", file)
    message = str(error.value)
    assert flag in message
    assert f"{key} ({tmp_path / 'ds.json'})" in message
    assert "\n" not in message


def test_a_file_that_is_not_json_is_refused_with_the_place(settings, tmp_path):
    with pytest.raises(ValueError, match=r"ds\.json:2:7 is not valid JSON \(Expecting ':' delimiter\): mend it there"):
        settings(FLAGS, '{\n  "a" 1\n}')
    with pytest.raises(ValueError, match=r"ds\.json is not a JSON object"):
        settings(FLAGS, "[1, 2]")
    with pytest.raises(ValueError, match=r"absent\.json cannot be read \(No such file"):
        validate(read_config(["--deepspeed-config", str(tmp_path / "absent.json")]))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"binary\.json is not UTF-8 text"):
        validate(read_config(["--deepspeed-config", str(tmp_path / "binary.json")]))


REFUSED = {
    "offload without shards": ("--optimizer-cpu-offload --zero-stage 0", "zero-stage=0: use --zero-stage 1, 2 or 3"),
    "fp16 without shards": ("--fp16 --zero-stage 0", "fp16 with zero-stage=0 .*use --zero-stage 1, 2 or 3"),
    "scale": ("--fp16 --initial-loss-scale 1000", "initial-loss-scale=1000 is not a power of two"),
    "scale below minimum": ("--fp16 --initial-loss-scale 4 --min-loss-scale 8", "initial-loss-scale=4 .*min-loss-sc"),
    "no hysteresis": ("--fp16 --hysteresis 0", "hysteresis=0 is out of range"),
    "overlap": ("--overlap-grad-reduce on", "overlap-grad-reduce=on does not go with zero-stage=1.*2 or 3, or auto"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engine_cannot_do_is_refused(case):
    flags, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        validate(read_config(flags.split()))


def test_an_offloaded_optimizer_is_refused_in_a_pipeline():
    flags = "--num-layers 8 --num-recursions 3 --pipeline-model-parallel-size 2 --optimizer-cpu-offload"
    with pytest.raises(ValueError, match=r"optimizer-cpu-offload .*pipeline-model-parallel-size=2"):
        validate(read_config([*flags.split(), "--global-batch-size", "8"]), 2)


def test_reduction_overlaps_where_it_can():
    def overlaps(flags: str, cuda: bool) -> bool:
        return deepspeed_settings(validate(read_config(flags.split())), cuda)["zero_optimization"]["overlap_comm"]

    assert overlaps("--zero-stage 2", cuda=True)
    assert not overlaps("--zero-stage 2", cuda=False)
    assert not overlaps("--zero-stage 1", cuda=True)
    assert overlaps("--zero-stage 3 --overlap-grad-reduce on", cuda=False)
    assert not overlaps("--zero-stage 3 --overlap-grad-reduce off", cuda=True)
