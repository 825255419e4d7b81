"""The ranks of `test_two_ranks.py`: two data-parallel ranks do all the work once, and write the results to files.

Usage: two_ranks_worker.py CORPUS OUTPUT_DIRECTORY
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from small_runs import MODES, RESUMED, mode_name, small_config

from mor_megatron.config.validate import validate
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.pretraining.batches import build_data
from mor_megatron.pretraining.loop import NonFiniteError, train
from mor_megatron.pretraining.pretrain import pretrain
from mor_megatron.pretraining.stopping import Stopper
from mor_megatron.training.engine import build_engine
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import train_step

config_of = partial(small_config, micro_batch_size=2)
"""Two micro-batches a rank."""


def resume(corpus: str, output: Path, mode) -> None:
    whole, parts = (str(output / f"{mode_name(mode)}-{name}") for name in ("whole", "parts"))
    for save, load, end in ((whole, None, 10), (parts, parts, 5), (parts, parts, 10)):
        intervals = {"save_interval": 5, "eval_interval": 5}
        pretrain(config_of(corpus, mode=mode, save=save, load=load, train_iters=end, **intervals))


def fault(corpus: str, mode, values: tuple[float, float]) -> list[dict]:
    """One element of rank r's gradient becomes values[r] (0: stays) in the second of three iterations."""
    config = validate(config_of(corpus, mode=mode, eval_iters=0), 2)
    batches = build_data(config, None).training(Progress())
    engine = build_engine(build_model(config), config)
    engine.module.train()
    train_step(engine, batches, config, 1, 0.01)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    value = values[dist.get_rank()]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, 0] = value
        return gradient

    # The first layer runs once a micro-batch; a hook on a tied weight sees each of its uses in some modes.
    hook = engine.module.layers[0].mlp.linear_fc1.weight.register_hook(spoil) if value else None
    report = train_step(engine, batches, config, 2, 0.01)
    if hook is not None:
        hook.remove()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    after = train_step(engine, batches, config, 3, 0.01)
    checksum = sum(parameter.detach().double().sum() for parameter in engine.module.parameters())
    result = {
        "applied": report.applied,
        "faulty_ranks": list(report.faulty_ranks),
        "unchanged": unchanged,
        "then_applied": after.applied,
        "checksum": checksum.item(),
    }
    results = [None, None]
    dist.all_gather_object(results, result)
    return results


def give_up(corpus: str) -> str:
    """Rank 1 is broken in every iteration: what the error says."""
    config = validate(config_of(corpus, eval_iters=0, max_skipped_steps=2), 2)
    engine = build_engine(build_model(config), config)
    if dist.get_rank() == 1:
        engine.module.register_forward_hook(lambda module, args, losses: losses * math.nan)
    try:
        train(engine, config, Progress(), build_data(config, None), Stopper(config.faults))
    except NonFiniteError as error:
        return str(error)
    return "no error"


def main() -> int:
    corpus, output = sys.argv[1], Path(sys.argv[2])
    initialize_distributed(config_of(corpus))
    for mode in RESUMED:
        resume(corpus, output, mode)
    for zero in (0, 1):
        save = str(output / f"sgd-zero{zero}")
        pretrain(config_of(corpus, mode=(False, zero), save=save, optimizer="sgd", train_iters=8))
    results = {
        # Two micro-batches of this still fit into fp32, four do not.
        "faults": {
            mode_name(mode): {
                "nan on rank 1": fault(corpus, mode, (0.0, math.nan)),
                "overflow of the sum": fault(corpus, mode, (1.2e38, 1.2e38)),
            }
            for mode in MODES
        },
        "give up": give_up(corpus),
    }
    if dist.get_rank() == 0:
        (output / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
