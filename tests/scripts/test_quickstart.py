"""The quickstart: its report on made-up results, its exit status, and (slow) the whole of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from isomorphic.checkpoints.save import save_model
from isomorphic.models import build_model, describe_model

REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = {
    "model", "target_macs", "macs", "params", "dense_top1", "pruned_top1", "finetuned_top1", "reloaded_top1",
    "checkpoint",
}  # fmt: skip


def report(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "tools/quickstart_report.py", "--folder", str(folder), *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def running(word: str) -> bool:
    """Whether a process with this word on its command line outlives the next five seconds."""
    for _ in range(50):
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # a process that has just ended
                commands.append(path.read_bytes())
        if not any(word.encode() in command for command in commands):
            return False
        time.sleep(0.1)
    return True


def test_the_report_gathers_what_the_commands_measured(tmp_path: Path):
    run = tmp_path / "tiny" / "50"
    (run / "finetuned").mkdir(parents=True)
    (tmp_path / "tiny" / "dense.json").write_text(json.dumps({"macs": 4_000_001, "top1": 98.5}))
    (run / "pruned.json").write_text(json.dumps({"top1": 41.25}))
    (run / "reloaded.json").write_text(json.dumps({"macs": 1_990_000, "params": 120_000, "top1": 97.5}))
    spec = describe_model("convnext_atto", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_classes": 10})
    save_model(run / "finetuned" / "best.safetensors", build_model(spec), spec, provenance={"top1": 97.5})

    done = report(tmp_path, "--models", "tiny", "--budgets", "50")
    assert done.returncode == 0, done.stderr
    row = " ".join(done.stdout.splitlines()[1].split())
    assert row == "tiny 50% 4.00 M => 1.99 M 0.12 M 98.50 41.25 97.50 97.50"
    (stored,) = json.loads((tmp_path / "results.json").read_text())
    assert stored.keys() >= KEYS and stored["target_macs"] == 2_000_000 and stored["finetuned_top1"] == 97.5
    with Image.open(tmp_path / "accuracy_over_macs.png") as picture:
        assert picture.width > 800 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20


def test_a_report_without_runs_is_one_line(tmp_path: Path):
    done = report(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        f"quickstart_report.py: cannot read {tmp_path}/convnext/dense.json: run scripts/quickstart.sh first"
    )


@pytest.mark.parametrize("failing", ["prune.py", "finetune.py", "quickstart_report.py"])
def test_a_failing_command_fails_the_quickstart(failing: str, tmp_path: Path):
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    python = tmp_path / "python"
    slow_deit = '[[ "$*" == *digits_deit* ]] && exec sleep 45.125'  # what the failing ConvNeXt must take down
    python.write_text(f'#!/bin/bash\n{slow_deit if failing == "prune.py" else ""}\n[[ "$1" != *{failing} ]]\n')
    python.chmod(0o755)
    environment = os.environ | {"ISOMORPHIC_PYTHON": str(python)}
    words = ["bash", "scripts/quickstart.sh"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "not ImageNet accuracy" in done.stdout
    assert not running("45.125")


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path: Path):
    for name in ("scripts", "tools", "isomorphic", "data", "pretrained"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for command in REPOSITORY.glob("*.py"):
        shutil.copy(command, tmp_path)
    environment = os.environ | {"ISOMORPHIC_PYTHON": sys.executable}
    words = ["bash", "scripts/quickstart.sh"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:]
    rows = json.loads((tmp_path / "output/quickstart/results.json").read_text())
    assert [row["model"] for row in rows] == ["convnext", "convnext", "deit", "deit"]
    for row in rows:
        assert row["dense_top1"] >= 97
        assert 0.98 * row["target_macs"] <= row["macs"] <= row["target_macs"]
        assert row["reloaded_top1"] == row["finetuned_top1"]
        assert (tmp_path / row["checkpoint"]).is_file()
        assert (tmp_path / row["checkpoint"]).parents[1].joinpath("scores.png").is_file()
    for row in rows[::2]:  # 50% of the MACs
        assert row["finetuned_top1"] >= row["dense_top1"] - 1.5
