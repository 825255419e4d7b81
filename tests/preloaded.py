"""What the server that the tests' processes are forked from has done before; see forkserver.py."""

from __future__ import annotations

import gc
import importlib
import weakref
from contextlib import suppress

import deepspeed

import mor_megatron.pretraining.pretrain  # noqa: F401
from mor_megatron.config.cli import read_config

read_config([])  # the command line's parser imports more when it is first used
_ = deepspeed.ops.__compatible_ops__  # asks compilers; its first reader would
# What building a model and an engine imports later. Other versions may not have all of it.
for name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.models.backends",
    "megatron.core.transformer.multi_token_prediction",
):
    with suppress(ImportError):
        importlib.import_module(name)
# At its exit a process would unregister torch's operators one by one, and copy the memory that says where they are.
for finalizer in list(weakref.finalize._registry):
    finalizer.atexit = False
# DeepSpeed collects garbage dozens of times for an engine, and each time would look at every object of every module.
gc.enable()
gc.collect()
gc.freeze()
