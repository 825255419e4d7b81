"""A family of isoFLOP runs: methods x sizes x seeds, each trained for several budgets of FLOPs.

A budget counts forward FLOPs as the paper does (planning/accounting.py). The learning rate is constant after warm-up
and decays over the last fifth (WSD), so runs of one model to different budgets start with the same iterations. A
*trunk* at constant rate is trained once. Where the last fifth of a budget begins, a *decay* branches off the trunk's
checkpoint. Data, optimizer and iteration count continue, so a trunk and its decay equal one WSD run, bit for bit.

    DIR/family.json                          every run, for `report`
    DIR/vanilla-360m-seed1/trunk-2e18.yaml   the trunk as far as this budget needs it; resumes the previous part
    DIR/vanilla-360m-seed1/decay-2e18.yaml   the last fifth of the run
    DIR/run.sh                               all runs, each after those that it needs
    DIR/submit.sh                            the same as Slurm jobs; a decay waits for its part of the trunk
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mor_megatron.checkpointing.directory import checkpoint_name
from mor_megatron.config.cli import read_config, save_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.files import write_whole
from mor_megatron.planning.accounting import iterations_for_budget

FAMILY = "family.json"


@dataclass(frozen=True)
class Recipe:
    """The learning-rate schedule of all members."""

    decay_fraction: float = 0.2
    """Fraction of a run over which the rate falls to min-lr."""
    warmup_fraction: float = 0.05
    """Warm-up, as a fraction of the run with the smallest budget; its iterations are the same for every budget."""


@dataclass(frozen=True)
class Run:
    """One model, one seed, one budget."""

    method: str
    size: str
    seed: int
    budget: float
    """Forward FLOPs, by the paper's accounting."""
    iterations: int
    branch: int
    """Number of iterations of the trunk before the decay."""
    directory: str
    """Directory of the model and seed: trunk, decays and their settings."""

    @property
    def label(self) -> str:
        """The budget in file names: 16.5e18 is 1.65e19."""
        return budget_label(self.budget)

    @property
    def trunk(self) -> Path:
        """--save of the trunk."""
        return Path(self.directory) / "trunk"

    @property
    def decay(self) -> Path:
        """--save of the decay."""
        return Path(self.directory) / f"decay-{self.label}"

    @property
    def configs(self) -> tuple[Path, Path]:
        """Settings of the trunk up to the branch, and of the decay."""
        return tuple(Path(self.directory) / f"{part}-{self.label}.yaml" for part in ("trunk", "decay"))


def budget_label(budget: float) -> str:
    """Format a budget: 16.5e18 is 1.65e19."""
    return f"{budget:.4g}".replace("e+", "e")


def checkpoint_of(save: str | Path, iteration: int) -> Path:
    """The directory of one checkpoint of a run."""
    return Path(save) / checkpoint_name(iteration)


def plan_family(
    directory: Path,
    methods: Sequence[Path],
    sizes: Sequence[Path],
    budgets: Sequence[float],
    seeds: Sequence[int],
    settings: Sequence[str] = (),
    recipe: Recipe | None = None,
) -> list[tuple[Run, Config, Config]]:
    """Plan every run; nothing is written.

    Args:
        directory: directory of the family.
        methods: settings files, one per method (examples/configs).
        sizes: settings files, one per size, read after the method's.
        budgets: forward FLOPs by the paper's accounting.
        seeds: seeds for weights and data order.
        settings: flags for every run; they take precedence over the files.
    Returns:
        The runs with the settings of trunk and decay, grouped by seed; for one model, in order of the budgets.
    Raises:
        ValueError: settings do not fit, or a budget is too small for the schedule; names the model and the budget.
    """
    recipe = recipe or Recipe()
    _check(methods, sizes, budgets, seeds, recipe)
    family = []
    for seed in seeds:
        for method in methods:
            for size in sizes:
                base = read_config(["--config", str(method), str(size), *settings, "--seed", str(seed)])
                where = directory / f"{method.stem}-{size.stem}-seed{seed}"
                family += _member(where, method.stem, size.stem, base, sorted(budgets), recipe)
    return family


def _member(
    directory: Path, method: str, size: str, base: Config, budgets: list[float], recipe: Recipe
) -> list[tuple[Run, Config, Config]]:
    if base.training.global_batch_size is None:
        raise ValueError(
            "global-batch-size is not set: give it, because a budget must not depend on the number of ranks"
        )
    parallel = base.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    warmup = round(recipe.warmup_fraction * iterations_for_budget(base, budgets[0]))
    member = []
    for budget in budgets:
        iterations = iterations_for_budget(base, budget)
        branch = iterations - round(recipe.decay_fraction * iterations)
        run = Run(method, size, base.training.seed, budget, iterations, branch, str(directory))
        if not warmup < branch < iterations or (member and branch <= member[-1][0].branch):
            raise ValueError(
                f"budget={budget:g} is {iterations} iterations of {method} {size}, of which warm-up takes {warmup} and "
                f"the decay {iterations - branch}: use a larger budget or a smaller --global-batch-size"
            )
        pair = _trunk(run, base, warmup), _decay(run, base, warmup)
        for config in pair:
            validate(config, ranks)
        member.append((run, *pair))
    return member


def _trunk(run: Run, base: Config, warmup: int) -> Config:
    # Only decays are evaluated: losses at constant rate are not used. keep-last would delete what they need.
    return replace(
        base,
        optimizer=replace(
            base.optimizer,
            lr_decay_style="constant",
            lr_warmup_iters=warmup,
            lr_decay_iters=None,
            lr_wsd_decay_iters=None,
            lr_wsd_decay_style="linear",
            min_lr=0.0,
        ),
        training=replace(base.training, train_iters=run.branch, eval_iters=0, eval_fixed_depths=False),
        checkpoint=replace(base.checkpoint, save=str(run.trunk), load=str(run.trunk), keep_last=None, keep_every=None),
    )


def _decay(run: Run, base: Config, warmup: int) -> Config:
    return replace(
        base,
        optimizer=replace(
            base.optimizer,
            lr_decay_style="WSD",
            lr_warmup_iters=warmup,
            lr_decay_iters=run.iterations,
            lr_wsd_decay_iters=run.iterations - run.branch,
        ),
        training=replace(base.training, train_iters=run.iterations),
        checkpoint=replace(
            base.checkpoint,
            save=str(run.decay),
            load=str(run.decay),
            branch_from=str(checkpoint_of(run.trunk, run.branch)),
        ),
    )


def write_family(directory: Path, family: Sequence[tuple[Run, Config, Config]]) -> None:
    """Write settings, run.sh, submit.sh and family.json.

    Raises:
        OSError: the directory cannot be written.
    """
    for run, trunk, decay in family:
        Path(run.directory).mkdir(parents=True, exist_ok=True)
        for config, path in zip((trunk, decay), run.configs, strict=True):
            save_config(config, path)
    runs = [run for run, *_ in family]
    write_whole(directory / "run.sh", _run_script(runs))
    write_whole(directory / "submit.sh", _submit_script(runs))
    write_whole(directory / FAMILY, json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def _run_script(runs: Iterable[Run]) -> str:
    lines = [
        "#!/bin/sh",
        "# All runs of the family, one after another, from the root of the repository. An interrupted run",
        '# continues, and a finished one ends at once. LAUNCH starts a run, such as "torchrun --nproc-per-node 8".',
        "set -e",
    ]
    for run in runs:
        lines += [f"${{LAUNCH:-python}} pretrain_mor.py --config {shlex.quote(str(path))}" for path in run.configs]
    return "\n".join(lines) + "\n"


_SUBMIT = """\
#!/bin/sh
# The family as Slurm jobs, from the root of the repository; arguments are options of tools/launch_slurm.py:
#   sh DIR/submit.sh --nodes 4 --gpus-per-node 8 --time 12:00:00
# A decay and the next part of its trunk wait for the previous part of the trunk.
set -e
submit() { # job to wait for or "", name, settings, options
    after=$1 name=$2 settings=$3
    shift 3
    line=$(python tools/launch_slurm.py --sbatch "job-name=$name" ${after:+--sbatch "dependency=afterok:$after"} "$@" \\
        -- --config "$settings")
    echo "$line"
    job=$(expr "$line" : 'job \\([0-9]*\\)') || job=  # --dry-run
}
"""


def _submit_script(runs: Iterable[Run]) -> str:
    lines, directory = [_SUBMIT], None
    for run in runs:
        before = '"$trunk"' if run.directory == directory else '""'
        directory = run.directory
        for path, after in zip(run.configs, (before, '"$trunk"'), strict=True):
            name = f"{Path(directory).name}-{path.stem}"
            lines.append(f'submit {after} {shlex.quote(name)} {shlex.quote(str(path))} "$@"')
            if path == run.configs[0]:
                lines.append("trunk=$job")
    return "\n".join(lines) + "\n"


def read_family(directory: Path) -> list[Run]:
    """Read the runs of a family.

    Raises:
        ValueError: the directory has no family file, or the file is not valid.
    """
    path = directory / FAMILY
    try:
        return [Run(**run) for run in json.loads(path.read_text())]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): write a family with `isoflops.py plan`") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not the file that `isoflops.py plan` writes: {error}") from error


def _check(methods, sizes, budgets, seeds, recipe: Recipe) -> None:
    for name, values in (("methods", methods), ("sizes", sizes)):
        stems = [path.stem for path in values]
        if len(set(stems)) < len(stems):
            raise ValueError(
                f"{name}={' '.join(map(str, values))}: two files have the same name: give each its own name"
            )
    if not all(0 < budget < float("inf") for budget in budgets) or len(set(map(budget_label, budgets))) < len(budgets):
        raise ValueError(f"budgets={' '.join(f'{b:g}' for b in budgets)} must be different numbers above 0")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={' '.join(map(str, seeds))} must be different")
    for name, value in (("decay-fraction", recipe.decay_fraction), ("warmup-fraction", recipe.warmup_fraction)):
        if not 0 <= value < 1 or (name == "decay-fraction" and value == 0):
            raise ValueError(f"{name}={value} is out of range: use a fraction of the run, such as 0.2")
