import sys
from pathlib import Path

import pytest
from worker_pool import release_engines

sys.path.append(str(Path(__file__).parents[1] / "model"))


@pytest.fixture(autouse=True)
def engines_end_with_their_test():
    yield
    release_engines()
