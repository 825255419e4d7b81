"""What the benchmarks say of the processor."""

import re

import torch
from processor import VECTORS, copy_bandwidth, processor


def test_names_vector_flags_and_copy_bandwidth():
    flags, used, copies = re.fullmatch(r".+ \((.+), (.+), (.+)\)", processor()).groups()
    assert flags == "no vector flags" or set(flags.split()) <= set(VECTORS)
    assert used == f"PyTorch {torch.backends.cpu.get_cpu_capability()}"
    assert re.fullmatch(r"copies [\d.]+ GB/s", copies)
    assert copy_bandwidth(2**20, rounds=1) > 0
