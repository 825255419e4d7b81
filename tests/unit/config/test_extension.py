"""--extension: a file outside the package adds a routing method, and its settings work like all others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mor_megatron.config import schema
from mor_megatron.config.cli import parse_config, read_config, to_yaml
from mor_megatron.config.validate import validate
from mor_megatron.recursion.methods import METHODS
from mor_megatron.recursion.plan import STRATEGIES

PARITY = '''"""Routes by position."""

from dataclasses import dataclass

from mor_megatron.recursion.methods import routing_method
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.setting import setting


@dataclass(frozen=True)
class ParitySettings:
    parity_period: int = setting(2, least=1)
    """Every so many tokens, one goes deep."""


@routing_method
class Parity(RoutingMethod):
    name = "parity"
    about = "every so many tokens, one goes deep"
    Settings = ParitySettings

    @classmethod
    def resolve(cls, settings, num_recursions):
        if settings.parity_period > 8:
            raise ValueError(f"parity-period={settings.parity_period} is lonely: use 8 or less")
        return settings
'''
ROUTED = ["--routing", "parity", "--num-recursions", "3"]


@pytest.fixture(autouse=True)
def registered():
    """Whatever a test registers is gone after it."""
    methods, strategies, section = dict(METHODS), dict(STRATEGIES), schema.RecursionConfig
    modules = set(sys.modules)
    yield
    for registry, before in ((METHODS, methods), (STRATEGIES, strategies)):
        registry.clear()
        registry.update(before)
    schema.RecursionConfig = section
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def parity(tmp_path: Path) -> str:
    path = tmp_path / "parity_routing.py"
    path.write_text(PARITY)
    return str(path)


def test_flags_and_yaml_reach_the_settings_of_the_method(parity: str, tmp_path: Path) -> None:
    config = read_config(["--parity-period", "3", *ROUTED, "--extension", parity])
    assert (config.recursion.routing, config.recursion.parity_period) == ("parity", 3)
    path = tmp_path / "run.yaml"
    path.write_text(f"parity-period: 4\nrouting: parity\nextension: {parity}\n")
    assert read_config(["--config", str(path)]).recursion.parity_period == 4
    path.write_text(to_yaml(config))
    assert read_config(["--config", str(path)]) == config


def test_a_file_that_has_moved_since_a_checkpoint_named_it_is_not_looked_for(parity: str, tmp_path: Path) -> None:
    read_config([*ROUTED, "--extension", parity])
    (tmp_path / "config.yaml").write_text("routing: parity\nextension: elsewhere/parity_routing.py\n")
    assert read_config(["--config", str(tmp_path / "config.yaml")]).recursion.routing == "parity"


def test_without_the_file_the_settings_are_unknown() -> None:
    with pytest.raises(ValueError, match="unknown setting parity-period"):
        read_config(["--parity-period", "3"])
    with pytest.raises(ValueError, match=r"routing=parity .* one of none, expert_choice, token_choice$"):
        read_config(ROUTED)


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_what_is_printed_has_the_settings(parity: str, flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config([*ROUTED, "--parity-period", "5", "--extension", parity, flag])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    if flag == "--help":
        assert "--parity-period INT" in printed
        assert "Every so many tokens, one goes deep." in printed
        assert "none,expert_choice,token_choice,parity" in printed
    else:
        assert "parity-period: 5\n" in printed


def test_its_values_are_checked(parity: str, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--extension", parity, "--parity-period"]
    with pytest.raises(ValueError, match=r"parity-period=x \(command line\) .* give a whole number"):
        read_config([*flags, "x"])
    with pytest.raises(ValueError, match="parity-period=0 is out of range: use 1 or more"):
        validate(read_config([*flags, "0", *ROUTED]))
    with pytest.raises(ValueError, match="parity-period=9 is lonely: use 8 or less"):
        validate(read_config([*flags, "9", *ROUTED]))
    validate(read_config([*flags, "3"]))
    assert "parity-period=3 is ignored: it is read only with --routing parity" in caplog.text


BROKEN = {
    "no file": (None, "cannot be loaded .FileNotFoundError: .*: give a Python file"),
    "syntax": ("x = = 1\n", "cannot be loaded .SyntaxError: "),
    "error": ("x = 1\ny = z\n", "own.py:2 cannot be loaded .NameError: name 'z' is not defined.: give a Python file"),
    "two lines": ("raise OSError('a\\nb')", r"cannot be loaded .OSError: a\\nb."),
    "taken setting": (PARITY.replace("parity_period", "lr"), "defines the setting lr, which exists"),
    "another method's setting": (
        PARITY.replace("parity_period", "router_balance_coeff"),
        "defines the setting router-balance-coeff, which exists: give it another name",
    ),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_words(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^extension={tmp_path}/.*{message}") as error:
            read_config(["--extension", str(path)])
        assert "\n" not in str(error.value)


def test_it_does_not_take_the_name_of_another_module(tmp_path: Path) -> None:
    for name, message in (("json.py", "cannot be the module json: give"), ("notes.txt", "not a Python file: give")):
        path = tmp_path / name
        path.write_text("")
        with pytest.raises(ValueError, match=f"extension={path} .*{message}"):
            read_config(["--extension", str(path)])
