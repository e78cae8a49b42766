#!/usr/bin/env python3
"""How long does it take, beside torch_pruning and a plain training loop?

    python -m studies.speed all --threads 2            # every step that a user waits for, beside the plain way
    python -m studies.speed latency --threads 2        # pruned models beside the dense ones, in fresh processes
    python -m studies.speed trace --threads 2          # constructing coupled groups, beside DependencyGraph
    python -m studies.speed prune --threads 2          # group, rank for a budget, cut, beside BasePruner at a ratio
    python -m studies.speed train --threads 2          # training steps, beside a loop of the published style
    python -m studies.speed sparse --threads 2         # what sparse training adds to a training step

All ways take turns in one process, so that whatever else the machine does meets all, after one round that does not
count. A ratio is this project's time, or speed where it trains, by the other's in the same round. Models have random
weights; trace and prune run on the CPU, on one image. Rows go to benchmarks/: tracing.csv, pruning.csv, training.csv,
sparse_step.csv; those of all and latency with a table beside them: speed.csv, latency_cpu.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from isomorphic.commands import entry, flags
from studies.speed import everything, latency, sparse
from studies.speed import pruning as benchmark_prune
from studies.speed import tracing as benchmark_trace
from studies.speed import training as benchmark_train


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Time this project beside what else there is.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="all|latency|trace|prune|train|sparse")
    how = {"formatter_class": parser.formatter_class, "allow_abbrev": False}

    add_all(commands.add_parser("all", description="Time every step that a user waits for.", **how))
    add_latency(commands.add_parser("latency", description="Time pruned models beside the dense ones.", **how))
    trace = commands.add_parser("trace", description="Time the construction of coupled groups.", **how)
    trace.add_argument("--models", nargs="+", default=list(benchmark_trace.MODELS), metavar="NAME", help="timm models")
    trace.add_argument("--repetitions", type=flags.positive_int, default=11, help="rounds that count")
    trace.add_argument("--csv", type=Path, default=Path("benchmarks/tracing.csv"), help="where the rows go")

    prune = commands.add_parser("prune", description="Time group, rank and cut, as the pruning scripts ask.", **how)
    prune.add_argument("--scripts", nargs="+", metavar="NAME", help="of scripts/pruning, or files (default: all)")
    prune.add_argument("--repetitions", type=flags.positive_int, default=5, help="rounds that count")
    prune.add_argument("--time-limit", type=flags.positive_int, default=600, metavar="SECONDS", help="for each script")
    prune.add_argument("--csv", type=Path, default=Path("benchmarks/pruning.csv"), help="where the rows go")

    add_train(commands.add_parser("train", description="Time training steps, loading included.", **how))
    step = commands.add_parser("sparse", description="Time what sparse training adds to a training step.", **how)
    step.add_argument("--models", nargs="+", default=list(sparse.MODELS), metavar="NAME", help="timm models")
    step.add_argument("--batch-size", type=flags.positive_int, default=32, help="images of a step")
    step.add_argument("--repetitions", type=flags.positive_int, default=5, help="rounds that count")
    step.add_argument("--csv", type=Path, default=Path("benchmarks/sparse_step.csv"), help="where the rows go")
    for command in commands.choices.values():
        command.add_argument("--threads", type=flags.positive_int, default=2, help="of torch")
    return parser.parse_args()


def add_all(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, everything.Options()
    add("--scripts", nargs="+", default=list(everything.MODELS), metavar="NAME", help="of scripts/pruning, or files")
    add("--batches", type=flags.positive_int, default=defaults.batches, help="of a round")
    add("--batch-size", type=flags.positive_int, default=defaults.batch_size, help="images of a batch")
    add("--repetitions", type=flags.positive_int, default=defaults.rounds, help="rounds that count")
    add("--workers", type=flags.non_negative_int, default=defaults.workers, help="processes that load, for either way")
    add("--csv", type=Path, default=Path("benchmarks/speed.csv"), help="where the rows go; a table beside it as .md")


def add_latency(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, latency.Options()
    add("--scripts", nargs="+", default=list(latency.SCRIPTS), metavar="NAME", help="of scripts/pruning, or files")
    sizes = {"type": flags.positive_ints, "metavar": "N,…"}
    add("--batch-sizes", default=[*defaults.batch_sizes], help="images of a batch", **sizes)
    add("--processes", type=flags.positive_int, default=defaults.processes, help="fresh ones for each model")
    add("--round-to", default=[*defaults.roundings], help="copies in these roundings, too", **sizes)
    add("--modes", default=defaults.modes, metavar="MODE,…", help="as evaluate.py --latency-modes")
    csv_help = "where the rows go; a table beside it as .md"
    add("--csv", type=Path, default=Path("benchmarks/latency_cpu.csv"), help=csv_help)


def add_train(train: argparse.ArgumentParser) -> None:
    add, defaults = train.add_argument, benchmark_train.Options()
    add("--recipes", nargs="+", default=list(benchmark_train.RECIPES), metavar="NAME", help="of scripts/finetuning")
    add("--steps", type=flags.positive_int, default=defaults.steps, help="of a turn")
    add("--turns", type=flags.positive_int, default=defaults.turns, help="that count")
    add("--batch-size", type=flags.positive_int, default=defaults.batch_size, help="images of a step")
    add("--workers", type=flags.non_negative_int, default=defaults.workers, help="processes that load, for either loop")
    add("--ways", nargs="+", choices=list(benchmark_train.WAYS), metavar="WAY", help="which ones (default: all)")
    add("--no-compile", action="store_true", help="leave the compiled ways out")
    add("--csv", type=Path, default=Path("benchmarks/training.csv"), help="where the rows go")
    text = "after --: more flags of finetune.py and convnext_train.py, such as --model, --teacher-model, --input-size"
    add("flags", nargs="*", metavar="-- FLAG", help=text)


def main() -> None:
    args = parse_args()
    if args.command == "all":
        size = {"batches": args.batches, "batch_size": args.batch_size, "workers": args.workers}
        options = everything.Options(rounds=args.repetitions, threads=args.threads, **size)
        everything.run(args.scripts, options, args.csv)
    elif args.command == "latency":
        how = {"processes": args.processes, "threads": args.threads, "modes": args.modes}
        latency.run(args.scripts, latency.Options(args.batch_sizes, roundings=args.round_to, **how), args.csv)
    elif args.command == "trace":
        benchmark_trace.run(args.models, args.repetitions, args.threads, args.csv)
    elif args.command == "train":
        how = {"turns": args.turns, "threads": args.threads, "ways": args.ways, "compile": not args.no_compile}
        size = {"steps": args.steps, "batch_size": args.batch_size, "workers": args.workers}
        options = benchmark_train.Options(**size, **how, flags=args.flags)
        benchmark_train.run(args.recipes, options, args.csv)
    elif args.command == "sparse":
        sparse.run(args.models, args.batch_size, args.repetitions, args.threads, args.csv)
    else:
        benchmark_prune.run(args.scripts, args.repetitions, args.threads, args.time_limit, args.csv)


if __name__ == "__main__":
    entry.run(main)
