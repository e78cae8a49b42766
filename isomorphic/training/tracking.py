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

from isomorphic.checkpoints.save import save_model
from isomorphic.files import atomic_write, remove_leftovers
from isomorphic.models import ModelSpec
from isomorphic.processes import distributed
from isomorphic.training.parallel import unsharded_model
from isomorphic.training.resume import TrainState, kept_states, save_state


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv.

    `epoch` counts from 1. Validation is of the moving average of the weights where there is one, `raw_top1` of the
    weights as they were trained. `seconds` is training and validation together, `images_per_second` training alone,
    over all processes; both are of this process's life where an epoch was interrupted.
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float
    top1: float
    top5: float
    raw_top1: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        raw = f" (raw {self.raw_top1:.4f})" if self.raw_top1 != self.top1 else ""
        return (
            f"lr {self.lr:.3g}, train loss {self.train_loss:.4f}, val loss {self.val_loss:.4f}, "
            f"top-1 {self.top1:.4f}{raw}, {self.seconds:.1f} s, {self.images_per_second:.0f} images/s"
        )


FILES = ("best.safetensors", "last.safetensors", "state.pt", "metrics.csv", "run.json")
COLUMNS = [field.name for field in dataclasses.fields(EpochRow)]


@dataclass(frozen=True)
class RunFolder:
    """`best.safetensors`, `last.safetensors`, `state.pt` and older ones, `metrics.csv` and `run.json`.

    Attributes:
        path: the folder.
        spec: how to build the model that the checkpoints hold.
        settings: what a continuation must share with the run.
        layout: how the images of a step are dealt out, which a continuation may change.
        provenance: where the model comes from; goes into run.json and every checkpoint.
        states_kept: how many training states stay.
    """

    path: Path
    spec: ModelSpec
    settings: dict[str, Any]
    layout: dict[str, int]
    provenance: dict[str, Any]
    states_kept: int = 1

    def prepare(self, epochs_done: int, *, anew: bool) -> None:
        """Writes run.json, and metrics.csv with the rows of the epochs that are done and no later ones.

        A run that starts `anew` removes the training states of an older one, which `--resume auto` would go on with.
        What a killed run was writing goes, too.
        """
        if not distributed.is_main():
            return
        rows = [] if anew else [row for row in self._read_metrics() if int(row["epoch"]) <= epochs_done]
        if anew:
            for path in kept_states(self.path):
                path.unlink()
        for name in FILES:
            remove_leftovers(self.path / name)
        _write_text(self.path / "run.json", json.dumps(self.provenance, indent=2) + "\n")
        self._write_metrics(rows)

    def keep(self, state: TrainState, row: EpochRow) -> None:
        """Records the epoch that ended: its metrics, and the model that came out of it. Every process calls this."""
        result = unsharded_model(state.result)
        if result is None or not distributed.is_main():
            return
        self._write_metrics([*self._read_metrics(), dataclasses.asdict(row)])
        percent = {"top1": round(100 * row.top1, 4), "top5": round(100 * row.top5, 4)}  # as in results files
        provenance = self.provenance | {"epoch": row.epoch, **percent, "loss": row.val_loss}
        for name in ("best", "last") if state.is_best() else ("last",):
            save_model(self.file(name), result, self.spec, provenance=provenance, averaged=state.ema is not None)

    def save_state(self, state: TrainState, device: torch.device) -> None:
        """Writes the training state. Every process calls this."""
        path = self.path / "state.pt"
        save_state(path, state, self.settings, self.layout, device, keep=self.states_kept)

    def file(self, name: str) -> Path:
        """The checkpoint `name`: best or last."""
        return self.path / f"{name}.safetensors"

    def _read_metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.csv"
        if not path.is_file():
            return []
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        _write_text(self.path / "metrics.csv", table.getvalue())


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
