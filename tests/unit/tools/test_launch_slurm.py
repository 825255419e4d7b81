"""Batch scripts for Slurm: what is filled in, what is refused, and that the files agree with each other."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import CheckpointConfig

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "examples" / "slurm"
TEMPLATES = sorted(SLURM.glob("*.sbatch"))
UPTRAINING = ROOT / "examples" / "uptraining" / "uptrain.sh"
MODEL = "--config examples/configs/mor_expert_nr3.yaml examples/configs/tiny.yaml --vocab-size 64 --data-path data/docs"


spec = importlib.util.spec_from_file_location("launch_slurm", ROOT / "tools" / "launch_slurm.py")
launch_slurm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch_slurm)


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


@pytest.fixture
def launch(capsys, monkeypatch):
    """The program's main, in the root of the repository."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["launch_slurm.py", *arguments])
        try:
            status = launch_slurm.main()
        except SystemExit as stop:  # argparse
            status = stop.code
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def corpus(tmp_path):
    """Prefix of files that are there, and of nothing else; beside them half a corpus."""
    for name in ("docs.idx", "docs.bin", "half.idx"):
        (tmp_path / name).touch()
    return tmp_path / "docs"


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def body(script: str) -> str:
    """What bash executes of a batch script that has directives."""
    return script[script.index("\n", script.rindex("#SBATCH")) :]


def test_the_template_is_filled_in_and_its_body_kept(launch, tmp_path):
    options = "--nodes 2 --gpus-per-node 2 --time 1:00:00 --account lab --sbatch qos=high --sbatch exclusive"
    batch = [*MODEL.split(), "--global-batch-size", "16"]
    ran = launch(*options.split(), "--dry-run", "--", *batch, "--save", f"{tmp_path}/a run")
    assert ran.status == 0, ran.err
    assert "layout: 4 ranks = TP 1 x PP 1 x DP 4" in ran.err
    assert "warning: data-path=data/docs: data/docs.idx does not exist" in ran.err, "a dry run may come first"
    template = (SLURM / "pretrain.sbatch").read_text()
    assert directives(ran.out) == directives(template) | {
        "job-name": '"a run"',
        "nodes": "2",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "time": "1:00:00",
        "account": "lab",
        "qos": "high",
        "exclusive": "",
        "output": f'"{tmp_path}/a run/slurm-%j.out"',
        "chdir": str(ROOT),
    }
    assert ran.out.endswith(body(template))
    (arguments,) = re.findall(r"^set -- (.*)$", ran.out, re.MULTILINE)
    assert shlex.split(arguments) == [*batch, "--save", f"{tmp_path}/a run"]
    assert not (tmp_path / "a run").exists(), "--dry-run leaves nothing behind"


def test_a_run_on_cpus_in_a_container_that_is_named_in_a_file(launch, tmp_path):
    (tmp_path / "run.yaml").write_text(f"save: {tmp_path}/run\nvocab-size: 64\n")
    options = "--gpus-per-node 0 --tasks-per-node 2 --container-image img.sqsh --container-mounts /data:/data --dry-run"
    ran = launch(*options.split(), "--", "--config", f"{tmp_path}/run.yaml")
    assert ran.status == 0, ran.err
    assert "gpus-per-node" not in directives(ran.out)
    assert f"set -- --config {tmp_path}/run.yaml --save {tmp_path}/run\n" in ran.out
    mounts = f"--container-mounts={ROOT}:{ROOT},/data:/data --container-workdir={ROOT}"
    assert f"export SRUN_OPTIONS='--container-image=img.sqsh {mounts}'\n" in ran.out


@pytest.mark.parametrize(
    "flags",
    [
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model /only/inside/tok.model",
        "--vocab-size 64 --distill-from /only/inside/teacher",
    ],
    ids=["tokenizer", "teacher"],
)
def test_files_in_a_container_are_not_checked(launch, tmp_path, flags):
    words = f"--gpus-per-node 2 --container-image img.sqsh --dry-run -- {flags} --save {tmp_path}/run"
    ran = launch(*words.split())
    assert ran.status == 0, ran.err
    assert re.search("^warning: the layout is not shown, .* in the container: .*/only/inside/", ran.err, re.MULTILINE)
    ran = launch(*words.split(), "--micro-batch-size", "0")
    assert ran.status == 2
    assert "micro-batch-size=0 is out of range" in ran.err


REFUSALS = {
    "layout": (f"--nodes 3 -- {MODEL} --save x", "global-batch-size=8 is not a multiple of micro-batch-size=4 x 24"),
    "tensor parallel": (f"-- {MODEL} --save x --tensor-model-parallel-size 8", "does not divide num-attention-heads=4"),
    "no save": (f"-- {MODEL}", "save=None leaves nothing to continue from"),
    "unknown flag": (f"-- {MODEL} --svae x", "unknown setting svae"),
    "no ranks": (f"--gpus-per-node 0 -- {MODEL} --save x", "give --tasks-per-node"),
    "no nodes": (f"--nodes 0 -- {MODEL} --save x", "0 is not an integer of 1 or more"),
    "nothing to run": ("--nodes 1", "give them after --"),
    "no --": (f"--nodes 1 {MODEL} --save x", "arguments of pretrain_mor.py follow --"),
    "quotes": (f'--gpus-per-node 2 --sbatch comment="a" -- {MODEL} --save x', "use a value without quotes"),
    "blank": (f"--gpus-per-node 2 --container-image my\\ image -- {MODEL} --save x", "use a path without one"),
    "no corpus": (f"--gpus-per-node 2 -- {MODEL} --save x", "data-path=data/docs: data/docs.idx does not exist"),
    "no data": ("--gpus-per-node 2 -- --vocab-size 64 --save x", "data-path is empty: give the prefix of a corpus"),
    "half a corpus": (
        "--gpus-per-node 2 -- --vocab-size 64 --data-path 1 {tmp}/half --save x",
        "half.bin does not exist",
    ),
    "no validation corpus": (
        "--gpus-per-node 2 -- --train-data-path {tmp}/docs --valid-data-path {tmp}/none --vocab-size 64 --save x",
        "none.idx does not exist: correct the path",
    ),
    "no tokenizer": (
        "--gpus-per-node 2 -- --data-path {tmp}/docs --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp}/tok "
        "--vocab-size 64 --save x",
        "tok does not exist: give a local file or directory",
    ),
    "array": (f"--sbatch array=0-3 -- {MODEL} --save x", "array=0-3 runs several jobs at once in one save=x"),
    "mounts alone": (f"--container-mounts /a:/a -- {MODEL} --save x", "only with --container-image"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(launch, arguments, message, corpus):
    words = shlex.split(arguments.replace('"', '\\"').replace("{tmp}", str(corpus.parent)))
    ran = launch(*words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err.splitlines()[-1]


def test_only_in_the_root_and_only_where_slurm_is(launch, tmp_path, monkeypatch, corpus):
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = launch("--gpus-per-node", "2", "--", *MODEL.split(), "--data-path", str(corpus), "--save", f"{tmp_path}/run")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.splitlines()[-1].startswith("error: sbatch is not on the PATH")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"the job runs in {ROOT}, and paths are relative to it: run this program there"
    ):
        launch_slurm.launch(*launch_slurm.parse(["--", *MODEL.split(), "--save", "x"]))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_job_can_come_back_and_training_stop_in_time(template):
    given = directives(template.read_text())
    assert given["open-mode"] == "append"
    assert given["output"] == "slurm-%x-%j.out"
    assert given["requeue"] == ""
    if "pretrain" in template.name:
        assert re.fullmatch(r"USR1@\d+", given["signal"]), "to the tasks, not to the shell"
        assert "pretrain.sbatch" in (template.name, body(template.read_text()).split()[1].rpartition("/")[2])


@pytest.mark.parametrize("own", ["", "PYTORCH_CUDA_ALLOC_CONF=backend:native", "PYTORCH_ALLOC_CONF=backend:native"])
def test_jobs_have_an_allocator_that_leaves_no_gaps_unless_told_otherwise(own):
    script = "scontrol() { echo node0; }; source examples/slurm/environment.sh; echo $PYTORCH_ALLOC_CONF"
    command = ["env", "-u", "PYTORCH_ALLOC_CONF", "-u", "PYTORCH_CUDA_ALLOC_CONF", *own.split(), "bash", "-c", script]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told == (f"{own.partition('=')[2]}\n" if own else "expandable_segments:True\n")


def test_exit_codes_are_the_programs():
    from mor_megatron.pretraining.stopping import EXIT_STOPPED

    (code,) = re.findall(r"^EXIT_STOPPED=(\d+)", (SLURM / "pretrain.sbatch").read_text(), re.MULTILINE)
    assert int(code) == EXIT_STOPPED


def test_a_later_start_loads_all_of_the_runs_own_newest_checkpoint():
    first = "--load other --finetune --ckpt-step 3 --no-load-optim --no-load-rng --save run"
    (added,) = re.findall(r'set -- "\$@" (--load.*)', (SLURM / "pretrain.sbatch").read_text())
    later = read_config(shlex.split(f"{first} {added}".replace("$save", "run")))
    assert later.checkpoint == CheckpointConfig(save="run", load="run")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    files = [str(path) for path in [*TEMPLATES, SLURM / "laptop_cluster.sh", UPTRAINING]]
    ran = subprocess.run(["shellcheck", "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
