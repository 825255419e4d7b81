"""The loader of reference cases refuses what it does not know instead of skipping it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

REFERENCE = Path(__file__).parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))
from authors import load_case  # noqa: E402 (tests/reference is no package)


def changed(tmp_path: Path, change, case: str = "mor_expert_nr3") -> Path:
    """A copy of a case's settings, changed, without its tensors."""
    with safe_open(REFERENCE / "data" / f"{case}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {"input_ids": file.get_tensor("input_ids")}
    change(meta)
    path = tmp_path / "case.safetensors"
    save_file(tensors, path, metadata={"meta": json.dumps(meta)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["mor"].update(jitter=0.1), r"unknown settings \['jitter'\]"),
        (lambda m: m["mor"].update(rand_router=True), "mor.rand_router=True"),
        (lambda m: m["mor"]["expert"].update(sampling=None), "mor.expert.sampling=None"),
        (lambda m: m["mor"]["expert"].update(cap_warmup_step=None), "cap_warmup_step"),
        (lambda m: m["recursive"].update(ln_share=False), "recursive.ln_share=False"),
        (lambda m: m["recursive"].update(base_depth=3), "recursive.base_depth=3"),
        (lambda m: m["dims"].update(dropout=0.1), r"unknown settings \['dropout'\]"),
        (lambda m: m["kv_sharing"].update(enable=True, sharing="cycle"), "kv_sharing.sharing='cycle'"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_case(changed(tmp_path, change))


def test_known_settings_are_translated(tmp_path):
    def change(meta):
        meta["mor"].update(router_type="wide_mlp", capacity=None, temp=2.0, z_loss=True)
        meta["mor"]["expert"].update(router_func=None, gating="additive", cap_warmup_step=5)

    recursion = load_case(changed(tmp_path, change)).config.recursion
    assert recursion.router_type == "mlp"
    assert recursion.capacity is None
    assert recursion.router_temperature == 2.0
    assert recursion.router_z_loss_coeff == 1e-5
    assert (recursion.router_func, recursion.router_gating, recursion.capacity_warmup_iters) == ("none", "additive", 5)
