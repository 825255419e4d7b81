"""Range attention, run by Triton's interpreter, equals its definition: outputs and gradients."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import outputs_and_gradients
from torch import Tensor

from mor_megatron.model import ranges

KERNELS = Path(ranges.__file__).parent
INTERPRETER = Path(__file__).with_name("interpreted.py")
TOLERANCE = {
    torch.float32: (1e-5, 1e-4),  # of outputs; of gradients, which sum products of sums of up to 131 terms
    torch.float16: (2e-3, 4e-3),  # 11 bits; weights and gradients of scores are rounded before they are multiplied
}
"""Relative to the largest value, against fp64. The interpreter's bf16 products are wrong."""


def case(
    heads: int, groups: int, width: int, keys: int, rows: tuple[int, ...], *, document: int = 0, late: int = 0,
    slots: int = 0, scale: float | None = None, strided: bool = False,
) -> tuple[tuple, bool]:  # fmt: skip
    """Arguments of `range_attention`, and whether the gradient arrives strided: random rows to the keys of all.

    Args:
        rows: how many of each sequence, the last ones of `keys` - `late`.
        document: length of each; 0: one.
    """
    generator = torch.Generator().manual_seed(keys)
    batch, slots = len(rows), slots or max(rows)
    first, last = torch.zeros(batch, slots, dtype=torch.int32), torch.full((batch, slots), -1, dtype=torch.int32)
    for b, count in enumerate(rows):
        places = late + torch.randperm(keys - late, generator=generator)[:count].sort().values
        last[b, :count] = places
        first[b, :count] = places // document * document if document else 0
    query = torch.randn(slots, batch, heads, width, generator=generator)
    key, value = (torch.randn(keys, batch, groups, width, generator=generator) for _ in range(2))
    if strided:
        query, key = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key))
    return (query, key, value, *ranges.ranges(first, last, keys, block=32), scale), strided


CASES = {
    "all rows": case(1, 1, 16, 70, (70,)),
    "some rows, groups": case(4, 2, 16, 131, (45, 30), slots=48),
    "documents": case(1, 1, 32, 97, (97,), document=17, scale=0.3),
    "late documents": case(2, 2, 16, 150, (40, 33), document=25, late=70, strided=True),
    "an empty sequence": case(2, 1, 16, 50, (20, 0, 1), document=9),
    "one row": case(1, 1, 64, 5, (1,)),
    "wide heads": case(2, 1, 128, 70, (9,)),
    "more slots than keys": case(1, 1, 16, 33, (33,), slots=90),
    "no rows": case(1, 1, 16, 33, (0, 0)),
}
HALF = ("some rows, groups", "late documents")


def cast(inputs: tuple, dtype: torch.dtype) -> tuple:
    """Query, key and value in another type, to be differentiated."""
    return (*(x.to(dtype).requires_grad_() for x in inputs[:3]), *inputs[3:])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, torch.dtype], list[Tensor] | str]:
    """What the kernels give."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (requirements-dev.txt)")
    cases, results = (tmp_path_factory.mktemp("ranges") / name for name in ("cases", "results"))
    chosen = [(name, torch.float32) for name in CASES] + [(name, torch.float16) for name in HALF]
    each = {(name, dtype): ("range_attention", cast(CASES[name][0], dtype), CASES[name][1]) for name, dtype in chosen}
    torch.save(each, cases)
    subprocess.run(
        [sys.executable, INTERPRETER, cases, results, KERNELS / "range_attention.py"], check=True, timeout=300
    )
    return torch.load(results)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), *((name, torch.float16) for name in HALF)]
)
def test_equals_the_definition(found, name, dtype):
    def attend(query, key, value, first, last, queries, block, scale):
        return ranges.attend(query, key, value, first, last, scale)

    ours, (inputs, strided) = found[name, dtype], CASES[name]
    assert not isinstance(ours, str), ours
    exact = outputs_and_gradients(attend, cast(cast(inputs, dtype), torch.float64), strided)
    largest = [max(x.abs().flatten().tolist(), default=0.0) or 1.0 for x in exact]
    of_output, of_gradients = TOLERANCE[dtype]
    for a, b, size, tolerance in zip(ours, exact, largest, (of_output, *[of_gradients] * 3), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * size)


def test_a_width_without_tiles_is_refused():
    pytest.importorskip("triton")
    from mor_megatron.model.range_attention import range_attention

    inputs, _ = case(1, 1, 24, 5, (1,))
    with pytest.raises(ValueError, match="no tiles for heads of width 24: use 16, 32, 64 or 128"):
        range_attention(*inputs)


def test_no_query_is_loaded_before_it_is_known_that_there_are_some():
    """A loop's loads are issued ahead of it, and must ask whether it runs at all."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (requirements-dev.txt)")
    compiled = [sys.executable, Path(__file__).with_name("compiled.py"), KERNELS / "range_attention.py"]
    ptx = subprocess.run(compiled, check=True, timeout=300, capture_output=True, text=True).stdout
    # cp.async [to], [from], 16, bytes: none are read if `bytes` is 0.
    counts = set(re.findall(r"cp\.async\.cg.*0x10, (%r\d+);", ptx))
    assert counts
    assert not [name for name in counts if re.search(rf"mov\.b32 \s*{name}, 16;", ptx)]
