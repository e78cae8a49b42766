"""Times group, rank and cut for studies.speed, as the pruning scripts ask for them, beside `torch_pruning.BasePruner`.

Ours is tracing, classification, the search for the widths of the published MACs (`--target-macs` in the script's
comment) and the cut. The reference is the construction of a BasePruner and its `step` at the script's fixed ratios,
which has no budget to search for. Both get fresh copies of one model, whose making is not timed; neither are our L1
scores, while the pruner's importance is a part of its step. A script that removes blocks does so first, for both.

Each script is measured in a process of its own, which is ended after a time limit: a row then says what it was at.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import multiprocessing
import signal
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn

from isomorphic.commands.prune_flags import plan_options
from isomorphic.files import check_writable
from isomorphic.measure.complexity import count_complexity, format_macs
from isomorphic.models import build_model, describe_model, example_inputs
from isomorphic.pruning.blocks.depth import choose_blocks, remove_blocks, score_blocks
from isomorphic.pruning.blocks.residual import find_stages
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.options import Target
from isomorphic.pruning.planning import group_and_classify, score_model
from studies.rows import write_rows
from studies.speed.script_flags import PRUNING_SCRIPTS, find_pruning_script, read_pruning_script

PHASES = ("trace", "rank", "cut")
OK = "ok"


class PruningRow(NamedTuple):
    """One script: the columns of pruning.csv. Seconds and ratios are medians over all rounds.

    Attributes:
        target: MACs that were asked for.
        macs: that our cut left, paper's counter.
        trace, rank, cut: parts of our seconds.
        reference: BasePruner's seconds; it and the ratios are None where it failed.
        status: "ok", or why a part is missing.
    """

    script: str
    target: int
    macs: int | None = None
    trace: float | None = None
    rank: float | None = None
    cut: float | None = None
    ours: float | None = None
    reference: float | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    rounds: int = 0
    threads: int = 0
    status: str = OK


def run(scripts: Sequence[str] | None, repetitions: int, threads: int, time_limit: float, path: Path) -> None:
    """Measures each script, prints the table and writes the rows.

    Args:
        scripts: names in scripts/pruning, or files; None for all of them.
        repetitions: rounds that count.
        threads: of torch.
        time_limit: seconds for each script.
        path: where the rows go.

    Raises:
        UserError: no such script, it states no MACs, or the file cannot be written.
    """
    check_writable(path)
    files = [find_pruning_script(name) for name in scripts] if scripts else sorted(PRUNING_SCRIPTS.glob("*.sh"))
    flags = {file: read_pruning_script(file) for file in files}  # all of them before the first is measured
    print(f"{'script':22}{'ours':>8}{'trace':>7}{'rank':>7}{'cut':>7}{'BasePruner':>12}   ratio (min … max)  MACs")
    rows = []
    for file, args in flags.items():
        rows.append(measure_apart(file.stem, args, repetitions, threads, time_limit))
        print(line(rows[-1]), flush=True)
    write_rows(path, PruningRow, rows)
    print(f"Saving the rows to {path}")


def measure_apart(name: str, args: Namespace, repetitions: int, threads: int, time_limit: float) -> PruningRow:
    """The row of one script, from a process that is ended after `time_limit` seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_child, args=(name, args, repetitions, threads, sender))
    process.start()
    sender.close()
    row, deadline = PruningRow(name, round(args.target_macs.value), status="start"), time.monotonic() + time_limit
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            row = receiver.recv()
        row = row._replace(status=f"{row.status}: took longer than {time_limit:g} s")
        process.kill()
    except EOFError:  # it has ended
        process.join()
        if process.exitcode:
            row = row._replace(status=f"{row.status}: the process ended with status {process.exitcode}")
    process.join()
    return row


def _run_child(name: str, args: Namespace, repetitions: int, threads: int, connection: Connection) -> None:
    """Measures in a process of its own; sends the row whenever a stage begins, and at the end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: this one goes without a word
    warnings.simplefilter("ignore")  # of the library, about tokens and layer scales
    torch.set_num_threads(threads)
    measure(name, args, repetitions, connection.send)


def measure(name: str, args: Namespace, repetitions: int, report: Callable[[PruningRow], None]) -> PruningRow:
    """The row of one script; `report` takes it as far as it is known, at last with its final status."""
    row = PruningRow(name, round(args.target_macs.value), rounds=repetitions, threads=torch.get_num_threads())
    report(row._replace(status="build"))
    model, inputs, classes = prepare(args)
    failure, times, theirs = "", [], []
    for number in range(1 + repetitions):
        report(row._replace(status=f"ours, round {number}"))
        seconds, macs = time_ours(model, inputs, args)
        times.append(seconds)
        row = _with_ours(row._replace(macs=macs), times[1:] or times)
        if not failure:
            report(row._replace(status=f"BasePruner, round {number}"))
            try:
                theirs.append(time_theirs(model, inputs, args, classes))
            except Exception as error:  # whatever the library raises is what the row has to say
                failure = f"BasePruner: {type(error).__name__}: {error}".splitlines()[0]
    row = row._replace(status=failure) if failure else _with_theirs(row, times[1:], theirs[1:])
    report(row)
    return row


def prepare(args: Namespace) -> tuple[nn.Module, Tensor, int]:
    """The script's model, without the blocks that it removes, what it runs on, and how many classes it has."""
    builder = "torchvision" if args.is_torchvision else "timm"
    spec = describe_model(args.model, builder=builder, kwargs=dict(args.model_kwargs))
    torch.manual_seed(args.seed)
    model, inputs = build_model(spec), example_inputs(spec)
    if args.remove_blocks:
        stages = find_stages(model, inputs)
        scores = score_blocks(model, stages, "l1")
        remove_blocks(model, choose_blocks(stages, scores, args.remove_blocks, args.remove_blocks_scope), inputs)
    return model, inputs, model(inputs).shape[-1]


def time_ours(model: nn.Module, inputs: Tensor, args: Namespace) -> tuple[dict[str, float], int]:
    """Seconds by phase, and the MACs that are left."""
    model = copy.deepcopy(model)
    options = dataclasses.replace(plan_options(args, None), criterion="l1")
    seconds: dict[str, float] = {}
    with _timed(seconds, "trace"):
        graph = group_and_classify(model, inputs, options)
    scored = score_model(model, inputs, options, graph=graph)
    with _timed(seconds, "rank"):
        plan = scored.plan(Target("macs_paper", args.target_macs.value))
    with _timed(seconds, "cut"):
        cut(model, graph, plan)
    return seconds, count_complexity(model, inputs).macs_paper


def time_theirs(model: nn.Module, inputs: Tensor, args: Namespace, classes: int) -> float:
    """Seconds of the library's pruner, from construction to the end of its step."""
    model = copy.deepcopy(model)
    seconds: dict[str, float] = {}
    with _timed(seconds, "all"):
        tp.pruner.BasePruner(model, inputs, **pruner_options(model, args, classes)).step()
    return seconds["all"]


def pruner_options(model: nn.Module, args: Namespace, classes: int) -> dict[str, Any]:
    """What BasePruner takes for a script's flags; fresh dictionaries in place of its shared defaults."""
    heads = {module.qkv: module.num_heads for module in model.modules() if hasattr(module, "qkv")}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    options: dict[str, Any] = {
        "importance": tp.importance.GroupMagnitudeImportance(p=1),
        "isomorphic": True,
        "global_pruning": True,
        "pruning_ratio": args.pruning_ratio,
        "max_pruning_ratio": args.max_pruning_ratio,
        "round_to": args.round_to,
        "ignored_layers": [layer for layer in linears if layer.out_features == classes],
        "num_heads": heads,
        "prune_num_heads": bool(args.head_pruning_ratio),
        "head_pruning_ratio": args.head_pruning_ratio or 0.0,
        "prune_head_dims": args.head_dim_pruning_ratio != 0,
        "in_channel_groups": {},
        "out_channel_groups": {},
    }
    if heads and args.head_dim_pruning_ratio is not None:
        options["pruning_ratio_dict"] = {tuple(heads): args.head_dim_pruning_ratio}
    return options


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    gc.collect()  # what came before
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _with_ours(row: PruningRow, times: Sequence[dict[str, float]]) -> PruningRow:
    phases = {phase: median(seconds[phase] for seconds in times) for phase in PHASES}
    return row._replace(**phases, ours=median(sum(seconds.values()) for seconds in times))


def _with_theirs(row: PruningRow, ours: Sequence[dict[str, float]], theirs: Sequence[float]) -> PruningRow:
    ratios = [sum(mine.values()) / other for mine, other in zip(ours, theirs, strict=True)]
    return row._replace(
        reference=median(theirs), ratio=median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), status=OK
    )


def line(row: PruningRow) -> str:
    """A row of the printed table; what could not be measured is a dash, and the reason stands last."""

    def cell(value: float | None, width: int) -> str:
        return f"{'-' if value is None else f'{value:.2f}':>{width}}"

    seconds = cell(row.ours, 8) + "".join(cell(getattr(row, phase), 7) for phase in PHASES) + cell(row.reference, 12)
    spread = "-" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_min:.2f} … {row.ratio_max:.2f})"
    macs = f"{'-' if row.macs is None else format_macs(row.macs, 4)} of {format_macs(row.target)}"
    return f"{row.script:22}{seconds}{spread:>20}  {macs}" + (f"  {row.status}" if row.status != OK else "")
