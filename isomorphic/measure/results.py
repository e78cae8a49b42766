"""Results as people and programs read them: printed lines, and files with the keys of timm's validate.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from isomorphic.files import atomic_write
from isomorphic.measure.accuracy import Accuracy
from isomorphic.measure.complexity import Complexity, format_macs, format_params
from isomorphic.measure.fidelity import Fidelity
from isomorphic.measure.fvcore_counter import FvcoreCount
from isomorphic.measure.latency import Gain, InTurns, Latency

# Where the two counters agree this closely, the exact figure is not worth a second number on a line.
AGREEMENT = 1e-3
# A processor that runs a model for this share of the time and more is disturbed by nothing worth a line.
UNDISTURBED = 0.9
_AS_GIVEN = "The MACs are those of all inputs as given: the model does not run on their first item alone"


def complexity_line(complexity: Complexity) -> str:
    """Returns `MACs: 4.1626 G, Params: 20.6943 M`, with the exact MACs where they differ."""
    line = f"MACs: {format_macs(complexity.macs_paper, 4)}, Params: {format_params(complexity.params, 4)}"
    if _differ(complexity):
        line += f" (paper counter; exact MACs: {format_macs(complexity.macs_exact, 4)})"
    return line


def change_lines(before: Complexity, after: Complexity) -> str:
    """Returns `MACs: 17.69 G => 4.17 G` and `Params: 87.34 M => 20.72 M`, with the exact MACs where they differ.

    A third line says so where the MACs are not those of one image.
    """
    macs = f"MACs: {format_macs(before.macs_paper)} => {format_macs(after.macs_paper)}"
    if _differ(before) or _differ(after):
        macs += f" (paper counter; exact: {format_macs(before.macs_exact)} => {format_macs(after.macs_exact)})"
    lines = [macs, f"Params: {format_params(before.params)} => {format_params(after.params)}"]
    return "\n".join([*lines, *([_AS_GIVEN] if before.as_given else [])])


def fvcore_line(count: FvcoreCount) -> str:
    """Returns `MACs by fvcore: 4.21 G (not counted: scaled_dot_product_attention ×12, softmax ×12)`."""
    line = f"MACs by fvcore: {format_macs(count.macs)}"
    gaps = ", ".join(f"{name} ×{calls}" for name, calls in count.uncounted.items())
    return f"{line} (not counted: {gaps})" if gaps else line


def accuracy_line(top1: float, loss: float) -> str:
    """Returns `Accuracy: 0.8241, Loss: 0.8036`."""
    return f"Accuracy: {top1:.4f}, Loss: {loss:.4f}"


def accuracy_results(accuracy: Accuracy) -> dict[str, Any]:
    """Returns accuracies and errors under timm's keys, in percent, and what they were counted over."""
    top1, top5 = round(100 * accuracy.top1, 4), round(100 * accuracy.top5, 4)
    return {
        "top1": top1,
        "top1_err": round(100 - top1, 4),
        "top5": top5,
        "top5_err": round(100 - top5, 4),
        "loss": accuracy.loss,
        "num_images": accuracy.num_images,
        "num_unreadable": len(accuracy.unreadable),
    }


def complexity_results(
    complexity: Complexity, macs_counter: str = "paper", fvcore: FvcoreCount | None = None
) -> dict[str, Any]:
    """Returns complexity under timm's keys: params in millions, MACs in 10⁹.

    Args:
        complexity: what one image costs.
        macs_counter: whose MACs "gmacs" and "macs" are: "paper", "exact" or "fvcore".
        fvcore: where the third was asked for, its count, which gets a key of its own.
    """
    macs = {"paper": complexity.macs_paper, "exact": complexity.macs_exact}
    if fvcore:
        macs["fvcore"] = fvcore.macs
    results = {
        "param_count": round(complexity.params / 1e6, 4),
        "gmacs": round(macs[macs_counter] / 1e9, 4),
        "macs_counter": macs_counter,
        "gmacs_exact": round(complexity.macs_exact / 1e9, 4),
        "macs": macs[macs_counter],
        "params": complexity.params,
    }
    return results | ({"macs_fvcore": fvcore.macs} if fvcore else {})


def latency_results(latency: Latency) -> dict[str, Any]:
    """Returns latency in milliseconds with its spread: the median of all runs, and their percentiles 10 and 90."""
    milliseconds = {"latency_ms": latency.median, "latency_ms_p10": latency.low, "latency_ms_p90": latency.high}
    return {key: round(1e3 * value, 4) for key, value in milliseconds.items()} | {
        "latency_batch_size": latency.batch_size
    }


def memory_line(latency: Latency) -> str:
    """Returns `Peak memory: 61.2 MiB, of which 21.8 MiB are weights`; empty where it is not known."""
    if latency.peak_memory is None or latency.weights is None:
        return ""
    return f"Peak memory: {_mebibytes(latency.peak_memory)} MiB, of which {_mebibytes(latency.weights)} MiB are weights"


def memory_results(latency: Latency) -> dict[str, Any]:
    """Returns the most memory that a batch takes at a time, weights included, in MiB; nothing where it is not known."""
    return {} if latency.peak_memory is None else {"peak_memory_mib": float(_mebibytes(latency.peak_memory))}


def busy_line(found: InTurns) -> str:
    """Returns a line on a machine that is busy with other things; empty if it is not."""
    if found.cpu_share is None or found.cpu_share >= UNDISTURBED:
        return ""
    others = f"{1 - found.cpu_share:.0%} of the time"
    return f"Busy: other processes had the processor for {others}; only a quiet machine gives figures to stand by"


def gain_line(gain: Gain, macs_counter: str) -> str:
    """Returns `Speed-up: 3.25× (80% of 12 rounds within …), 77% of the 4.24× that MACs promise (paper counter)`."""
    promise = f"{gain.macs_ratio:.2f}× that MACs promise ({macs_counter} counter)"
    return f"Speed-up: {gain.speedup}, {gain.kept:.0%} of the {promise}"


def gain_results(gain: Gain) -> dict[str, Any]:
    """Returns the speed-up with its spread, the ratio of the MACs, and the share of that which was kept."""
    found = {
        "speedup": gain.speedup.median,
        "speedup_p10": gain.speedup.low,
        "speedup_p90": gain.speedup.high,
        "macs_ratio": gain.macs_ratio,
        "kept_share": gain.kept,
    }
    return {key: round(value, 4) for key, value in found.items()}


def fidelity_line(fidelity: Fidelity, dense: str) -> str:
    """Returns one line: agreement, KL and the error of the logits.

    Fidelity to DENSE: top-1 agrees on 93.12% of 5000 images, KL 0.0312 nats, relative error of the logits 0.1234
    """
    agreement = f"top-1 agrees on {fidelity.agreement:.2%} of {fidelity.num_images} images"
    logits = f"relative error of the logits {fidelity.logits_error:.4f}"
    return f"Fidelity to {dense}: {agreement}, KL {fidelity.kl:.4f} nats, {logits}"


def fidelity_results(fidelity: Fidelity) -> dict[str, Any]:
    """Returns the agreement in percent, KL(dense‖pruned) in nats, ‖a − b‖ / ‖b‖ of the logits; of how many images."""
    return {
        "agreement": round(100 * fidelity.agreement, 4),
        "kl": fidelity.kl,
        "logits_error": fidelity.logits_error,
        "fidelity_images": fidelity.num_images,
        "fidelity_unreadable": len(fidelity.unreadable),
    }


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Writes one row of results, as CSV where the file ends in .csv, else as JSON; atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if Path(path).suffix == ".csv":
            writer = csv.DictWriter(file, results)
            writer.writeheader()
            writer.writerow(results)
        else:
            json.dump(results, file, indent=2)
            file.write("\n")


def _differ(complexity: Complexity) -> bool:
    return abs(complexity.macs_paper - complexity.macs_exact) > AGREEMENT * complexity.macs_exact


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"
