"""prune.py and evaluate.py as a user runs them: from images to a file that plain timm can run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isomorphic.checkpoints.open import load_model, open_model, read_header
from isomorphic.data.loaders import build_scoring_loader
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.models import example_inputs
from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.gradients import accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan, load_plan
from isomorphic.pruning.ranking.budget import PlanCost
from isomorphic.pruning.scoring import normalize, score_groups

REPOSITORY = Path(__file__).resolve().parents[2]
VIT_KWARGS = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "mlp_ratio": 1}
VIT = [
    "--model", "deit_tiny_distilled_patch16_224", "--no-pretrained", "--input-size", "16", "--workers", "0",
    "--model-kwargs", *(f"{key}={value}" for key, value in VIT_KWARGS.items()),
]  # fmt: skip
CONVNEXT = [
    "--model", "convnext_atto", "--no-pretrained", "--input-size", "32", "--workers", "0",
    "--model-kwargs", "depths=[1, 1, 2, 1]", "dims=[8, 16, 24, 32]", "num_classes=7",
]  # fmt: skip
DIGITS = ["--dataset", "digits", "--taylor-batches", "4", "--batch-size", "16"]
LOADER_MODULES = {"isomorphic"} | {
    f"isomorphic.{name}"
    for name in (
        "checkpoints",
        "checkpoints.dense",
        "checkpoints.fitting",
        "checkpoints.folders",
        "checkpoints.headers",
        "checkpoints.heads",
        "checkpoints.hub",
        "checkpoints.input_size",
        "checkpoints.load",
        "checkpoints.open",
        "checkpoints.origins",
        "checkpoints.rebuild",
        "checkpoints.released",
        "checkpoints.released.legacy",
        "checkpoints.released.older_timm",
        "checkpoints.released.safe_pickle",
        "checkpoints.released.weight_sets",
        "checkpoints.save",
        "checkpoints.sources",
        "checkpoints.structure",
        "checkpoints.tensors",
        "checkpoints.weights",
        "data",
        "data.transforms",
        "errors",
        "files",
        "inputs",
        "kinds",
        "models",
        "number_tables",
        "plain_tensors",
        "pretrained",
        "progress",
        "skeletons",
        "user_file",
    )
}

# A process that has torch, timm and our loader, and nothing else of ours.
RELOAD = """
import sys
import timm, torch
from isomorphic import load_model
model = load_model(sys.argv[1])
assert type(model) is timm.models.deit.VisionTransformerDistilled
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
print(*sorted(name for name in sys.modules if name.startswith(("isomorphic", "torch_pruning"))))
"""


def dense_vit() -> tuple[torch.nn.Module, ChannelGraph, Tensor]:
    """The model that prune.py builds from the flags in `VIT` on digits, with seed 0; its groups; an image."""
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224"
    model, spec = open_model(name, kwargs=VIT_KWARGS, pretrained=False, input_size=16, num_classes=10)
    inputs = example_inputs(spec)
    return model, trace_groups(model, inputs), inputs


def one_step_more(plan: PruningPlan, group: CoupledGroup) -> PruningPlan:
    """The plan with one more unit of a group, or one more dim in each of its surviving heads."""
    units = set(plan.removed(group))
    heads = plan.kept_heads(group)
    back = [min((u for u in units if u // group.section_size == head), default=None) for head in heads]
    kept = sorted({*plan.kept[group.name], *(unit for unit in back if unit is not None)})
    return PruningPlan({**plan.kept, group.name: tuple(kept)})


def test_prune_to_a_budget_reload_and_evaluate(start: Callable[..., Any], tmp_path: Path):
    outputs = ["--save-as", "new/pruned.safetensors", "--plan-file", "plan.json", "--report", "scores.png",
               "--results-file", "results.json", "--test-accuracy"]  # fmt: skip
    done = start("prune.py", *VIT, *DIGITS, "--target-macs", "50%", *outputs)
    assert (done.status, done.err) == (0, [])
    results = json.loads((tmp_path / "results.json").read_text())
    plan = load_plan(tmp_path / "plan.json")

    # the budget is met from below, and no step that is left fits in
    model, graph, inputs = dense_vit()
    cost = PlanCost(model, graph, inputs)
    dense = cost(PruningPlan({group.name: tuple(range(group.num_units)) for group in graph.groups}))
    target = round(0.5 * dense.macs_paper)
    steps = [cost(one_step_more(plan, group)).macs_paper - results["macs"] for group in graph.groups]
    assert cost(plan).macs_paper == results["macs"] <= target
    assert target - results["macs"] <= max(0.005 * target, max(steps))
    assert (results["gmacs"], results["macs_counter"]) == (round(results["macs"] / 1e9, 4), "paper")
    assert results["params"] == cost(plan).params < dense.params

    # what was printed and drawn
    lines = done.out.splitlines()
    assert lines[-1] == "Saving the pruned model to new/pruned.safetensors"
    assert [line.partition(":")[0] for line in (lines[0], *lines[-4:-1])] == ["Before", "After", "MACs", "Params"]
    assert lines[1].split() == ["class", "first", "group", "groups", "layers", "units", "mean", "min", "max", "kept"]
    assert (tmp_path / "scores.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "plan.json").read_text())["macs_paper"] == results["macs"]

    # the file says where it comes from and, without anything of the pruning code, computes what the cut model does
    path = tmp_path / "new" / "pruned.safetensors"
    header = read_header(path)
    assert header["provenance"]["arguments"]["target_macs"] == {"value": 0.5, "relative": True}
    assert (header["provenance"]["macs"], header["provenance"]["parent"]) == (results["macs"], None)
    cut(model, graph, plan)
    images = torch.randn(8, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    words = [sys.executable, "-c", RELOAD, str(path), "images.pt", "logits.pt"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    reloaded = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert reloaded.returncode == 0, reloaded.stderr
    assert set(reloaded.stdout.split()) <= LOADER_MODULES
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images), rtol=0, atol=1e-6)

    # and scores what prune.py said it would
    done = start("evaluate.py", "--model", str(path), "--dataset", "digits", "--workers", "0", "-b", "100",
                 "--results-file", "evaluated.csv")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    accuracy = done.out.splitlines()[-1]
    assert accuracy == lines[-4].removeprefix("After: ") and accuracy.startswith("Accuracy: 0.")
    with open(tmp_path / "evaluated.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["top1"]) == pytest.approx(results["top1"]) and 0 < float(row["loss"]) < 5
    figures = (row["num_images"], row["macs"], row["params"], row["img_size"], row["interpolation"])
    assert figures == ("360", str(results["macs"]), str(results["params"]), "16", "bicubic")


def test_a_convnext_on_synthetic_images(call: Callable[..., Any], tmp_path: Path):
    synthetic = ["--dataset", "synthetic", "--synthetic-size", "20", "--batch-size", "8"]
    done = call("prune.py", *CONVNEXT, *synthetic, "--pruning-type", "hessian", "--taylor-batches", "2",
                "--pruning-ratio", "0.5", "--round-to", "2", "--results-file", "pruned.csv",
                "--save-as", "pruned.safetensors")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    with open(tmp_path / "pruned.csv", newline="") as file:
        (pruned,) = csv.DictReader(file)
    model = load_model(tmp_path / "pruned.safetensors")
    widths = [len(model.get_parameter(f"stages.{stage}.blocks.0.conv_dw.weight")) for stage in range(4)]
    assert all(width % 2 == 0 for width in widths) and sum(widths) == 40  # half of 8 + 16 + 24 + 32
    assert sum(parameter.numel() for parameter in model.parameters()) == int(pruned["params"])

    done = call("evaluate.py", "--model", "pruned.safetensors", *synthetic, "--results-file", "evaluated.json")
    assert (done.status, done.err) == (0, [])
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    assert (evaluated["macs"], evaluated["num_images"]) == (int(pruned["macs"]), 20)


def gaps(scores: list[float]) -> list[float]:
    """Relative distances between neighbours."""
    ascending = sorted(scores)
    return [(b - a) / b for a, b in pairwise(ascending)]


def smallest_gap() -> float:
    """How near any two competing scores of the run below come to each other, relatively."""
    model, graph, _ = dense_vit()
    groups = graph.groups
    spec = open_model("deit_tiny_distilled_patch16_224", kwargs=VIT_KWARGS, pretrained=False, input_size=16)[1]
    images = build_dataset(DataSource("digits"), "train", eval_transform(spec.preprocessing))
    batches = build_scoring_loader(images, 16, 4, 0, "cpu")
    gradients = accumulate(model, batches, "gradient", device=torch.device("cpu"))
    scores = score_groups(model, groups, "taylor", statistic=gradients)
    by_class: dict[int, list[float]] = {}
    for name, number in classify(groups).items():
        by_class.setdefault(number, []).extend(normalize(scores[name], "mean").tolist())
    return min(gap for competing in by_class.values() for gap in gaps(competing))


def test_one_seed_gives_one_plan_in_any_process_and_over_several(
    start: Callable[..., Any], call: Callable[..., Any], tmp_path: Path
):
    ratios = ["--pruning-ratio", "0.4", "--head-pruning-ratio", "0.34", "--head-dim-pruning-ratio", "0.25"]
    run = [*VIT, *DIGITS, *ratios, "--save-as", "pruned.safetensors"]
    done = call("prune.py", *run, "--plan-file", "here.json")
    assert (done.status, done.err) == (0, [])
    plan = (tmp_path / "here.json").read_bytes()
    (tmp_path / "pruned.safetensors").rename(tmp_path / "first.safetensors")

    # --dry-run elsewhere, with another order of sets: the same bytes, the same figures, and no model
    dry = start("prune.py", *run, "--plan-file", "again.json", "--dry-run", PYTHONHASHSEED="12345")
    assert (dry.status, dry.err) == (0, [])
    assert (tmp_path / "again.json").read_bytes() == plan
    assert not (tmp_path / "pruned.safetensors").exists()
    assert dry.out.splitlines()[-2:] == done.out.splitlines()[-3:-1]
    assert dry.out.splitlines()[-1].startswith("Params: ")

    # two processes that share the images: gradients differ by rounding, far less than the scores do
    assert smallest_gap() > 1e-4
    torchrun = ["--standalone", "--nproc_per_node=2", str(REPOSITORY / "prune.py")]
    two = start("torch.distributed.run", *torchrun, *run, "--plan-file", "two.json", "--dry-run", "--device", "cpu")
    assert two.status == 0, two.err
    assert (tmp_path / "two.json").read_bytes() == plan

    # another seed, another plan
    other = call("prune.py", *run, "--plan-file", "other.json", "--dry-run", "--seed", "1")
    assert other.status == 0 and (tmp_path / "other.json").read_bytes() != plan

    # --from-plan cuts the very same model
    applied = call("prune.py", *VIT, *DIGITS, "--from-plan", "here.json", "--save-as", "applied.safetensors")
    assert (applied.status, applied.err) == (0, [])
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("first", "applied"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    headers = [read_header(tmp_path / f"{name}.safetensors") for name in ("first", "applied")]
    assert headers[0]["structure"] == headers[1]["structure"]
