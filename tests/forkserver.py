"""Where the tests' processes come from: one server a test process imports everything once, and they are forks of it.

Starting a process that imports torch, Megatron-core and DeepSpeed takes longer than most tests that need one.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "DS_ACCELERATOR": "cpu"}


def fork_context() -> multiprocessing.context.ForkServerContext:
    """The context of `multiprocessing` whose processes have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paused_gc", "preloaded"])
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    with patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=path):  # the server looks for `preloaded` there
        forkserver.ensure_running()
    return context
