"""Prints the PTX of range attention's kernel for gradients of keys, compiled for an H100: `compiled.py FILE`.

It needs no GPU. A process of its own: Triton decides when it is imported whether it compiles.
"""

from __future__ import annotations

import importlib.util
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("range_attention", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

kernel, tile = module._range_attention_backward_key, module.TILES[64].grad_key
sizes = {"GROUP": 1, "QUERIES": tile.queries, "KEYS": tile.keys, "WIDTH": 64}
types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(sizes, "constexpr") | {"scale": "fp32"}
types |= dict.fromkeys(("query", "key", "value", "grad", "grad_key", "grad_value"), "*bf16")
types |= {"log_sum": "*fp32", "delta": "*fp32"} | dict.fromkeys(("first", "last", "queries"), "*i32")
strides = ("_row", "_batch", "_head")
aligned = [i for i, (name, kind) in enumerate(types.items()) if "*" in kind or name.endswith(strides)]
source = ASTSource(kernel, types, sizes, {(i,): [["tt.divisibility", 16]] for i in aligned})
options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
