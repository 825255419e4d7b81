"""Corrupted YAML files and flags give a valid configuration, or one line that names the place."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from spoil import spoil

from mor_megatron.config.cli import read_config, to_yaml
from mor_megatron.config.schema import Config, setting_types
from mor_megatron.config.settings import flag_name
from mor_megatron.config.validate import validate
from mor_megatron.planning.report import dry_run

SETTINGS = setting_types()
PRESETS = Path(__file__).parents[3] / "examples" / "configs"
VARIANTS = sorted(path.name for path in PRESETS.glob("*or_*.yaml"))
_WORDS = """0 1 -1 2 3 7 1000000007 -99999999999999999999 1e400 -0.0 nan .inf 1e-400 0x10 1_000 true NO ~ null none
    None expert_choice token_choice middle_cycle cycle WSD [] [1] [1,0.5] [1,2,3] {} {a:1} '' "" "a b" \u00e9 \U0001f600
    % $HOME /etc/passwd . .. ../.. !!python/object:os.system !!int &a *a <<: - -- --lr =1 1=1 @ ` | > ? # ,"""
VALUES = _WORDS.split()


def value_for(name: str, chance: random.Random) -> str:
    """Anything, or the default of the setting: some configurations should hold."""
    default = getattr(getattr(Config(), SETTINGS[name][0]), name)
    return chance.choice(VALUES) if chance.random() < 0.5 else json.dumps(default)


def spoilt_file(chance: random.Random, directory: Path) -> Path:
    """A preset whose settings, or bytes, are changed."""
    names = chance.sample(list(SETTINGS), chance.randrange(4))
    lines = [f"base: [{PRESETS}/tiny.yaml, {PRESETS}/{chance.choice(VARIANTS)}]", "vocab-size: 64"]
    lines += [f"{flag_name(name)}: {value_for(name, chance)}" for name in names if name != "vocab_size"]
    if chance.random() < 0.1:
        lines.append(chance.choice(lines))
    if chance.random() < 0.1:
        lines.append(chance.choice(["deep: " + "[" * 5000, "? [a, b]\n: c", "list:\n  - a: b\n    c: d", "\tx: 1"]))
    text = "\n".join(lines).encode()
    path = directory / "spoilt.yaml"
    path.write_bytes(spoil(text, chance) if chance.random() < 0.3 else text)
    return path


def spoilt_flags(chance: random.Random) -> list[str]:
    """Known and unknown flags with all kinds of values."""
    words = []
    for name in chance.sample(list(SETTINGS), chance.randrange(4)):
        flag = f"--{flag_name(name)}"
        if chance.random() < 0.1:
            flag = spoil(flag.encode(), chance).decode(errors="replace")
        words += [flag, *(value_for(name, chance) for _ in range(chance.choice([0, 1, 1, 1, 2])))]
    return words


def outcome(argv: list[str]) -> str:
    try:
        config = read_config(argv)
        valid = validate(config)
        dry_run(config, None)
    except ValueError as error:
        text = str(error)
        if "\n" in text.rstrip("\n") or not text:
            return f"not one line: {text!r}"
        return "refused"
    again = read_config(["--config", str(written(valid, argv))])
    return "accepted" if again == valid else "its YAML is another configuration"


def written(config: Config, argv: list[str]) -> Path:
    path = Path(argv[1]).with_name("again.yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_spoilt_settings(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    chance = random.Random(5)
    outcomes = []
    for number in range(count):
        argv = ["--config", str(spoilt_file(chance, tmp_path)), *spoilt_flags(chance)]
        try:
            result = outcome(argv)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        text = Path(argv[1]).read_bytes()
        assert result in ("accepted", "refused"), f"case {number}: {result}\n{text!r}\n{argv[2:]}"
        outcomes.append(result)
    assert outcomes.count("refused") > 0.5 * count
    assert outcomes.count("accepted") >= int(0.02 * count)  # one in eight is: of a few, none may be
