"""Tasks of srun and mpirun: who they are, where they meet, and who is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.processes.launchers import PORTS, find_task, first_of, join_variables
from tests.faults import one_line

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": number for name, number in zip(
    ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "3414", strict=True)}  # fmt: skip
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def joined(variables: dict[str, str]) -> dict[str, str]:
    task = find_task(variables)
    assert task is not None
    return join_variables(task, variables)


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_a_task_of_srun_meets_the_others_on_the_first_host():
    found = joined(SLURM)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node03",
    }
    assert port in PORTS
    for other in ({"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}):  # another run on the same host
        assert joined(SLURM | other)["MASTER_PORT"] != str(port)
    assert joined(SLURM | {"SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)


def test_on_one_host_no_name_is_needed():
    assert joined(SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": ""})["MASTER_ADDR"] == "127.0.0.1"
    found = joined(OPEN_MPI)
    assert (found["RANK"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("3", "1", "127.0.0.1")
    unnumbered = {name: PMI[name] for name in ("PMI_RANK", "PMI_SIZE")} | {"MPI_LOCALNRANKS": "4"}
    assert joined(unnumbered)["LOCAL_RANK"] == "3"


def test_what_the_user_gives_holds():
    found = joined(SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "1234")
    assert joined(PMI | {"MASTER_ADDR": "node7"})["MASTER_ADDR"] == "node7"


@pytest.mark.parametrize(
    ("variables", "lacking"),
    [
        (PMI, "the first host's name"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "the first host's name"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MASTER_ADDR": "node7"}, "a process's number among those of its host"),
        ({key: SLURM[key] for key in SLURM if key != "SLURM_LOCALID"}, "a process's number among those of its host"),
    ],
)
def test_what_is_not_known_is_named_with_what_to_do(variables: dict[str, str], lacking: str):
    with pytest.raises(
        UserError, match=f"started 4 processes, .* do not tell {lacking}, .*MASTER_ADDR.*torchrun"
    ) as error:
        joined(variables)
    one_line(error)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SLURM | {"RANK": "0"},  # torchrun under srun
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell, in a job of four tasks
        SLURM | {"SLURM_NTASKS": "1"},  # whoever wants each task alone says so
        {key: SLURM[key] for key in SLURM if "STEP" not in key},  # the script of sbatch
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        SLURM | {"SLURM_PROCID": "none"},
    ],
)
def test_one_task_is_alone_as_ever(variables: dict[str, str]):
    assert find_task(variables) is None


def test_mpirun_that_srun_helped_to_start_counts_as_mpirun():
    helper = SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    for own in (OPEN_MPI, PMI):
        task = find_task(helper | own)
        assert task is not None and (task.launcher, task.size) == ("mpirun", 4)
    same = find_task(SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"})  # srun --mpi=pmi2
    assert same is not None and same.launcher == "srun"


def test_a_task_with_a_gpu_of_its_own_takes_that(monkeypatch: pytest.MonkeyPatch):
    for seen, taken in ((1, "0"), (2, "1"), (8, "1"), (0, "1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)  # noqa: B023
        assert joined(SLURM)["LOCAL_RANK"] == taken


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[03-05,8]", "node03"),
        ("node[8,03-05],gpu1", "node8"),
        ("r[1-2]n[4,6],r3n1", "r1n4"),
        ("a-b-[010-012].site,x", "a-b-010.site"),
        ("", None),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: Any):
    assert first_of(hosts) == first
