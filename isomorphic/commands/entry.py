"""How a command begins, what it says, and how it ends: in one process or in many."""

from __future__ import annotations

import argparse
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch

from isomorphic import progress
from isomorphic.commands import output
from isomorphic.data.workers import DeadWorker
from isomorphic.errors import Stopped, UserError, first_line
from isomorphic.processes import distributed
from isomorphic.processes.failing import PATIENCE_SECONDS, LostContact, OthersFailed


def start(args: argparse.Namespace) -> torch.device:
    """Joins the other processes where there are any, seeds everything, and picks this process's device.

    Raises:
        UserError: the device is not to be had, or the processes of srun or mpirun have different flags.
    """
    device = pick_device(args.device)
    if launcher := distributed.launcher():
        progress.stage(f"waiting for all {os.environ['WORLD_SIZE']} processes that {launcher} started")
    distributed.init(device)
    if launcher and any(words != sys.argv[1:] for words in distributed.gather_objects(sys.argv[1:])):
        alone = "by itself, or with SLURM_NTASKS=1" if launcher == "srun" else "by itself"
        raise UserError(
            f"the processes that {launcher} started have different flags, and they work together on one run: start "
            f"each run {alone}"
        )
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    return device


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU, or the CPU; any other name is torch's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", distributed.local_rank())
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({first_line(error)})") from error
    return device


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints in one process, to stdout or another file."""
    if distributed.is_main():
        print(text, file=file, flush=True)
        progress.has_spoken()


def run(main: Callable[[], None]) -> None:
    """Calls an entry point. What its user can put right becomes one line on stderr and exit status 1.

    Of several processes, all end as soon as one fails, and the first one to fail is the only one to say why.
    """
    with output.lasting(command_name()):
        _run(main)


def _run(main: Callable[[], None]) -> None:
    try:
        distributed.adopt_launcher()
        with progress.telling():
            main()
    except Stopped as stop:  # all processes come here together, and none is to end before the first one has saved
        say(f"{command_name()}: {stop}", file=sys.stderr)
        distributed.barrier()
        distributed.shutdown()
        sys.exit(stop.status)
    except KeyboardInterrupt:
        fail("interrupted", status=130)
    except OthersFailed:
        distributed.exit_alone(1)
    except SystemExit:
        distributed.shutdown()
        raise
    except Exception as error:
        if distributed.rank_prefix() and distributed.is_lost_contact(error):
            fail(_about_contact(error), patience=PATIENCE_SECONDS)
        if isinstance(error, UserError):
            fail(str(error), at_once=isinstance(error, DeadWorker))
        if not distributed.rank_prefix():
            raise
        if distributed.claim_first_report():
            traceback.print_exc()
        distributed.exit_alone(1)
    distributed.shutdown()


def fail(message: str, status: int = 1, *, command: str = "", patience: float = 0.0, at_once: bool = False) -> NoReturn:
    """Ends this process, with one line from the first of all processes that come here."""
    if distributed.claim_first_report(patience=patience):
        print(f"{command or command_name()}: {distributed.rank_prefix()}{message}", file=sys.stderr, flush=True)
    distributed.exit_alone(status, at_once=at_once)


def _about_contact(error: Exception) -> str:
    return str(error if isinstance(error, LostContact) else LostContact.because(error))


def command_name() -> str:
    """ "prune.py", and "studies.speed" for `python -m studies.speed`."""
    path = Path(sys.argv[0])
    return f"{path.parent.parent.name}.{path.parent.name}" if path.name == "__main__.py" else path.name
