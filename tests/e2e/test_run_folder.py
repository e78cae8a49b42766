"""One folder, one run: the same command again, and two runs at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import contents
from tests.preloaded import Preloaded, Started, wait_until

MODEL = "--model vit_tiny_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2 num_classes=10"
RUN = f"{MODEL} --no-pretrained --device cpu --input-size 32 --workers 0 --output-dir run --dataset synthetic"
WORDS = f"{RUN} --synthetic-size 64 --batch-size 16 --lr 0.01".split()


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded() as server:
        yield server


def ended(process: Started) -> tuple[int | None, list[str]]:
    """Exit status, and what was said on stderr."""
    wait_until(process.is_gone)
    return process.poll(), process.err.splitlines()


def test_the_same_command_again_stops_and_names_the_ways_on(preloaded: Preloaded, tmp_path: Path):
    def again(*words: str, lr: str = "0.01") -> tuple[int | None, list[str]]:
        return ended(preloaded.start("finetune.py", *WORDS, "--lr", lr, "--epochs", "1", *words, folder=tmp_path))

    assert again() == (0, [])
    before = contents(tmp_path / "run")
    status, (line,) = again()
    assert status == 1
    assert line == (
        "finetune.py: run holds a run (state.pt, state.1.pt, best.safetensors, last.safetensors, metrics.csv): "
        "go on with it by --resume auto, choose another --output-dir, or replace it by --overwrite"
    )
    assert contents(tmp_path / "run") == before
    assert again("--resume", "auto") == (0, [])
    assert contents(tmp_path / "run") == before
    assert again("--overwrite", lr="0.02") == (0, [])
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)


def test_a_second_run_in_the_folder_stops_and_the_first_goes_on(preloaded: Preloaded, tmp_path: Path):
    first = preloaded.start("finetune.py", *WORDS, "--epochs", "40", folder=tmp_path)
    wait_until(lambda: (tmp_path / "run" / "state.pt").exists())
    told = f"finetune.py: run is in use by another run, process {first.pid} on {socket.gethostname()}: "
    for words in ([], ["--resume", "auto"], ["--overwrite"]):
        status, (line,) = ended(preloaded.start("finetune.py", *WORDS, "--epochs", "40", *words, folder=tmp_path))
        assert status == 1 and line.startswith(told)
    assert ended(first) == (0, [])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", *map(str, range(1, 41))]
    assert not (tmp_path / "run" / "run.lock").exists()
