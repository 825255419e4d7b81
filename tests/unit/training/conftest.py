import pytest
from worker_pool import release_engines


@pytest.fixture(autouse=True)
def engines_end_with_their_test():
    yield
    release_engines()
