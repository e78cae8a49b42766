"""What a run leaves behind: the files of its output folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isomorphic import distributed
from isomorphic.checkpoint import save_model
from isomorphic.files import atomic_write
from isomorphic.models import ModelSpec
from isomorphic.training.resume import TrainState, save_state


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv. `epoch` counts from 1; `seconds` is training and validation together;
    `images_per_second` is training alone, over all processes."""

    epoch: int
    lr: float
    train_loss: float
    val_loss: float
    top1: float
    top5: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"lr {self.lr:.3g}, train loss {self.train_loss:.4f}, val loss {self.val_loss:.4f}, "
            f"top-1 {self.top1:.4f}, {self.seconds:.1f} s, {self.images_per_second:.0f} images/s"
        )


COLUMNS = [field.name for field in dataclasses.fields(EpochRow)]


@dataclass(frozen=True)
class RunFolder:
    """`best.safetensors`, `last.safetensors`, `state.pt`, `metrics.csv` and `run.json`.

    Attributes:
        path: the folder.
        spec: how to build the model that the checkpoints hold.
        settings: what a continuation must share with the run.
        provenance: where the model comes from; goes into run.json and every checkpoint.
    """

    path: Path
    spec: ModelSpec
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def prepare(self, epochs_done: int) -> None:
        """Writes run.json, and metrics.csv with the rows of the epochs that are done and no later ones.

        A run that starts anew removes the training state of an older one, which `--resume auto` would go on with.
        """
        if not distributed.is_main():
            return
        if not epochs_done:
            (self.path / "state.pt").unlink(missing_ok=True)
        _write_text(self.path / "run.json", json.dumps(self.provenance, indent=2) + "\n")
        rows = [row for row in self._read_metrics() if int(row["epoch"]) <= epochs_done] if epochs_done else []
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write_text(self.path / "metrics.csv", table.getvalue())

    def keep(self, state: TrainState, row: EpochRow, is_best: bool, device: torch.device) -> None:
        """Records one epoch. The training state goes last: where it is there, the rest is."""
        if distributed.is_main():
            with open(self.path / "metrics.csv", "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(dataclasses.asdict(row))
            percent = {"top1": round(100 * row.top1, 4), "top5": round(100 * row.top5, 4)}  # as in results files
            result = {"epoch": row.epoch, **percent, "loss": row.val_loss}
            for name in ("best", "last") if is_best else ("last",):
                save_model(self.file(name), state.model, self.spec, provenance=self.provenance | result)
        save_state(self.path / "state.pt", state, self.settings, device)

    def file(self, name: str) -> Path:
        """The checkpoint `name`: best or last."""
        return self.path / f"{name}.safetensors"

    def _read_metrics(self) -> list[dict[str, str]]:
        path = self.path / "metrics.csv"
        if not path.is_file():
            return []
        with open(path, newline="") as file:
            return list(csv.DictReader(file))


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
