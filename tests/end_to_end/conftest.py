import pytest
from small_runs import write_corpus
from worker_pool import release_engines


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(autouse=True)
def engines_end_with_their_test():
    yield
    release_engines()
