"""Start of a process: process groups, Megatron-core's parallel state, seeds."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mor_megatron.config.schema import Config
from mor_megatron.distributed.cpu import support_cpu
from mor_megatron.distributed.launch import is_launched, start_name
from mor_megatron.distributed.roll_call import answer_roll_calls

GRACE_SECONDS = 5.0
"""After the time in which ranks have to meet, for the library to say what is wrong."""


class RendezvousError(RuntimeError):
    """The ranks of a run did not come together."""


def initialize_distributed(config: Config) -> None:
    """Join the process group, build Megatron-core's groups for the layout of `config.parallel`, and seed.

    Rank, world size and address come from the environment of torchrun, deepspeed or srun; without one, this is a world
    of one process. From here on a rank that is lost ends the others (roll_call.py). What exists already is kept: tests
    reuse their workers, and change the layout between runs with `destroy_model_parallel` and
    `initialize_model_parallel`.

    Raises:
        ValueError: a launcher set RANK but not the rest of its variables, or nccl was asked for without CUDA.
        RendezvousError: not all ranks came within `distributed_timeout_minutes`.
    """
    support_cpu()
    _choose_kernels(config)
    if torch.cuda.is_available():
        _choose_gpu()
        _choose_stream(config)
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    joins = not dist.is_initialized() and is_launched()
    with _time_limit(timeout) if joins else contextlib.nullcontext():
        if joins:
            _join_world(config, timeout)
        elif not dist.is_initialized():
            # A store in memory: no port is taken, and child processes do not find a process group to join.
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
            dist.init_process_group(_backend(config), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        if not parallel_state.model_parallel_is_initialized():
            initialize_model_parallel(config)
    set_seed(config.training.seed)


def _choose_kernels(config: Config) -> None:
    """Set what CUDA, cuBLAS and NCCL read when they start, unless the user has; and PyTorch's choice of kernels."""
    deterministic = config.training.deterministic_mode
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # every element is written before it is read
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # workspaces that streams do not share
        os.environ.setdefault("NCCL_ALGO", "Ring")  # one order of summation
    if config.parallel.tensor_model_parallel_size > 1:
        # One queue to the GPU: an exchange starts before the product that is to hide it, in the order of the launches.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _choose_stream(config: Config) -> None:
    """Leave the default stream where a CUDA graph will be captured.

    Autograd adds a gradient on the stream on which the weight was first used. A capture may depend on any stream but
    the default one, and so a model must not have been built there.
    """
    if config.training.enable_cuda_graph and torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())


def _choose_gpu() -> None:
    """Make one of the GPUs that this process sees the current one: of all of a node, or of one (`--gpus-per-task`)."""
    index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes it for the index of the device


def _join_world(config: Config, timeout: timedelta) -> None:
    backend = _backend(config)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {start_name()}", store)
        if store.add(f"rank {rank}", 1) > 1:
            raise RendezvousError(
                f"rank {rank} is there twice at {_address()}: a process of another start uses that port, too; end it, "
                "or set another MASTER_PORT"
            )
        shared = dist.PrefixStore("world", store)
        dist.init_process_group(backend, store=shared, rank=rank, world_size=world_size, timeout=timeout)
    except RendezvousError:
        raise
    except RuntimeError as error:
        raise _not_met(timeout, str(error).strip().splitlines()[0]) from error
    if world_size > 1:
        answer_roll_calls(store, rank, world_size, config)


@contextlib.contextmanager
def _time_limit(timeout: timedelta) -> Iterator[None]:
    """End the process if the ranks take longer to meet; gloo tries five times, each until it times out, to connect."""

    def end() -> None:
        print(f"error: {_not_met(timeout, 'it still waits')}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout.total_seconds() + GRACE_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_met(timeout: timedelta, reason: str) -> RendezvousError:
    return RendezvousError(
        f"rank {os.environ['RANK']} did not meet all {os.environ['WORLD_SIZE']} ranks at {_address()} within "
        f"{timeout.total_seconds() / 60:g} minutes ({reason}): one of them is lost, cannot reach that address, or "
        "starts later than --distributed-timeout-minutes allows"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def initialize_model_parallel(config: Config) -> None:
    """Build Megatron-core's groups for the tensor- and pipeline-parallel sizes of `config.parallel`; collective.

    Ranks are numbered tensor parallel first, then data parallel, then pipeline parallel, as in Megatron-LM. The number
    of virtual stages is not given here: it is the business of the schedule, whose own configuration has it.
    """
    parallel = config.parallel
    model_parallel_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    assert dist.get_world_size() % model_parallel_size == 0, "validate the configuration with the world size"
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        # Else a rank that hangs would be waited for by Megatron-core's own half hour.
        distributed_timeout_minutes=config.training.distributed_timeout_minutes,
        # A second set of groups for checkpoints of its own optimizers, which are not used.
        create_gloo_process_groups=False,
    )


def destroy_model_parallel() -> None:
    """Take down what `initialize_model_parallel` built, connections included; collective. The world stays."""
    # Megatron-core only forgets its groups: each would keep a connection to every member.
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    dist.barrier()  # no rank may still be inside a group
    for group in groups:
        dist.destroy_process_group(group)


def abandon(status: int) -> None:
    """End this process at once where the ranks exchange by NCCL; return where they do not. For a rank that failed.

    NCCL's groups are taken down together. Others may still be inside an operation that this rank will not join, and it
    would wait for them, unseen by the launcher.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch (CPU and CUDA) alike on every rank; data order has its own pure function."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # Megatron-core's tracker of random states; without CUDA, one that tracks nothing: there is no dropout.
    on_cpu = not torch.cuda.is_available()
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=on_cpu, force_reset_rng=on_cpu)


def print_rank_0(line: str) -> None:
    """Print a line once, whatever the number of ranks."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def _backend(config: Config) -> str:
    backend = config.training.distributed_backend
    if backend == "auto":
        return "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("distributed-backend=nccl needs CUDA, and this machine has none: use auto or gloo")
    return backend
