"""Ways to corrupt input, for the tests of corrupted input."""

from __future__ import annotations

import random

import pytest

COUNTS = [pytest.param(150, id="150"), pytest.param(1000, id="1000", marks=pytest.mark.slow)]


def spoil(content: bytes, random: random.Random) -> bytes:
    """Change bytes the way disks, networks and people do."""
    data = bytearray(content)
    at = random.randrange(len(data)) if data else 0
    size = random.choice([1, 1, 2, 8, 64, 4096])
    match random.randrange(7):
        case 0:
            data[at] ^= 1 << random.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at : at + size] = bytes(len(data[at : at + size]))
        case 3:
            data[at : at + size] = random.randbytes(len(data[at : at + size]))
        case 4:
            data += random.randbytes(size)
        case 5:
            del data[at : at + size]
        case 6:
            data[at:at] = data[at : at + size]
    return bytes(data)
