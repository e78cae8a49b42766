"""Process queries and collectives in one process; `tests/e2e/test_two_processes.py` has two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.processes import distributed
from isomorphic.processes.failing import LostContact

REPOSITORY = Path(__file__).resolve().parents[3]
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


def test_only_what_speaks_of_another_process_counts_as_lost_contact():
    gone = RuntimeError("[…/gloo/transport/tcp/pair.cc:545] Read error [::1]:80: Connection reset by peer")
    wrapped = UserError("--compile does not work here")
    wrapped.__cause__ = gone
    assert distributed.is_lost_contact(gone) and distributed.is_lost_contact(wrapped)
    assert distributed.is_lost_contact(LostContact("not all have come"))
    assert not distributed.is_lost_contact(RuntimeError("shapes do not match"))
    assert not distributed.is_lost_contact(OSError("Connection reset by peer"))  # of a download, say


def test_one_process_reports_for_itself():
    assert distributed.claim_first_report() and distributed.rank_prefix() == ""
    assert not distributed.is_restart()
    distributed.barrier()
    tensor = torch.ones(2)
    assert distributed.local_shard(tensor) is distributed.differentiable_sum(tensor) is tensor
    with pytest.raises(SystemExit) as stop:
        distributed.exit_alone(3)
    assert stop.value.code == 3
