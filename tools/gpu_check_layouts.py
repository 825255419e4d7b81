"""One rank of the stage `layouts` of `gpu_check.py`; rank 0 prints a row of JSON for each model.

torchrun --nproc-per-node 4 tools/gpu_check_layouts.py LAYOUT RESULTS MODEL ...
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed"), str(ROOT / "tests")]

from layout_runs import FP32_LAYOUT_TOL, differences, train  # noqa: E402
from table import LAYOUTS, build_config  # noqa: E402

CUDA_LAYOUT_TOL = 1e-4
"""As `FP32_LAYOUT_TOL`, for products whose kernels sum in another order when their shape changes."""


def main() -> int:
    """Train each model in the layout, and compare it with what one process left in RESULTS."""
    warnings.filterwarnings("ignore")
    name, results, *models = sys.argv[1:]
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    tolerance = CUDA_LAYOUT_TOL if torch.cuda.is_available() else FP32_LAYOUT_TOL
    for model in models:
        got = train(build_config(model, layout))
        if dist.get_rank() == 0:
            expected = pickle.loads(Path(results, f"{model}-{layout.global_batch}.pickle").read_bytes())
            what, error = max(differences(got, expected, tolerance=-1.0), key=lambda difference: difference[1])
            row = {"layout": name, "model": model, "loss": got.reports[-1].lm_loss, "largest difference": error}
            print(json.dumps(row | {"of": what, "limit": tolerance, "failed": not error <= tolerance}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
