#!/usr/bin/env python3
"""Gathers what scripts/quickstart.sh measured: one table, results.json, and accuracy over MACs as a picture.

    python tools/quickstart_report.py --folder output/quickstart --models convnext deit --budgets 50 25

For each model the folder holds `MODEL/dense.json` (evaluate.py), and for each budget, in percent of the dense MACs,
`MODEL/BUDGET/pruned.json` (prune.py), `MODEL/BUDGET/finetuned/best.safetensors` (finetune.py) and
`MODEL/BUDGET/reloaded.json` (evaluate.py on that checkpoint).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isomorphic.checkpoints.open import read_header
from isomorphic.commands import entry, flags
from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.measure.complexity import format_macs, format_params

COLUMNS = ("model", "budget", "MACs", "params", "dense", "pruned", "finetuned", "reloaded")


def main() -> None:
    parser = flags.make_parser("Gather the results of scripts/quickstart.sh.")
    parser.add_argument("--folder", type=Path, default=Path("output/quickstart"), help="where the runs are")
    parser.add_argument("--models", nargs="+", default=["convnext", "deit"], help="subfolders")
    parser.add_argument("--budgets", nargs="+", type=flags.positive_int, default=[50, 25], help="percent of the MACs")
    args = parser.parse_args()
    rows = [gather(args.folder, model, budget) for model in args.models for budget in args.budgets]
    print(table(rows))
    with atomic_write(args.folder / "results.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n")
    draw(args.folder / "accuracy_over_macs.png", rows)
    print(
        f"Results in {args.folder}: results.json, accuracy_over_macs.png, MODEL/BUDGET/scores.png and the checkpoints"
    )


def gather(folder: Path, model: str, budget: int) -> dict[str, Any]:
    """One row of results: accuracies in percent, MACs (paper counter) and params as whole numbers."""
    run = folder / model / str(budget)
    dense, pruned, reloaded = (
        read_json(path) for path in (folder / model / "dense.json", run / "pruned.json", run / "reloaded.json")
    )
    checkpoint = run / "finetuned" / "best.safetensors"
    return {
        "model": model,
        "target_macs": round(dense["macs"] * budget / 100),
        "macs": reloaded["macs"],
        "params": reloaded["params"],
        "dense_top1": dense["top1"],
        "pruned_top1": pruned["top1"],
        "finetuned_top1": read_header(checkpoint)["provenance"]["top1"],
        "reloaded_top1": reloaded["top1"],
        "checkpoint": str(checkpoint),
        "dense_macs": dense["macs"],
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: run scripts/quickstart.sh first") from error


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, accuracies in percent."""
    lines = [COLUMNS] + [
        (
            row["model"],
            f"{row['target_macs'] / row['dense_macs']:.0%}",
            f"{format_macs(row['dense_macs'])} => {format_macs(row['macs'])}",
            format_params(row["params"]),
            *(f"{row[key]:.2f}" for key in ("dense_top1", "pruned_top1", "finetuned_top1", "reloaded_top1")),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over MACs, one line a model: dense, then each budget after finetuning; crosses before it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for position, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        mine = [row for row in rows if row["model"] == model]
        macs = [mine[0]["dense_macs"], *(row["macs"] for row in mine)]
        tuned = [mine[0]["dense_top1"], *(row["finetuned_top1"] for row in mine)]
        raw = [row["pruned_top1"] for row in mine]
        axes.plot([m / 1e6 for m in macs], tuned, "o-", color=f"C{position}", label=f"{model}, finetuned")
        axes.plot([m / 1e6 for m in macs[1:]], raw, "x", color=f"C{position}", label=f"{model}, before finetuning")
    axes.set_xlabel("MACs of one image, millions (paper counter)")
    axes.set_ylabel("top-1 accuracy on 360 digits, %")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title("Isomorphic pruning on handwritten digits: the machinery, not ImageNet accuracy", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


if __name__ == "__main__":
    entry.run(main)
