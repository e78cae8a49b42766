"""Processes that srun and mpirun start work together on one run."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preloaded import Preloaded, Started, wait_until

MODEL = "--model vit_tiny_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2 --no-pretrained"
DIGITS = f"{MODEL} --input-size 32 --dataset digits --workers 0 --device cpu"
TRAINING = f"{DIGITS} --hflip 0 --scale 1 1 --ratio 1 1 --max-steps 2 --epochs 1 --output-dir run".split()
LAUNCHERS = {
    "srun": "SLURM_PROCID={0} SLURM_LOCALID={0} SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0 SLURM_NNODES=1",
    "open mpi": "OMPI_COMM_WORLD_RANK={0} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK={0} "
    "OMPI_COMM_WORLD_LOCAL_SIZE=2",
    "mpich": "PMI_RANK={0} PMI_SIZE=2 MPI_LOCALRANKID={0} MPI_LOCALNRANKS=2",
}


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded() as server:
        yield server


def free_port() -> int:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        return finder.getsockname()[1]


def launch(
    preloaded: Preloaded, folder: Path, launcher: str, command: str, *words: str, second: str = ""
) -> list[Started]:
    """Starts two processes as the launcher does; `second` is one more flag of the second one."""
    port = f" MASTER_PORT={free_port()}"
    started = []
    for rank in range(2):
        variables = dict(pair.split("=") for pair in (LAUNCHERS[launcher].format(rank) + port).split())
        more = [second] if second and rank else []
        started.append(preloaded.start(command, *words, *more, folder=folder, environment=variables))
    wait_until(lambda: all(process.is_gone() for process in started))
    return started


def said(processes: list[Started]) -> list[str]:
    """What they said on stderr, but for torch's C++ code."""
    lines = [line for process in processes for line in process.err.splitlines()]
    return [line for line in lines if "gloo" not in line and "[W" not in line]


def test_tasks_of_srun_train_one_model(preloaded: Preloaded, tmp_path: Path):
    processes = launch(preloaded, tmp_path, "srun", "finetune.py", *TRAINING, "--batch-size", "32")
    assert ([process.poll() for process in processes], said(processes)) == ([0, 0], [])
    assert processes[1].out == "" and processes[0].out.count("epoch 1/1") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    (tmp_path / "alone").mkdir()
    alone = preloaded.start("finetune.py", *TRAINING, "--batch-size", "64", folder=tmp_path / "alone")
    wait_until(alone.is_gone)
    losses = []
    for folder in (tmp_path, tmp_path / "alone"):
        with open(folder / "run" / "metrics.csv", newline="") as file:
            losses.append(float(next(csv.DictReader(file))["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # the two saw the images that one sees with twice the batch


@pytest.mark.parametrize("launcher", ["open mpi", "mpich"])
def test_processes_of_mpirun_share_the_images(launcher: str, preloaded: Preloaded, tmp_path: Path):
    words = [*DIGITS.split(), "--results-file", "results.json"]
    processes = launch(preloaded, tmp_path, launcher, "evaluate.py", *words)
    assert ([process.poll() for process in processes], said(processes)) == ([0, 0], [])
    assert [process.out.count("Accuracy") for process in processes] == [1, 0]
    assert json.loads((tmp_path / "results.json").read_text())["num_images"] == 360


def test_tasks_with_different_flags_are_no_single_run(preloaded: Preloaded, tmp_path: Path):
    processes = launch(preloaded, tmp_path, "srun", "evaluate.py", *DIGITS.split(), second="--amp")
    assert [process.poll() for process in processes] == [1, 1]
    (line,) = said(processes)
    assert "the processes that srun started have different flags" in line and "SLURM_NTASKS=1" in line


def test_one_task_of_srun_is_alone(preloaded: Preloaded, tmp_path: Path):
    variables = dict(pair.split("=") for pair in LAUNCHERS["srun"].format(0).replace("=2", "=1").split())
    process = preloaded.start("evaluate.py", *DIGITS.split(), folder=tmp_path, environment=variables)
    wait_until(process.is_gone)
    assert (process.poll(), process.err) == (0, "") and "Accuracy" in process.out
