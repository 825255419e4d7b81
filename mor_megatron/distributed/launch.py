"""What a launcher says about the run: rank and number of ranks, from torchrun, deepspeed or srun.

torchrun and deepspeed set the variables that torch.distributed reads. srun has its own; they are translated. Nothing
here imports torch, so that a wrong flag can be refused without waiting for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed reads."""

_launcher: int | None = None


def adopt_srun(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add torch.distributed's variables to those of a task that srun started; leaves every other process alone.

    A task of srun has SLURM_STEP_ID and SLURM_PROCID, of which a batch script has only the second, more than one
    SLURM_NTASKS, and no RANK. Variables that are set stay as they are, so that MASTER_ADDR and MASTER_PORT can be
    chosen. The address is the first host of the step; the port follows from job and step, so that all tasks find the
    same one without talking to each other.

    Raises:
        ValueError: the host list is not understood.
    """
    is_task = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    if "RANK" in environment or not is_task or int(environment.get("SLURM_NTASKS", 1)) < 2:
        return
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    translated = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(hosts) if hosts else "127.0.0.1",
        # Above the ports of services, below those that the system gives to clients.
        "MASTER_PORT": str(10000 + (job + 7919 * step) % 20000),
    }
    for name, value in translated.items():
        environment.setdefault(name, value)


def first_host(hosts: str) -> str:
    """The first host of a Slurm host list: `gpu[07-09,12],login1` begins with `gpu07`.

    Raises:
        ValueError: the list begins with no host.
    """
    # A name is pieces of text and of bracketed numbers; of each bracket, its first number counts.
    name = re.match(r"(?:[^\[\],\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", hosts)
    if name is None:
        raise ValueError(f"the host list {hosts!r} of srun is not understood: set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", name[0])


def start_name(environment: Mapping[str, str] = os.environ) -> str:
    """What all ranks of this start have in common, and no other start has; "" where the launcher does not say enough.

    A rank that an earlier start left behind then cannot be taken for one of this start, though both use one address.
    """
    if _is_srun_rank(environment):
        return " ".join(environment.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    errors = environment.get("TORCHELASTIC_ERROR_FILE", "")
    if errors and environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
        name += f" {os.path.dirname(os.path.dirname(errors))}"  # DIR/RUN_RANDOM/attempt_N/RANK/error.json
    return name


def note_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Note which process is the launcher; call it at once, for later another one may be this one's parent.

    None is noted where this process was started by hand: its parent need not wait for its end.
    """
    global _launcher
    starters = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # torchrun's, deepspeed's
    is_known = any(name in environment for name in starters) or _is_srun_rank(environment)
    _launcher = os.getppid() if is_known else None


def has_lost_launcher() -> bool:
    """Whether the launcher has died, and left this process behind."""
    return _launcher is not None and os.getppid() != _launcher


def _is_srun_rank(environment: Mapping[str, str]) -> bool:
    """Whether rank and number of ranks are srun's, and not those of a launcher that srun started."""
    pairs = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"))
    is_step = "SLURM_STEP_ID" in environment and "TORCHELASTIC_RUN_ID" not in environment
    return is_step and all(environment.get(ours, "") == environment.get(theirs) for ours, theirs in pairs)


def launched_world_size() -> int | None:
    """Ranks of the run according to the launcher; None without one.

    Raises:
        ValueError: WORLD_SIZE is not a number of ranks.
    """
    value = os.environ.get("WORLD_SIZE")
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"WORLD_SIZE={value} in the environment is not a number of ranks: unset it or set 1 or more")
    return int(value)


def is_launched() -> bool:
    """Whether a launcher described a process group in the environment.

    Raises:
        ValueError: it did, in part.
    """
    missing = [name for name in NEEDED if name not in os.environ]
    if not missing:
        return True
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"the launcher set {', '.join(n for n in NEEDED if n in os.environ)} but not {', '.join(missing)}: "
            "start with torchrun, deepspeed or srun, or unset them for a single process"
        )
    return False
