"""Submit a pretraining run to Slurm: check its layout, fill in examples/slurm/pretrain.sbatch, keep a copy.

python tools/launch_slurm.py --nodes 4 --gpus-per-node 8 --time 24:00:00 --account lab -- \\
    --config examples/configs/mor_expert_nr2.yaml examples/configs/1.7b.yaml --data-path PREFIX --save runs/1.7b

Arguments after -- are for pretrain_mor.py. See docs/slurm.md.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mor_megatron.command import exit_status
from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.corpora import read_blends
from mor_megatron.files import write_whole
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.planning.report import dry_run

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "examples" / "slurm" / "pretrain.sbatch"
DIRECTIVE = "#SBATCH --"


class SubmissionError(ValueError):
    """sbatch refused the job."""


def fill(template: str, directives: Mapping[str, str | None], before: Sequence[str]) -> str:
    """A batch script with other directives, and with lines in front of its body.

    Args:
        template: a batch script.
        directives: options of sbatch by their long name; "" for one without a value, None to leave it out. Other
            options of the template are kept.
        before: lines of shell.
    Raises:
        ValueError: a value cannot be written in a directive.
    """
    lines = template.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith(DIRECTIVE)]
    given = dict(lines[place].removeprefix(DIRECTIVE).partition("=")[::2] for place in places)
    header = [_directive(name, value) for name, value in {**given, **directives}.items() if value is not None]
    return "\n".join([*lines[: places[0]], *header, "", *before, *lines[places[-1] + 1 :]]) + "\n"


def job_script(args: argparse.Namespace, arguments: Sequence[str], config: Config) -> str:
    """The batch script of a run.

    Args:
        args: this program's options.
        arguments: of pretrain_mor.py.
        config: the settings that these arguments give; `save` is set.
    Raises:
        ValueError: an option cannot be written into a batch script.
    """
    save = config.checkpoint.save
    directives = {
        "job-name": Path(save).resolve().name,
        "nodes": str(args.nodes),
        "ntasks-per-node": str(_tasks_per_node(args)),
        "gpus-per-node": str(args.gpus_per_node) if args.gpus_per_node else None,
        "cpus-per-task": str(args.cpus_per_task),
        "time": args.time,
        "output": str(Path(save).resolve() / "slurm-%j.out"),
        "chdir": str(ROOT),
    }
    directives |= {name: value for name in ("account", "partition") if (value := getattr(args, name))}
    directives |= {name: value for name, _, value in (option.partition("=") for option in args.sbatch)}
    # The job looks for the directory among its arguments; until here it may be set in a file.
    saves = [] if any(word == "--save" or word.startswith("--save=") for word in arguments) else ["--save", save]
    before = [f"export SRUN_OPTIONS={shlex.quote(' '.join(_container(args)))}"] if args.container_image else []
    return fill(TEMPLATE.read_text(), directives, [*before, f"set -- {shlex.join([*arguments, *saves])}"])


def require_corpora(config: Config) -> None:
    """Check that the corpora exist; otherwise the job would wait in the queue and then fail.

    Raises:
        ValueError: no corpus is given, or one does not exist.
    """
    prefixes = dict.fromkeys(path for blend in read_blends(config.data) if blend for path in blend.paths)
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise ValueError(
                    f"data-path={prefix}: {prefix}{suffix} does not exist: correct the path, or make the corpus with "
                    "tools/preprocess_data.py"
                )


def submit(script: str, save: Path) -> tuple[str, Path]:
    """Submit a script with sbatch.

    Returns:
        The job's number and the script's copy in `save`.
    Raises:
        SubmissionError: sbatch refuses the script, or is not installed.
        OSError: the copy cannot be written.
    """
    save.mkdir(parents=True, exist_ok=True)
    copy = save / "job.sbatch"
    write_whole(copy, script)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(copy)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SubmissionError("sbatch is not on the PATH: submit where Slurm is, or use --dry-run") from None
    if done.returncode:
        raise SubmissionError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]  # number;cluster
    return job, copy.rename(save / f"job-{job}.sbatch")


def launch(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Check, fill in, and print or submit.

    Raises:
        ValueError: the settings do not fit the number of ranks, tokenizer or corpora are missing (files in a
            container are not checked), or sbatch refuses the job.
    """
    if Path.cwd() != ROOT:
        raise ValueError(f"the job runs in {ROOT}, and paths are relative to it: run this program there")
    config = read_config(arguments)
    if config.checkpoint.save is None:
        raise ValueError("save=None leaves nothing to continue from after the time limit: give --save DIR")
    _require_one_at_a_time(args.sbatch, config.checkpoint.save)
    _show_layout(config, args.nodes * _tasks_per_node(args), bool(args.container_image))
    script = job_script(args, arguments, config)
    try:
        if not args.container_image:
            require_corpora(config)
    except ValueError as error:
        if not args.dry_run:
            raise
        print(f"warning: {error}", file=sys.stderr)
    if args.dry_run:
        print(script, end="")
        return
    job, copy = submit(script, Path(config.checkpoint.save))
    print(f"job {job}: output in {copy.parent}/slurm-{job}.out, script in {copy}")


def _show_layout(config: Config, ranks: int, in_container: bool) -> None:
    try:
        print(dry_run(config, ranks, teacher_settings), file=sys.stderr)
    except ValueError as error:
        if not in_container:
            raise
        validate(config, ranks)  # raises again what is not about files
        print(f"warning: the layout is not shown, because a file may be in the container: {error}", file=sys.stderr)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's options, and the arguments of pretrain_mor.py."""
    argv = list(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=_positive, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0: a run on CPUs (default: 8)")
    parser.add_argument("--tasks-per-node", type=_positive, help="ranks per node (default: one per GPU)")
    parser.add_argument("--cpus-per-task", type=_positive, default=8, help="CPUs per rank (default: 8)")
    parser.add_argument("--time", default="24:00:00", help="time limit in sbatch's format (default: 24:00:00)")
    parser.add_argument("--account")
    parser.add_argument("--partition")
    parser.add_argument("--container-image", help="run the ranks in this image (pyxis)")
    parser.add_argument("--container-mounts", help="SRC:DST[,SRC:DST...]; the repository is always mounted")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME[=VALUE]", help="any other option of sbatch; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and the layout (on stderr) instead")
    args, unknown = parser.parse_known_args(argv[:place])
    if unknown:
        parser.error(f"{' '.join(unknown)}: not options of this program; arguments of pretrain_mor.py follow --")
    if args.gpus_per_node < 0:
        parser.error("--gpus-per-node must be 0 or more")
    if not args.gpus_per_node and args.tasks_per_node is None:
        parser.error("--gpus-per-node 0 does not set the number of ranks: give --tasks-per-node")
    if args.container_mounts and not args.container_image:
        parser.error("--container-mounts is read only with --container-image")
    if place == len(argv):
        parser.error("no arguments of pretrain_mor.py: give them after --")
    return args, argv[place + 1 :]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not an integer of 1 or more")
    return int(text)


def _tasks_per_node(args: argparse.Namespace) -> int:
    return args.tasks_per_node or args.gpus_per_node


def _require_one_at_a_time(options: Sequence[str], save: str) -> None:
    tasks, _, at_once = dict(option.partition("=")[::2] for option in options).get("array", "%1").partition("%")
    if at_once != "1":
        raise ValueError(
            f"array={tasks} runs several jobs at once in one save={save}: launch each with its own directory, or let "
            f"them run one at a time with array={tasks}%1"
        )


def _directive(name: str, value: str) -> str:
    if '"' in value or "\n" in value:
        raise ValueError(f"{name}={value!r} cannot be written in a batch script: use a value without quotes")
    shown = f'"{value}"' if any(character.isspace() for character in value) else value
    return f"{DIRECTIVE}{name}{'=' if value else ''}{shown}"


def _container(args: argparse.Namespace) -> list[str]:
    """Options of srun for pyxis. The repository is mounted and is the working directory, as without a container."""
    mounts = ",".join(filter(None, [f"{ROOT}:{ROOT}", args.container_mounts]))
    options = [
        f"--container-image={args.container_image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={ROOT}",
    ]
    for option in options:
        if any(character.isspace() for character in option):
            raise ValueError(f"{option} contains a blank, which separates options of srun: use a path without one")
    return options


def main() -> int:
    """Exit status 0: submitted; 1: sbatch refuses the job; 2: the settings do not fit."""
    return exit_status(lambda: launch(*parse(sys.argv[1:])), failures=(SubmissionError,))


if __name__ == "__main__":
    sys.exit(main())
