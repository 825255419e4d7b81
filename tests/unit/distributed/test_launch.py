"""srun's variables become torch.distributed's, and only for tasks of srun."""

from __future__ import annotations

import pytest

from mor_megatron.distributed import launch
from mor_megatron.distributed.launch import adopt_srun, first_host, is_launched, launched_world_size, start_name

TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "HOME": "/root"}
TASK |= {"SLURM_JOB_ID": "4321", "SLURM_STEP_ID": "0"}


def test_a_task_of_srun_knows_its_rank():
    environment = TASK | {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[01-08]"}
    adopt_srun(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
    }
    assert environment["HOME"] == "/root"


def test_all_tasks_of_a_step_find_the_same_port_and_steps_differ():
    def port(rank: str, step: str) -> int:
        environment = TASK | {"SLURM_PROCID": rank, "SLURM_STEP_ID": step}
        adopt_srun(environment)
        return int(environment["MASTER_PORT"])

    assert port("0", "0") == port("7", "0") != port("0", "1")
    assert all(10000 <= port("0", str(step)) < 30000 for step in range(50))


def test_what_is_set_stays():
    environment = TASK | {"MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_JOB_NODELIST": "gpu1"}
    adopt_srun(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # a shell of salloc
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"},  # a batch script
        TASK | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        TASK | {"RANK": "3", "WORLD_SIZE": "4"},  # torchrun, started by srun
    ],
    ids=["nothing", "salloc", "batch script", "one task", "torchrun"],
)
def test_other_processes_are_left_alone(environment):
    before = dict(environment)
    adopt_srun(environment)
    assert environment == before


HOSTS = {
    "login1": "login1",
    "node3,node5": "node3",
    "gpu[07-09,12],login1": "gpu07",
    "gpu[3,5]": "gpu3",
    "rack[1-2]-node[10-12].cluster": "rack1-node10.cluster",
    "a-b-01.example.org,a-b-02.example.org": "a-b-01.example.org",
}


@pytest.mark.parametrize(("hosts", "first"), HOSTS.items(), ids=HOSTS)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize("hosts", ["gpu[", "gpu[a-b]", ",gpu1", "gpu[1-2", ""])
def test_a_host_list_that_is_not_understood(hosts):
    with pytest.raises(ValueError, match=r"host list .* not understood: set MASTER_ADDR"):
        first_host(hosts)


def test_half_a_launcher_is_an_error(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="set RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun"):
        is_launched()


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_world_size_that_is_none(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ValueError, match=f"WORLD_SIZE={value} .*unset it or set 1 or more"):
        launched_world_size()


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def torchrun(start: str, attempt: int, rank: int) -> dict[str, str]:
    errors = f"/tmp/torchelastic_{start}/none_{start}/attempt_{attempt}/{rank}/error.json"
    return TORCHRUN | {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": errors}


def test_ranks_of_one_start_have_one_name_and_those_of_others_another():
    def srun(rank: int, **more: str) -> dict[str, str]:
        environment = TASK | {"SLURM_PROCID": str(rank)} | more
        adopt_srun(environment)
        return environment

    starts = [
        [srun(0), srun(7)],
        [srun(0, SLURM_STEP_ID="1")],
        [srun(0, SLURM_RESTART_COUNT="1")],
        [torchrun("a", 0, 0), torchrun("a", 0, 1)],
        [torchrun("a", 1, 0)],
        [torchrun("b", 0, 0)],
        # Nodes have directories of their own, and may have restarted their ranks as often as others or not.
        [torchrun("a", 0, 0) | {"WORLD_SIZE": "4"}, torchrun("c", 1, 2) | {"WORLD_SIZE": "4"}],
        [torchrun("a", 0, 0) | {"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "job7"}],
        [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_JOB_ID": "1"}],
    ]
    names = [{start_name(environment) for environment in ranks} for ranks in starts]
    assert [len(each) for each in names] == [1] * len(starts)
    assert len(set.union(*names)) == len(starts)
    assert names[-1] == {""}


def test_a_launcher_that_dies_is_missed_and_a_shell_is_not(monkeypatch):
    deepspeed = {"RANK": "0", "WORLD_SIZE": "2", "CROSS_RANK": "0"}
    task = dict(TASK)
    adopt_srun(task)
    for environment, is_missed in ((TORCHRUN, True), (deepspeed, True), (task, True), ({"RANK": "0"}, False)):
        launch.note_launcher(environment)
        assert not launch.has_lost_launcher()
        with monkeypatch.context() as patch:
            patch.setattr(launch.os, "getppid", lambda: 1)
            assert launch.has_lost_launcher() == is_missed
    launch.note_launcher({})
