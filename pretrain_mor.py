"""Pretrain a Mixture-of-Recursions language model.

python pretrain_mor.py --config examples/configs/tiny.yaml --data-path PREFIX ...
torchrun --nproc-per-node 2 pretrain_mor.py ...
deepspeed --num_gpus 2 pretrain_mor.py ...
srun --ntasks 16 python pretrain_mor.py ...
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from functools import partial

from mor_megatron.config.cli import parse_config
from mor_megatron.distributed.launch import adopt_srun, launched_world_size, note_launcher
from mor_megatron.distributed.libraries import set_broken_aside
from mor_megatron.files import Unfailing
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.planning.report import dry_run


def main() -> int:
    """Exit status 0: trained; 1: failed; 2: settings, data or checkpoint do not fit; 85: stopped early, run again."""
    adopt_srun()
    note_launcher()
    config = parse_config(None, launched_world_size, partial(dry_run, read_teacher=teacher_settings))
    set_broken_aside()
    # Imported after the flags are parsed: --help and a wrong flag should not wait for Megatron-core and DeepSpeed. What
    # modules make stays: looking for garbage in it would take a fifth of the time now, and again for each engine.
    gc.disable()
    import torch.distributed as dist

    from mor_megatron.distributed.initialize import abandon
    from mor_megatron.pretraining.pretrain import pretrain
    from mor_megatron.pretraining.stopping import EXIT_STOPPED

    gc.enable()
    gc.freeze()
    try:
        finished = pretrain(config)
        return 0 if finished else EXIT_STOPPED
    except Exception as error:
        status = report(error)
        abandon(status)
        return status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def report(error: Exception) -> int:
    """Say what ended the run, in one line if it is known what it means; the exit status.

    Does not return after a failed exchange between ranks: then the roll is called.
    """
    from mor_megatron.checkpointing.save import SaveError
    from mor_megatron.distributed.consistency import RoutingMismatchError
    from mor_megatron.distributed.initialize import RendezvousError
    from mor_megatron.distributed.roll_call import hold_roll_call
    from mor_megatron.pretraining.loop import NonFiniteError

    if isinstance(error, (ValueError, NonFiniteError, SaveError)):  # on every rank
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    if isinstance(error, (RoutingMismatchError, RendezvousError)):  # not on every: each that knows the error prints it
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    hold_roll_call(error)
    traceback.print_exception(error)
    return 1


if __name__ == "__main__":
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    sys.exit(main())
