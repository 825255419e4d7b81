"""Flags and YAML: precedence, types, names, errors with their origin, and the way back to YAML."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import fields, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mor_megatron.config.cli import parse_config, read_config, save_config, to_yaml
from mor_megatron.config.megatron_flags import ANSWERS
from mor_megatron.config.schema import CheckpointConfig, Config, DataConfig, setting_types
from mor_megatron.config.settings import flag_name

SETTINGS = setting_types()


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return its path as text."""

    def _write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return _write


def test_without_arguments_gives_the_defaults():
    assert read_config([]) == Config()


def test_flags_of_every_type():
    flags = """--num-layers 12 --bf16 --lr 3e-4 --data-path 0.5 a 0.5 b --capacity 1 0.66 0.33 --routing expert_choice
        --save=runs/x --min-lr -1 --zero-stage 0"""
    config = read_config(flags.split())
    assert config.model.num_layers == 12
    assert config.training.bf16 is True
    assert config.optimizer.lr == 3e-4
    assert config.data.data_path == ("0.5", "a", "0.5", "b")
    assert config.recursion.capacity == (1.0, 0.66, 0.33)
    assert config.recursion.routing == "expert_choice"
    assert config.checkpoint.save == "runs/x"
    assert config.optimizer.min_lr == -1.0
    assert config.training.zero_stage == 0


def test_yaml_means_what_the_same_flags_mean(write):
    path = write(
        "num-layers: 12\nbf16: true\nlr: 3e-4\ndata_path: [0.5, a, 0.5, b]\ncapacity: [1, 0.66, 0.33]\n"
        "routing: expert_choice\nsave: runs/x\n"
    )
    flags = "--num-layers 12 --bf16 --lr 3e-4 --data-path 0.5 a 0.5 b --capacity 1 0.66 0.33"
    assert read_config(["--config", path]) == read_config([*flags.split(), "--routing=expert_choice", "--save=runs/x"])


def test_flags_beat_files_wherever_they_stand_and_later_files_beat_earlier_ones(write):
    first = write("num-layers: 10\nhidden-size: 128\nlr: 0.1\nbf16: true\n", "first.yaml")
    second = write("hidden-size: 256\nlr: 0.2\n", "second.yaml")
    for argv in (
        ["--lr", "0.3", "--no-bf16", "--config", first, second],
        ["--config", first, "--config", second, "--lr", "0.3", "--no-bf16"],
    ):
        config = read_config(argv)
        assert (config.model.num_layers, config.model.hidden_size, config.optimizer.lr) == (10, 256, 0.3)
        assert config.training.bf16 is False


def test_base_files_are_relative_to_their_file_and_come_first(write):
    write("num-layers: 10\nlr: 0.1\n", "sizes/small.yaml")
    write("lr: 0.2\nseed: 7\n", "recipe.yaml")
    path = write("base: [../sizes/small.yaml, ../recipe.yaml]\nseed: 8\n", "runs/one.yaml")
    config = read_config(["--config", path])
    assert (config.model.num_layers, config.optimizer.lr, config.training.seed) == (10, 0.2, 8)


def test_none_and_null_clear_an_optional_setting(write):
    path = write("capacity: [1, 0.5]\nsave: runs/a\n")
    assert read_config(["--config", path, "--capacity", "None"]).recursion.capacity is None
    assert read_config(["--config", path, "--config", write("save: null\n", "b.yaml")]).checkpoint.save is None


def test_a_value_may_start_with_a_dash(write):
    assert read_config(["--save=--odd"]).checkpoint.save == "--odd"
    assert read_config(["--config", write("save: --odd\n")]).checkpoint.save == "--odd"


def test_the_deepspeed_launchers_flag_is_accepted():
    assert read_config(["--local_rank=3"]) == Config()


BAD_YAML = {
    "unknown name": ("num-layer: 3", r"unknown setting num-layer \(.*run.yaml:1\): did you mean num-layers\?"),
    "section": ("model: 3", "unknown setting model"),
    "wrong type": ("seed: 1\nnum-layers: twelve", r"num-layers=twelve \(.*run.yaml:2\).*: give a whole number"),
    "fraction for integer": ("num-layers: 1.5", "num-layers=1.5 .* a whole number"),
    "boolean for number": ("lr: true", "lr=true .* give a number"),
    "word for boolean": ("bf16: yes", "bf16=yes .* give true or false"),
    "choice": ("routing: expert", "routing=expert .* one of none, expert_choice, token_choice"),
    "null": ("lr: null", "lr=null .* give a number"),
    "null for a list": ("data-path: null", "data-path=null .* give a list"),
    "list for one value": ("lr: [1, 2]", r"lr=\[1, 2\] .* give a number"),
    "list with a wrong item": ("capacity: [1, x]", r"capacity=\[1, x\] .* a list \(each item a number\) or None"),
    "list of one for one value": ("save: [a]", r"save=\[a\] .*run.yaml:1.* give one word"),
    "empty list for one value": ("bf16: []", r"bf16=\[\] .*run.yaml:1.* give true or false"),
    "list with an empty item": ("data-path: [a, ~]", "data-path .*run.yaml:1.* an item without a value"),
    "list in a base": ("base: wrong.yaml\nlr: 1", r"lr=\[1\] .*wrong.yaml:1.* give a number"),
    "twice": ("lr: 1\nseed: 1\nlr: 1", "run.yaml:3.* repeats the key of .*run.yaml:1: keep one"),
    "twice, spelt differently": ("num-layers: 1\nnum_layers: 1", "repeats the key"),
    "nested": ("lr: {a: 1}", "lr .*run.yaml:1.* nested"),
    "nested list": ("data-path: [[a]]", "nested"),
    "not a mapping": ("- a\n- b", "not a mapping"),
    "not YAML": ("lr: 1\n  seed: : 2", "run.yaml:2 is not valid YAML"),
    "two documents": ("lr: 1\n---\nlr: 2", "not valid YAML"),
    "own base": ("base: run.yaml", "its own base"),
    "missing base": ("base: nowhere.yaml", "nowhere.yaml cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml_is_one_line_with_its_place(write, text, message):
    write("lr: [1]", "wrong.yaml")
    with pytest.raises(ValueError, match=message) as error:
        read_config(["--config", write(text)])
    assert "\n" not in str(error.value)


BAD_FLAGS = {
    "unknown": (["--hiden-size", "3"], r"unknown setting hiden-size \(command line\): did you mean hidden-size\?"),
    "nothing near": (["--qqq", "3"], "unknown setting qqq .*--help lists all settings"),
    "abbreviation": (["--num-lay", "3"], "did you mean num-layers"),
    "negated value": (["--no-lr"], "unknown setting no-lr"),
    "stray word": (["12", "--lr", "1"], "unexpected '12'"),
    "no value": (["--lr", "--seed", "1"], "lr=.* give a number"),
    "Megatron-LM's": (["--use-flash-attn"], r"unknown setting use-flash-attn .*: --attention-backend flash"),
    "a family of them": (["--moe_router_topk", "2"], "unknown setting moe-router-topk .*: no mixture of experts here"),
    "of an old script": (["--no-async-tensor-model-parallel-allreduce"], "unknown setting .*: not there, leave it out"),
    "several": (
        ["--swiglu", "--no-bias-gelu-fusion", "--lr", "x", "--hiden-size", "3", "--swiglu"],
        r"^unknown setting swiglu \(command line\): always so here, leave it out; unknown setting no-bias-gelu-fusion "
        r"\(command line\): not there, leave it out; unknown setting hiden-size .* did you mean hidden-size\?$",
    ),
    "second value": (["--save", "a", "b"], r"save=\[a, b\] .* give one word"),
    "wrong type after right ones": (["--lr", "1", "--seed", "x", "--bf16"], "seed=x .command line. has the wrong type"),
    "no file": (["--config"], "--config names no file"),
    "missing file": (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read .*give the path"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config(argv)
    assert "\n" not in str(error.value)


def test_answers_to_megatrons_flags_name_settings_that_there_are():
    assert not [name for name in ANSWERS if name.replace("-", "_") in SETTINGS]
    named = {flag for text in ANSWERS.values() for flag in re.findall(r"--([a-z0-9-]+)", text)}
    assert len(named) > 30
    assert not [flag for flag in named if flag.replace("-", "_") not in SETTINGS]


@given(name=st.sampled_from(sorted(SETTINGS)), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_name_with_one_letter_lost_is_refused_and_recognised(name, data):
    position = data.draw(st.integers(0, len(name) - 1))
    typo = name[:position] + name[position + 1 :]
    if typo in SETTINGS or typo.replace("-", "_") in SETTINGS or typo == "config" or typo.startswith("_"):
        return
    with pytest.raises(ValueError, match=f"unknown setting {flag_name(typo)} .*did you mean ") as error:
        read_config([f"--{typo}", "1"])
    suggestion = str(error.value).rpartition("did you mean ")[2].rstrip("?")
    likeness = {other: SequenceMatcher(None, flag_name(other), flag_name(typo)).ratio() for other in SETTINGS}
    assert likeness[suggestion.replace("-", "_")] >= 0.9 * likeness[name]


def test_errors_leave_the_program_with_status_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--lr", "fast"])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err == "error: lr=fast (command line) has the wrong type: give a number\n"


def test_print_config_prints_resolved_settings_that_read_back(capsys, write):
    flags = "--routing expert_choice --num-recursions 3 --print-config --micro-batch-size 2"
    with pytest.raises(SystemExit) as stop:
        parse_config(flags.split())
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n{flag_name(name)}: " in "\n" + printed for name in SETTINGS)
    config = read_config(["--config", write(printed)])
    assert config.training.global_batch_size == 2
    assert config.recursion.capacity == (1.0, 2 / 3, 1 / 3)


def test_print_config_validates(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--print-config", "--num-attention-heads", "3"])
    assert stop.value.code == 2
    assert "num-attention-heads=3" in capsys.readouterr().err


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{flag_name(name)}" in text for name in [*SETTINGS, "config", "print_config"])
    assert "settings." not in text


def test_every_field_is_documented():
    """A field's docstring is its help text; tyro shows only those it finds."""
    bases = {base for section in get_type_hints(Config).values() for base in section.__mro__[:-1]}
    documented = set()
    for module in {sys.modules[base.__module__] for base in bases}:
        classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
        for statement, following in (pair for node in classes for pair in pairwise(node.body)):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                documented.add(statement.target.id)
    assert not set(SETTINGS) - documented


def _values(hint):
    """Random values of a field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        # A later item that starts with a dash would open a flag.
        item = _values(args[0])
        if args[0] is str:
            item = item.filter(lambda text: not text.startswith("-"))
        return st.lists(item, min_size=1, max_size=4).map(tuple)
    if args:
        return st.one_of(*(st.none() if arg is type(None) else _values(arg) for arg in args))
    text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda text: text != "None")
    number = st.floats(allow_nan=False, allow_infinity=False)
    return {bool: st.booleans(), int: st.integers(-(10**9), 10**9), float: number, str: text}[hint]


@st.composite
def configs(draw):
    """Random configurations, valid or not."""
    names = draw(st.sets(st.sampled_from(sorted(SETTINGS.keys() - {"extension"}))))
    changes = {name: draw(_values(SETTINGS[name][1])) for name in names}
    config = Config()
    for section in fields(Config):
        own = {name: value for name, value in changes.items() if SETTINGS[name][0] == section.name}
        config = replace(config, **{section.name: replace(getattr(config, section.name), **own)})
    return config


@pytest.mark.parametrize(
    "text", ["", " ", "a: b", "# a", "true", "null", "1e3", "'", '"', "\n", "\x85", "é", "[a]", "~"]
)
def test_text_that_looks_like_yaml_survives(write, text):
    config = replace(Config(), checkpoint=CheckpointConfig(save=text), data=DataConfig(data_path=(text, text)))
    assert read_config(["--config", write(to_yaml(config))]) == config


@given(config=configs())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_yaml_round_trip(config, tmp_path):
    path = tmp_path / "saved.yaml"
    save_config(config, path)
    assert path.read_text(encoding="utf-8") == to_yaml(config)
    assert read_config(["--config", str(path)]) == config
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.yaml"]
