"""What the server that the tests' processes are forked from has done before; see forkserver.py."""

from __future__ import annotations

import gc

import deepspeed

import mor_megatron.pretraining.pretrain  # noqa: F401
from mor_megatron.config.cli import read_config

read_config([])  # the command line's parser imports more when it is first used
_ = deepspeed.ops.__compatible_ops__  # asks compilers; its first reader would
# DeepSpeed collects garbage dozens of times for an engine, and each time would look at every object of every module.
gc.collect()
gc.freeze()
