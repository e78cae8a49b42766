"""The house: imports go one way, argparse has one home, so has torch.distributed, and entry points are short."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "isomorphic").rglob("*.py"))
ENTRY_POINTS = ("prune.py", "finetune.py", "convnext_train.py", "evaluate.py")
# What stands above what: a file imports nothing that stands above it. Longer names go first.
FLOORS = {
    "isomorphic.commands": 9,
    "isomorphic.api": 8,
    "isomorphic.page": 7.5,
    "isomorphic.pruning": 7,
    "isomorphic.training": 7,
    "isomorphic.exporting": 7,
    "isomorphic.checkpoints.released": 3,
    "isomorphic.checkpoints": 6,
    "isomorphic.measure": 5,
    "isomorphic.masks": 5,
    "isomorphic.models": 2,
    "isomorphic.drop_path": 2,
    "isomorphic.user_file": 1,
    "isomorphic.pretrained": 1,
    "isomorphic.data": 1,
    "isomorphic.processes": 0,
    "isomorphic.inputs": 0,
    "isomorphic.observe": 0,
    "isomorphic.kinds": 0,
    "isomorphic.files": 0,
    "isomorphic.plain_tensors": 0,
    "isomorphic.number_tables": 0,
    "isomorphic.torch_versions": 0,
    "isomorphic.skeletons": 0,
    "isomorphic.wrappers": 0,
    "isomorphic.code_lines": 0,
    "isomorphic.errors": 0,
    "isomorphic.progress": 0,
    "isomorphic.provenance": 0,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


KNOWN = {module_name(file) for file in FILES}


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """The modules that a file imports, wherever in it, but for types only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in KNOWN else node.module for name in names]
    return tuple(found)


def floor(module: str) -> int | None:
    home = next((name for name in FLOORS if module == name or module.startswith(f"{name}.")), None)
    return None if home is None else FLOORS[home]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path):
    here = floor(module_name(path))
    for name in imported(path):
        if here is not None and name.startswith("isomorphic."):
            below = floor(name)
            assert below is not None and below <= here, f"{module_name(path)} imports {name}"
            areas = {module_name(path).split(".")[1], name.split(".")[1]}
            assert areas - {"pruning", "training", "exporting"} or len(areas) == 1, (
                f"{module_name(path)} imports {name}"
            )
    assert "isomorphic" not in imported(path), "inside the package, submodules are imported, not its face"


def test_there_is_no_circle():
    graph = nx.DiGraph((module_name(path), name) for path in FILES for name in imported(path) if "isomorphic" in name)
    assert list(nx.simple_cycles(graph)) == []


def test_argparse_and_distributed_have_one_home_each():
    users = {name: {module_name(path) for path in FILES if any(i.startswith(name) for i in imported(path))}
             for name in ("argparse", "torch.distributed", "torch_pruning", "fvcore")}  # fmt: skip
    reads_other_peoples_pickles = {f"isomorphic.checkpoints.released.{name}" for name in ("legacy", "safe_pickle")}
    elsewhere = users["argparse"] - reads_other_peoples_pickles  # which hold a Namespace
    assert all(user.startswith("isomorphic.commands.") for user in elsewhere)
    assert all(user.startswith("isomorphic.processes.") for user in users["torch.distributed"])
    assert users["torch_pruning"] == {"isomorphic.pruning.grouping.depgraph"}
    assert users["fvcore"] == {"isomorphic.measure.fvcore_counter"}
    for path in FILES:
        if not module_name(path).startswith(("isomorphic.commands", "isomorphic.checkpoints.released")):
            assert "Namespace" not in path.read_text(), path


def test_the_steps_of_a_plan_are_spelled_out_once():
    callers = [
        file
        for folder in ("isomorphic", "studies", "tools", "examples")
        for file in (REPOSITORY / folder).rglob("*.py")
    ]
    steps = ("trace_groups(", "score_groups(", "Ranker(")
    spelled = [file.name for file in callers if all(f" {step}" in file.read_text() for step in steps)]
    assert spelled == ["planning.py"]


def test_entry_points_are_short():
    assert all(len((REPOSITORY / name).read_text().splitlines()) <= 220 for name in ENTRY_POINTS)


def test_a_plan_needs_no_torch_pruning_and_no_compiler_and_the_face_is_light():
    """Torch's compiler takes seconds to import, which dispatch modes ask for unless they say otherwise."""
    code = """
import sys
import isomorphic
assert not [name for name in sys.modules if name.startswith("isomorphic.")] and "torch" not in sys.modules
import torch
plan = isomorphic.plan(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)), torch.zeros(1, 3),
                       ratio=0.5, criterion="l1")
assert len(plan.kept["0.weight:0"]) == 4
print(*(name for name in ("torch_pruning", "fvcore", "torch._dynamo") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_module_of_ones_own_needs_neither_timm_nor_torchvision(tmp_path: Path):
    code = """
import sys
sys.modules["timm"] = sys.modules["torchvision"] = None  # importing them fails
import torch
from torch import nn
import isomorphic as iso

def build():
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

images = torch.randn(8, 3, 8, 8)
pruned = iso.prune(build(), images, macs="50%", data=[(images, torch.arange(8) % 4)], self_check=True,
                   recover=["fusion", "compensate", "bn"], calibration=images)
pruned.save("net.safetensors")
assert torch.equal(iso.load_model("net.safetensors", model=build())(images), pruned.model.eval()(images))
try:
    iso.load_model("resnet18")
except iso.UserError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    told = "timm is not installed, and models by name come from there: pip install timm"
    assert (done.returncode, done.stdout.strip()) == (0, told), done.stderr
