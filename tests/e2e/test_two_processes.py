"""Two processes that torchrun starts: queries, collectives, shards, and what is measured over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorphic.data.loaders import build_eval_loader
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import Preprocessing, eval_transform
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.models import build_model, describe_model

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 361  # odd: the shards differ by one

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from isomorphic.processes import distributed as d
from isomorphic.data.loaders import build_eval_loader
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import Preprocessing, eval_transform
from isomorphic.errors import UserError
from isomorphic.training.engine import LossMeter
from tests.e2e.test_two_processes import IMAGES, evaluate

d.init("cpu")
d.init("cpu")  # the second time changes nothing
tensor = torch.tensor([1.0, 10.0 * (d.rank() + 1)])
returned = d.all_reduce_sum(tensor)
source = DataSource("synthetic", synthetic_size=IMAGES)
dataset = build_dataset(source, "val", eval_transform(Preprocessing(8, 8)), num_classes=1000, image_size=8)
labels = torch.cat([batch for _, batch in build_eval_loader(dataset, 32, 0, "cpu")]).tolist()
meter = LossMeter(2, torch.device("cpu"))
for step in (11, 12, 13):
    meter.add(torch.tensor(float("nan") if (d.rank(), step) == (1, 12) else 1.0), 4, step)
try:
    meter.settle()
    message = ""
except UserError as error:
    message = str(error)
seen = dict(
    initialised=d.is_distributed(), rank=d.rank(), local_rank=d.local_rank(), world_size=d.world_size(),
    is_main=d.is_main(), sums=tensor.tolist(), in_place=returned is tensor,
    gathered=d.gather_objects(["a", "b"][d.rank()]), labels=labels, accuracy=vars(evaluate()), message=message,
)
Path(sys.argv[1], f"{d.rank()}.json").write_text(json.dumps(seen))
d.shutdown()
assert not d.is_distributed() and d.world_size() == 1
"""


def evaluate():
    """A random three-class transformer on 361 random images: this process's share of them."""
    spec = describe_model("vit_tiny_patch16_224", kwargs={"patch_size": 8, "depth": 1, "num_classes": 3}, input_size=16)
    torch.manual_seed(0)
    source = DataSource("synthetic", synthetic_size=IMAGES)
    images = build_dataset(source, "val", eval_transform(Preprocessing(16, 18)), num_classes=3, image_size=16)
    return measure_accuracy(build_model(spec), build_eval_loader(images, 50, 0, "cpu"), "cpu")


@pytest.fixture(scope="module")
def seen_by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes reports."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_they_know_who_they_are(seen_by_two: list[dict[str, Any]]):
    for rank, seen in enumerate(seen_by_two):
        assert seen["initialised"]
        assert (seen["rank"], seen["local_rank"], seen["world_size"]) == (rank, rank, 2)
        assert seen["is_main"] == (rank == 0)


def test_they_add_up_in_place(seen_by_two: list[dict[str, Any]]):
    for seen in seen_by_two:
        assert seen["sums"] == [2.0, 30.0]
        assert seen["in_place"]


def test_they_exchange_objects(seen_by_two: list[dict[str, Any]]):
    for seen in seen_by_two:
        assert seen["gathered"] == ["a", "b"]


def test_they_share_361_images_without_padding(seen_by_two: list[dict[str, Any]]):
    first, second = (seen["labels"] for seen in seen_by_two)
    assert (len(first), len(second)) == (181, 180)
    assert len(set(first + second)) > 250  # labels are drawn from 1000, so repeats are few by chance


def test_evaluation_counts_every_image_once_and_equals_one_process(seen_by_two: list[dict[str, Any]]):
    alone = evaluate()
    assert 0 < alone.top1 < 1
    for accuracy in (seen["accuracy"] for seen in seen_by_two):
        assert accuracy["num_images"] == IMAGES == alone.num_images
        assert (accuracy["top1"], accuracy["top5"]) == (alone.top1, alone.top5)
        assert accuracy["loss"] == pytest.approx(alone.loss, rel=1e-6)


def test_a_loss_that_is_not_finite_in_one_process_stops_both_with_its_step(seen_by_two: list[dict[str, Any]]):
    messages = [seen["message"] for seen in seen_by_two]
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss is not finite at epoch 3, step 12")
