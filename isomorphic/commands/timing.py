"""The latency part of evaluate.py: a model, the dense one and rounded copies in turns, and what is said of them."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from isomorphic.commands import entry
from isomorphic.commands.rounding import find_advice
from isomorphic.commands.subjects import DENSE, MODEL, Subject, Timed, take_turns
from isomorphic.measure.execution import ExecutionMode
from isomorphic.measure.results import busy_line, gain_line, gain_results, latency_results, memory_line, memory_results


def time_models(
    args: argparse.Namespace, model: Subject, dense: Subject | None, amp_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Times `--model`, beside `--against` and copies of other roundings where there are any, and says so.

    Args:
        args: flags of evaluate.py.
        model, dense: `--model` and `--against`.
        amp_dtype: of the evaluation.

    Returns:
        What goes into the results file. The first mode and size of batch have the plain keys; further ones have them
        behind a prefix, such as `bf16_b32_`.
    """
    modes = args.latency_modes or [ExecutionMode(amp_dtype, args.channels_last, args.compile)]
    subjects = {**({DENSE: dense} if dense else {}), MODEL: model}
    advice = find_advice(args, subjects, modes[0])
    copies = {str(round_to): copy for round_to, copy in advice.copies.items()}
    entry.say(f"Timing batches of {', '.join(map(str, args.latency_batch_size))}...")
    results: dict[str, Any] = {}
    for mode in modes:
        for batch_size in args.latency_batch_size:
            timed = take_turns({**subjects, **copies}, batch_size, mode)
            tell_latencies(args, timed, f" ({mode})" if args.latency_modes else "")
            row = {**results_of(timed), **advice.tell(timed)}
            prefix = f"{mode}_b{batch_size}_" if results else ""
            results |= {prefix + key: value for key, value in row.items()}
    return results


def tell_latencies(args: argparse.Namespace, timed: Timed, label: str) -> None:
    """Prints what `--model` takes, and how that compares with `--against`."""
    latency = timed.latency(MODEL)
    entry.say(f"Latency{label}: {latency}")
    if memory_line(latency):
        entry.say(memory_line(latency))
    if DENSE in timed.macs:
        entry.say(f"Against {args.against}: {timed.latency(DENSE)}")
        entry.say(gain_line(timed.gain(MODEL, DENSE), args.macs_counter))
    if busy_line(timed.found):
        entry.say(busy_line(timed.found))


def results_of(timed: Timed) -> dict[str, Any]:
    """Returns what the results file says of `--model` and `--against`."""
    results = latency_results(timed.latency(MODEL)) | memory_results(timed.latency(MODEL))
    if timed.found.cpu_share is not None:
        results["latency_cpu_share"] = round(timed.found.cpu_share, 4)
    if DENSE in timed.macs:
        dense = latency_results(timed.latency(DENSE)) | memory_results(timed.latency(DENSE))
        dense["macs"] = timed.macs[DENSE]
        results |= {f"against_{key}": value for key, value in dense.items()}
        results |= gain_results(timed.gain(MODEL, DENSE))
    return results
