"""A broken install of an optional GPU library is reported, and the run goes on without it."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from mor_megatron.config.schema import Config, ModelConfig
from mor_megatron.distributed import libraries
from mor_megatron.model.kernels import uses_transformer_engine

REASON = "libcudart.so.12: cannot open shared object file"


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(package, source): an installed package whose import runs this source."""
    monkeypatch.setattr(libraries, "_broken", {})
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)

    def write(package: str, source: str) -> None:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(source)
        (tmp_path / package / "pytorch.py").touch()

    yield write
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "ImportError", "AttributeError"])
@pytest.mark.parametrize("package", libraries.NAMES)
def test_a_broken_library_is_reported_once(capsys, install, package, error):
    install(package, f"raise {error}({REASON!r})")
    for _ in range(2):
        libraries.set_broken_aside()
        assert libraries.why_not(package) == REASON
    report = f"warning: {libraries.NAMES[package]} is installed but broken ({REASON}): it is not used\n"
    assert capsys.readouterr().err == report


def test_a_broken_library_is_not_used(monkeypatch, install):
    install("transformer_engine", f"raise OSError({REASON!r})")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config(model=ModelConfig(kv_channels=64))
    config = replace(config, training=replace(config.training, bf16=True))
    assert not uses_transformer_engine(config)
    with pytest.raises(ValueError, match=REASON):
        uses_transformer_engine(
            replace(config, training=replace(config.training, transformer_impl="transformer_engine"))
        )


def test_megatron_finds_it_absent(install):
    """It takes an ImportError for an absent library, and no other error."""
    install("transformer_engine", f"raise OSError({REASON!r})")
    libraries.set_broken_aside()
    with pytest.raises(ImportError):
        import_module("transformer_engine.pytorch")


def test_a_library_that_is_whole_or_absent_is_left_alone(capsys, install):
    install("transformer_engine", "")
    libraries.set_broken_aside()
    assert libraries.why_not("transformer_engine") is None
    assert "No module" in libraries.why_not("flash_attn")
    assert capsys.readouterr().err == ""
