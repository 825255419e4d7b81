"""The code in an export is that of the package, except for the prefix of its imports."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import run_program
from models import VOCAB
from pairs import pair

from mor_megatron.huggingface import code_mor
from mor_megatron.huggingface.code_mor import write_code
from mor_megatron.recursion import expert_choice

PACKAGE = Path(code_mor.__file__).parent.parent
CORE = {"context", "expert_choice", "host", "losses", "methods", "no_routing", "plan", "routers", "routing"}
CORE |= {"relaxation", "setting", "token_choice"}

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("code")
    write_code(path, expert_choice.ExpertChoice)
    return path


def test_nothing_but_the_beginnings_of_imports_differs(directory: Path):
    names = {path.stem for path in directory.iterdir()}
    assert {name for name in names if not name.endswith("_mor")} == CORE
    for path in directory.iterdir():
        source = PACKAGE / ("recursion" if path.stem in CORE else "huggingface") / path.name
        for ours, theirs in zip(source.read_text().splitlines(), path.read_text().splitlines(), strict=True):
            assert theirs == re.sub(r"^from mor_megatron\.recursion\.", "from .", ours)


def test_a_saved_model_needs_no_package_of_ours(tmp_path: Path):
    _, export = pair("expert_relaxed")  # it has all that a model may have
    export.save_pretrained(tmp_path / "model")
    program = f"""
import sys
names = {{name for name in sys.modules if name.partition(".")[0] == "mor_megatron"}}
sys.modules.update(dict.fromkeys(names | {{"mor_megatron"}}))
import torch, transformers
from transformers import dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE = {str(tmp_path / "modules")!r}
dynamic_module_utils.init_hf_modules()
sys.path.insert(0, sys.path.pop())  # before the one of the tests' process
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
print(model.generate(torch.arange({VOCAB // 2})[None], max_new_tokens=4, do_sample=False).tolist())
"""
    (tmp_path / "program.py").write_text(program)
    status, output = run_program(tmp_path / "program.py", [], tmp_path)
    assert status == 0, output
    expected = export.generate(torch.arange(VOCAB // 2)[None], max_new_tokens=4, do_sample=False)
    assert output.splitlines()[-1] == str(expected.tolist())
    first, again = ({p.name: p.read_text() for p in (tmp_path / d).glob("*.py")} for d in ("model", "again"))
    assert again == first, "what was loaded from an export is saved with its code"


def test_an_extension_that_needs_more_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "greedy.py").write_text("from mor_megatron.model.mor_model import build_model\nclass Method: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plan.py").write_text("class Method: ...\n")
    monkeypatch.delitem(sys.modules, "plan", raising=False)  # a benchmark has that name, too
    import greedy
    import plan

    with pytest.raises(ValueError, match=r"plan\.py has the name of a file of every export: rename it"):
        write_code(tmp_path, plan.Method)
    with pytest.raises(ValueError, match=r"greedy\.py imports mor_megatron\.model\.mor_model: .*recursion\.\* only"):
        write_code(tmp_path, greedy.Method)
