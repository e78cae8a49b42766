"""Process queries and collectives in one process; `tests/e2e/test_two_processes.py` has two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isomorphic import distributed
from isomorphic.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


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
