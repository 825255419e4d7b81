"""Fixtures for all tests: one process group per test process, made once."""

from __future__ import annotations

import gc
import os

# Before torch is imported: tests share the cores with each other and with the ranks they start, and two threads that
# wait for one core are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from one_event_loop import share_event_loop
from worker_pool import WorkerPool

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # compiling costs more than any test runs
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def process_group():
    """A world of one process with Megatron-core's parallel state."""
    from mor_megatron.config.schema import Config
    from mor_megatron.distributed.initialize import initialize_distributed

    share_event_loop()
    initialize_distributed(Config())


@pytest.fixture(scope="session")
def workers():
    """Four processes for layouts of several ranks."""
    pool = WorkerPool(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def lone_worker():
    """One process for what layouts are compared with, so that it need not leave their groups."""
    pool = WorkerPool(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def modules_of_exports(tmp_path_factory):
    """Code that travels with an export is copied here and imported from here: one place a process, as a package has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each directory of tests stays in one process and in order: its tests share workers and runs."""
    from xdist.scheduler import LoadScopeScheduling

    class ByDirectory(LoadScopeScheduling):  # --dist loadgroup does not see marks with pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0].rpartition("/")[0]

    return ByDirectory(config, log)


def pytest_configure():
    """Modules are imported without collecting garbage, which would take a fifth of the time."""
    gc.disable()


def pytest_collection_finish():
    """Everything is imported. DeepSpeed collects garbage dozens of times an engine: not among objects of modules."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--reference-dir",
        default=os.path.join(os.path.dirname(__file__), "reference", "data"),
        help="directory of safetensors cases run with the authors' implementation",
    )
