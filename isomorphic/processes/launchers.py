"""Processes that srun or mpirun started are told who they are, in the variables that torchrun sets.

Without that, `srun -n 4 python finetune.py …` would train four models, into one folder. A task of two on one host:

    srun     SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=1
    mpirun   OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 (Open MPI), or
             PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 (MPICH, Intel MPI)
    becomes  RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=… (of the job's number)

Where torchrun's variables are there already, as in torchrun under srun, or where there is one task, nothing changes.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from isomorphic.errors import UserError

PORTS = range(15_000, 30_000)  # below those that systems hand out


@dataclass(frozen=True)
class Task:
    """What a launcher says of one of its processes; None where it does not say.

    Attributes:
        launcher: its name.
        rank, size: the process's number among all, and how many there are.
        local_rank, local_size: the same among those of its host.
        first_host: name of the host of rank 0.
        job: what tells this launch from others, the same in all of its processes.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    first_host: str | None
    job: str | None

    @property
    def is_on_one_host(self) -> bool:
        return self.local_size == self.size


def find_task(variables: Mapping[str, str]) -> Task | None:
    """Returns this process as one of several that a launcher started; None if it is alone, or torchrun's."""
    if "RANK" in variables:
        return None
    task = _open_mpi(variables) or _slurm(variables) or _pmi(variables)
    return task if task and task.size > 1 else None


def join_variables(task: Task, given: Mapping[str, str]) -> dict[str, str]:
    """Returns torchrun's variables for a task; what is `given` of MASTER_ADDR and MASTER_PORT holds.

    Raises:
        UserError: not all is known that a process needs to find the others.
    """
    address = given.get("MASTER_ADDR") or ("127.0.0.1" if task.is_on_one_host else task.first_host)
    local_rank = task.rank if task.local_rank is None and task.is_on_one_host else task.local_rank
    if address is None or local_rank is None:
        lacking = "the first host's name" if address is None else "a process's number among those of its host"
        raise UserError(
            f"{task.launcher} started {task.size} processes, and its variables do not tell {lacking}, so they cannot "
            "work together: set MASTER_ADDR to the first host's name for all of them, or start one torchrun on each "
            "host (see scripts/slurm/)"
        )
    if local_rank >= torch.cuda.device_count() == 1:
        local_rank = 0  # each task was given a GPU of its own, and sees no other
    seed = task.job or (str(os.getppid()) if task.is_on_one_host else "")
    port = given.get("MASTER_PORT") or str(PORTS[zlib.crc32(seed.encode()) % len(PORTS)] if seed else 29_500)
    found = {"RANK": task.rank, "WORLD_SIZE": task.size, "LOCAL_RANK": local_rank}
    if task.local_size:
        found["LOCAL_WORLD_SIZE"] = task.local_size
    return {name: str(value) for name, value in found.items()} | {"MASTER_ADDR": address, "MASTER_PORT": port}


def _slurm(variables: Mapping[str, str]) -> Task | None:
    """A task of srun. The script of sbatch has a SLURM_PROCID, too, and the job's SLURM_NTASKS, but is in no step."""
    rank, step = _number(variables, "SLURM_PROCID"), variables.get("SLURM_STEP_ID")
    size = _number(variables, "SLURM_STEP_NUM_TASKS") or (_number(variables, "SLURM_NTASKS") if step else None)
    if rank is None or size is None or _number(variables, "SLURM_NTASKS") == 1:
        return None
    if variables.get("PMI_SIZE", str(size)) != str(size):
        return None  # mpirun's, which had srun start one helper on each host
    hosts = _number(variables, "SLURM_STEP_NUM_NODES") or _number(variables, "SLURM_NNODES")
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or ""
    per_host = re.match(r"\d+", variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Task(
        "srun",
        rank,
        size,
        _number(variables, "SLURM_LOCALID"),
        size if hosts == 1 else int(per_host[0]) if per_host else None,
        first_of(names),
        f"{variables.get('SLURM_JOB_ID', '')}.{step or ''}",
    )


def _open_mpi(variables: Mapping[str, str]) -> Task | None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    rank, size, local_rank, local_size = (_number(variables, f"OMPI_COMM_WORLD_{name}") for name in names)
    job = variables.get("PMIX_NAMESPACE") or variables.get("OMPI_MCA_ess_base_jobid")
    if rank is None or size is None:
        return None
    return Task("mpirun", rank, size, local_rank, local_size, None, job)


def _pmi(variables: Mapping[str, str]) -> Task | None:
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    rank, size, local_rank, local_size = (_number(variables, name) for name in names)
    if rank is None or size is None:
        return None
    return Task("mpirun", rank, size, local_rank, local_size, None, None)


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdecimal() else None


def first_of(hosts: str) -> str | None:
    """Returns the first host of Slurm's short list; None of an empty one.

    "node7" of "node7,node9", "node03" of "node[03-05,8]", "r1n4" of "r[1-2]n[4,6]".
    """
    brackets = r"\[([^\]]*)\]"
    first = re.match(rf"(?:[^,\[]|{brackets})*", hosts)
    name = first[0] if first else ""
    return re.sub(brackets, lambda numbers: re.split("[-,]", numbers[1])[0], name) or None
