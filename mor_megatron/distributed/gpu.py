"""Whether a process can still use its GPU after a kernel has failed.

A kernel that fails is replaced by plain operations. After some failures, an access to memory that is not its own for
one, CUDA refuses every later call of the process: then nothing can replace it, and the run must end, naming it.
Reasoned, not run.
"""

from __future__ import annotations

import torch

LIBRARIES = "install the Triton and the CUDA libraries that this PyTorch was built for; kernels of Triton are optional"
"""What to do about a kernel that no flag avoids."""


def check_gpu(kernel: str, remedy: str) -> None:
    """Wait for what was launched, and end the run if the GPU answers no more. Where CUDA was not used, do nothing.

    Args:
        kernel: that was launched last.
        remedy: how to run without it.
    Raises:
        ValueError: the process cannot use the GPU any more.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{kernel} has crashed the GPU for this process ({reason}): {remedy}") from error
