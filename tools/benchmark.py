#!/usr/bin/env python3
"""How long does it take, beside torch_pruning?

    python tools/benchmark.py trace --threads 2          # constructing coupled groups, beside DependencyGraph
    python tools/benchmark.py prune --threads 2          # group, rank for a budget, cut, beside BasePruner at a ratio

Both take turns in one process, so that whatever else the machine does meets both, after one round that does not count.
A ratio is this project's time by the other's in the same round. Models have random weights and run on the CPU, on one
image. Rows go to benchmarks/tracing.csv and benchmarks/pruning.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmark_prune
import benchmark_trace

from isomorphic import cli


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser("Time this project beside torch_pruning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="trace|prune")
    how = {"formatter_class": parser.formatter_class, "allow_abbrev": False}

    trace = commands.add_parser("trace", description="Time the construction of coupled groups.", **how)
    trace.add_argument("--models", nargs="+", default=list(benchmark_trace.MODELS), metavar="NAME", help="timm models")
    trace.add_argument("--repetitions", type=cli.positive_int, default=11, help="rounds that count")
    trace.add_argument("--csv", type=Path, default=Path("benchmarks/tracing.csv"), help="where the rows go")

    prune = commands.add_parser("prune", description="Time group, rank and cut, as the pruning scripts ask.", **how)
    prune.add_argument("--scripts", nargs="+", metavar="NAME", help="of scripts/pruning, or files (default: all)")
    prune.add_argument("--repetitions", type=cli.positive_int, default=5, help="rounds that count")
    prune.add_argument("--time-limit", type=cli.positive_int, default=600, metavar="SECONDS", help="for each script")
    prune.add_argument("--csv", type=Path, default=Path("benchmarks/pruning.csv"), help="where the rows go")

    for command in (trace, prune):
        command.add_argument("--threads", type=cli.positive_int, default=2, help="of torch")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.command == "trace":
        benchmark_trace.run(args.models, args.repetitions, args.threads, args.csv)
    else:
        benchmark_prune.run(args.scripts, args.repetitions, args.threads, args.time_limit, args.csv)


if __name__ == "__main__":
    cli.run(main)
