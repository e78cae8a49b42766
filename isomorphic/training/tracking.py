"""The output folder of a run: checkpoints, training states, metrics.csv and run.json."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.files import atomic_write, remove_leftovers
from isomorphic.models import ModelSpec, parse_class_names
from isomorphic.processes import distributed
from isomorphic.training.parallel import unsharded_model
from isomorphic.training.resume import TrainState, kept_states, save_state
from isomorphic.training.run_lock import RunLock


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv.

    `epoch` counts from 1. The validation results are those of the moving average of the weights if there is one, and
    `raw_top1` is that of the trained weights. `seconds` covers training and validation, `images_per_second` training
    alone, over all processes. For an epoch that was interrupted, both count from the resumption. `weak_half` is the
    share of the units' squared norms that the weaker halves of groups hold, in sparse training, of the trained weights;
    without it, there is no such column.
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
    weak_half: float | None = None

    def __str__(self) -> str:
        raw = f" (raw {self.raw_top1:.4f})" if self.raw_top1 != self.top1 else ""
        weak_half = "" if self.weak_half is None else f", weak half {self.weak_half:.4f}"
        return (
            f"lr {self.lr:.3g}, train loss {self.train_loss:.4f}, val loss {self.val_loss:.4f}, "
            f"top-1 {self.top1:.4f}{raw}, {self.seconds:.1f} s, {self.images_per_second:.0f} images/s{weak_half}"
        )


FILES = ("best.safetensors", "last.safetensors", "state.pt", "metrics.csv", "run.json")
*COLUMNS, SPARSE_COLUMN = (field.name for field in dataclasses.fields(EpochRow))


@dataclass(frozen=True)
class RunFolder:
    """Writes `best.safetensors`, `last.safetensors`, `state.pt` and older states, `metrics.csv` and `run.json`.

    Attributes:
        path: the folder.
        spec: how to build the model of the checkpoints.
        settings: settings that a resumed run must share.
        layout: how the images of a step are split over processes and batches; a resumed run may change it.
        provenance: where the model comes from; stored in run.json and every checkpoint.
        states_kept: how many training states are kept.
        inherited: what the checkpoints say, besides, of the model that the run began with.
        lock: is made sure of before anything is written; None where nobody else can come.
    """

    path: Path
    spec: ModelSpec
    settings: dict[str, Any]
    layout: dict[str, int]
    provenance: dict[str, Any]
    states_kept: int = 1
    inherited: dict[str, Any] = field(default_factory=dict)
    lock: RunLock | None = None

    def prepare(self, epochs_done: int, *, anew: bool) -> None:
        """Writes run.json, and metrics.csv with the rows of the finished epochs only.

        A run that starts `anew` removes the training states of an older run, which `--resume auto` would load. The
        unfinished files of a killed run are removed, too.
        """
        if not distributed.is_main():
            return
        self._check_lock()
        rows = [] if anew else [row for row in self._read_metrics() if int(row["epoch"]) <= epochs_done]
        if anew:
            for path in kept_states(self.path):
                path.unlink()
        for name in FILES:
            remove_leftovers(self.path / name)
        names = {"class_names": list(self.spec.class_names)} if self.spec.class_names else {}
        _write_text(self.path / "run.json", json.dumps(self.provenance | names, indent=2) + "\n")
        self._write_metrics(rows)

    def keep(self, state: TrainState, row: EpochRow) -> None:
        """Writes the metrics and the model of a finished epoch. Every process calls this."""
        result = unsharded_model(state.result)
        if result is None or not distributed.is_main():
            return
        self._check_lock()
        self._write_metrics([*self._read_metrics(), dataclasses.asdict(row)])
        percent = {"top1": round(100 * row.top1, 4), "top5": round(100 * row.top5, 4)}  # as in results files
        provenance = self.inherited | self.provenance | {"epoch": row.epoch, **percent, "loss": row.val_loss}
        for name in ("best", "last") if state.is_best() else ("last",):
            save_model(self.file(name), result, self.spec, provenance=provenance, averaged=state.ema is not None)

    def save_state(self, state: TrainState, device: torch.device) -> None:
        """Writes the training state. Every process calls this."""
        path = self.path / "state.pt"
        self._check_lock()
        save_state(path, state, self.settings, self.layout, device, keep=self.states_kept)

    def file(self, name: str) -> Path:
        """Returns the path of the checkpoint `name`: best or last."""
        return self.path / f"{name}.safetensors"

    def _check_lock(self) -> None:
        if self.lock:
            self.lock.check()

    def _read_metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        table = io.StringIO()
        is_sparse = any(row.get(SPARSE_COLUMN) not in (None, "") for row in rows)
        columns = [*COLUMNS, SPARSE_COLUMN] if is_sparse else COLUMNS
        writer = csv.DictWriter(table, columns, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        _write_text(self.path / "metrics.csv", table.getvalue())


def recorded_class_names(folder: Path) -> tuple[str, ...]:
    """Returns the names of the classes in the run.json of a run's folder; none if it is not there or has none."""
    try:
        return parse_class_names(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError, AttributeError):
        return ()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.csv; none if there is no such file."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_free(folder: Path, resume: str | None) -> None:
    """Makes sure that a run replaces no other one's results, unless it goes on with them.

    Raises:
        UserError: the folder holds a run that `--resume` does not name.
    """
    results, has_state = results_in(folder)
    resumes_here = resume and resume != "auto" and Path(resume).parent.resolve() == folder.resolve()
    if not results or resumes_here or (resume == "auto" and has_state):
        return
    way_on = "go on with it by --resume auto" if has_state else "there is no training state to go on with"
    raise UserError(
        f"{folder} holds a run ({', '.join(results)}): {way_on}, choose another --output-dir, "
        "or replace it by --overwrite"
    )


def results_in(folder: Path) -> tuple[list[str], bool]:
    """Returns the names of the files in a folder that are results of a run, and True if a state is among them.

    A run that was killed before it had any leaves run.json and a metrics.csv without rows: those are none.
    """
    states = [path.name for path in kept_states(folder)]
    names = [name for name in ("best.safetensors", "last.safetensors") if (folder / name).is_file()]
    try:
        rows = len(read_metrics(folder))
    except (OSError, ValueError, csv.Error):
        rows = 1  # of something else's: not for us to replace
    return states + names + (["metrics.csv"] if rows else []), bool(states)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
