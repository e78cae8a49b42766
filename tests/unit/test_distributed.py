"""Process queries and collectives: in one process, and in two that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isomorphic import distributed
from isomorphic.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
from isomorphic import distributed as d
from isomorphic.data import DataSource, Preprocessing, build_dataset, build_eval_loader, eval_transform

d.init("cpu")
d.init("cpu")  # the second time changes nothing
tensor = torch.tensor([1.0, 10.0 * (d.rank() + 1)])
returned = d.all_reduce_sum(tensor)
source = DataSource("synthetic", synthetic_size=361)
dataset = build_dataset(source, "val", eval_transform(Preprocessing(8, 8)), num_classes=1000, image_size=8)
labels = torch.cat([batch for _, batch in build_eval_loader(dataset, 32, 0, "cpu")]).tolist()
seen = dict(
    initialised=d.is_distributed(), rank=d.rank(), local_rank=d.local_rank(), world_size=d.world_size(),
    is_main=d.is_main(), sums=tensor.tolist(), in_place=returned is tensor,
    gathered=d.gather_objects(["a", "b"][d.rank()]), labels=labels,
)
Path(sys.argv[1], f"{d.rank()}.json").write_text(json.dumps(seen))
d.shutdown()
assert not d.is_distributed() and d.world_size() == 1
"""


@pytest.fixture(autouse=True)
def _not_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_queries_in_one_process():
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.is_main()


def test_init_without_torchrun_does_nothing():
    distributed.init("cpu")
    assert not distributed.is_distributed()
    distributed.shutdown()


def test_collectives_in_one_process_hand_back_what_they_were_given():
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    thing = object()
    assert distributed.gather_objects(thing) == [thing]


def test_more_processes_than_gpus_is_a_user_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 .* finds 2 GPUs.*--nproc_per_node"):
        distributed.init("cuda")


def test_only_this_file_knows_torch_distributed():
    others = [path for path in (REPOSITORY / "isomorphic").rglob("*.py") if path.name != "distributed.py"]
    assert others
    assert [path for path in others if "torch.distributed" in path.read_text(encoding="utf-8")] == []


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two gloo processes under torchrun reports."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = folder / "script.py"
    script.write_text(TWO_PROCESSES)
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN_VARIABLES}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_know_who_they_are(two_processes: list[dict]):
    for rank, seen in enumerate(two_processes):
        assert seen["initialised"]
        assert (seen["rank"], seen["local_rank"], seen["world_size"]) == (rank, rank, 2)
        assert seen["is_main"] == (rank == 0)


def test_two_processes_add_up_in_place(two_processes: list[dict]):
    for seen in two_processes:
        assert seen["sums"] == [2.0, 30.0]
        assert seen["in_place"]


def test_two_processes_exchange_objects(two_processes: list[dict]):
    for seen in two_processes:
        assert seen["gathered"] == ["a", "b"]


def test_two_processes_share_361_images_without_padding(two_processes: list[dict]):
    first, second = (seen["labels"] for seen in two_processes)
    assert (len(first), len(second)) == (181, 180)
    assert len(set(first + second)) > 250  # labels are drawn from 1000, so repeats are few by chance
