"""What two processes agree on: exact evaluation, and stopping together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isomorphic.data import DataSource, Preprocessing, build_dataset, build_eval_loader, eval_transform
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.models import build_model, describe_model

REPOSITORY = Path(__file__).resolve().parents[3]
IMAGES = 361  # odd: the shards differ by one

TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
from isomorphic import distributed
from isomorphic.errors import UserError
from isomorphic.training.engine import LossMeter
from tests.unit.training.test_two_processes import evaluate

distributed.init("cpu")
accuracy = vars(evaluate())
meter = LossMeter(2, torch.device("cpu"))
for step in (11, 12, 13):
    meter.add(torch.tensor(float("nan") if (distributed.rank(), step) == (1, 12) else 1.0), 4, step)
try:
    meter.settle()
    message = ""
except UserError as error:
    message = str(error)
Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps([accuracy, message]))
distributed.shutdown()
"""


def evaluate():
    """A random three-class transformer on 361 random images: this process's share of them."""
    spec = describe_model("vit_tiny_patch16_224", kwargs={"patch_size": 8, "depth": 1, "num_classes": 3}, input_size=16)
    torch.manual_seed(0)
    source = DataSource("synthetic", synthetic_size=IMAGES)
    images = build_dataset(source, "val", eval_transform(Preprocessing(16, 18)), num_classes=3, image_size=16)
    return measure_accuracy(build_model(spec), build_eval_loader(images, 50, 0, "cpu"), "cpu")


@pytest.fixture(scope="module")
def seen_by_two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, str]]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        ["env", f"PYTHONPATH={REPOSITORY}", *torchrun, str(folder / "script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_evaluation_counts_every_image_once_and_equals_one_process(seen_by_two: list[tuple[dict, str]]):
    alone = evaluate()
    assert 0 < alone.top1 < 1
    for accuracy, _ in seen_by_two:
        assert accuracy["num_images"] == IMAGES == alone.num_images
        assert (accuracy["top1"], accuracy["top5"]) == (alone.top1, alone.top5)
        assert accuracy["loss"] == pytest.approx(alone.loss, rel=1e-6)


def test_a_loss_that_is_not_finite_in_one_process_stops_both_with_its_step(seen_by_two: list[tuple[dict, str]]):
    messages = [message for _, message in seen_by_two]
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss is not finite at epoch 3, step 12")
