"""CUDA graphs of the functions of `lanes.py`, made when an engine starts."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from mor_megatron.distributed.gpu import check_gpu
from mor_megatron.huggingface.attention_mor import Pair
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.serving.kernel import DeviceKernels
from mor_megatron.serving.lanes import Lanes
from mor_megatron.serving.pages import Store

logger = logging.getLogger(__name__)


@torch.inference_mode()
def build_lanes(
    model: MoRForCausalLM, store: Store, rotation: Pair, count: int, kernels: DeviceKernels, enforce_eager: bool
) -> Lanes | None:
    """Lanes for sequences that decode; as CUDA graphs, if the device has them and the routing method can be captured.

    Args:
        count: lanes.
        enforce_eager: launch kernels one by one.
    Returns:
        None: the routing method, from an extension, does not run on rows of several recursions.
    Raises:
        ValueError: a kernel has crashed the GPU.
    """
    options = (model.config.depth, model.config.router_threshold)
    try:
        lanes = Lanes(model, store, rotation, count, options, kernels)
        lanes.prepare(lambda function: function)
    except (RuntimeError, ValueError, TypeError) as error:
        logger.warning(f"no lanes for routing={model.model.router.name}, so its sequences decode more slowly: {error}")
        lanes = None
    check_gpu("a kernel of the engine", "use attention=torch")
    if lanes is not None and model.device.type == "cuda" and not enforce_eager:
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        try:
            lanes.prepare(lambda function: captured(function, pool, stream))
            lanes.is_captured = True
        except RuntimeError as error:
            logger.warning(f"no CUDA graphs for routing={model.model.router.name}: {error}")
            check_gpu("a CUDA graph", "use enforce_eager")
            lanes.prepare(lambda function: function)
    return lanes


def captured(function: Callable[[], Tensor], pool: tuple, stream: torch.cuda.Stream) -> Callable[[], Tensor]:
    """A function that replays what `function` does, on the same memory.

    Args:
        pool: memory of all graphs; their replays follow each other.
        stream: any but the default one, which cannot be captured.
    """
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function()  # kernels are compiled and chosen
        stream.synchronize()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
