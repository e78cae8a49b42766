"""One process fails: it says why, and all the others end without a word."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import pytest
import torch

from isomorphic.commands import entry, flags
from isomorphic.errors import Stopped, UserError
from isomorphic.processes import distributed
from tests.processes import Outcome, run_together_once


def begin() -> int:
    """What each process does first; its rank. SIGTERM is ignored, as in training, so that nothing else helps."""
    sys.argv[0] = "/somewhere/finetune.py"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    distributed.init("cpu")
    return distributed.rank()


def wait_forever() -> None:
    """Where no Python code runs any more, as in a kernel that waits for another GPU."""
    ctypes.CDLL(None).sleep(1000)


def user_error() -> None:
    def main() -> None:
        rank = begin()
        if rank == 1:
            raise UserError("cannot read image 7.png")
        if rank == 0:
            wait_forever()
        distributed.all_reduce_sum(torch.zeros(1))

    entry.run(main)


def bug() -> None:
    def main() -> None:
        if begin() == 0:
            raise KeyError("a bug of ours")
        distributed.all_reduce_sum(torch.zeros(1))

    entry.run(main)


def same_error() -> None:
    def main() -> None:
        begin()
        raise UserError("no such file")

    entry.run(main)


def same_error_early() -> None:
    sys.argv[0] = "finetune.py"

    def main() -> None:
        raise UserError("cannot write there")

    entry.run(main)


def usage() -> None:
    sys.argv[:] = ["finetune.py", "--nonesuch"]
    entry.run(lambda: print(flags.make_parser("").parse_args()))


def early_in_one() -> None:
    """The second process does not come to the meeting of all."""
    sys.argv[0] = "finetune.py"

    def main() -> None:
        if os.environ["RANK"] == "1":
            raise UserError("cannot write there")
        begin()

    entry.run(main)


def killed() -> None:
    def main() -> None:
        if begin() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.all_reduce_sum(torch.zeros(1))

    entry.run(main)


def stopped() -> None:
    """All stop together, and the first one takes longer, writing."""

    def main() -> None:
        if begin() == 0:
            ctypes.CDLL(None).sleep(3)
            print("written", flush=True)
        raise Stopped("stopped by SIGTERM")

    entry.run(main)


def fine() -> None:
    def main() -> None:
        begin()
        entry.say(str(distributed.all_reduce_sum(torch.ones(1)).item()))

    entry.run(main)


SCENARIOS = {"user_error": 3, "bug": 2, "same_error": 2, "same_error_early": 2, "usage": 2, "early_in_one": 2,
             "killed": 3, "stopped": 2, "fine": 2}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    return run_together_once(tmp_path_factory, "tests.e2e.test_all_rank_failing", SCENARIOS)


def statuses(outcomes: list[Outcome]) -> list[int]:
    return [outcome.status for outcome in outcomes]


def lines(outcomes: list[Outcome]) -> list[str]:
    """All that was said on stderr, but for what torch's C++ code logs there."""
    said = [line for outcome in outcomes for line in outcome.err.splitlines()]
    return [line for line in said if line.startswith("finetune.py:") or "Error:" in line or "Traceback" in line]


def test_an_error_of_one_stops_those_who_wait_for_it(outcomes: dict[str, list[Outcome]]):
    assert statuses(outcomes["user_error"]) == [1, 1, 1]
    assert lines(outcomes["user_error"]) == ["finetune.py: rank 1 of 3: cannot read image 7.png"]


def test_a_bug_keeps_its_traceback_and_only_that(outcomes: dict[str, list[Outcome]]):
    first, second = outcomes["bug"]
    assert statuses([first, second]) == [1, 1]
    assert first.err.startswith("Traceback") and first.err.endswith("KeyError: 'a bug of ours'\n")
    assert lines([second]) == []


@pytest.mark.parametrize("name", ["same_error", "same_error_early", "usage"])
def test_what_is_wrong_everywhere_is_said_once(name: str, outcomes: dict[str, list[Outcome]]):
    said = lines(outcomes[name])
    expected = {
        "same_error": "no such file",
        "same_error_early": "cannot write there",
        "usage": "unrecognized arguments: --nonesuch (--help lists all flags)",
    }
    assert len(said) == 1 and said[0].startswith("finetune.py: rank ") and said[0].endswith(f" of 2: {expected[name]}")
    assert statuses(outcomes[name]) == ([2, 2] if name == "usage" else [1, 1])


def test_one_that_fails_before_all_have_met(outcomes: dict[str, list[Outcome]]):
    assert statuses(outcomes["early_in_one"]) == [1, 1]
    assert lines(outcomes["early_in_one"]) == ["finetune.py: rank 1 of 2: cannot write there"]


def test_one_that_dies_without_a_word_is_missed_by_one_of_the_others(outcomes: dict[str, list[Outcome]]):
    assert statuses(outcomes["killed"]) == [1, -9, 1]
    said = [line for outcome in outcomes["killed"] for line in outcome.err.splitlines() if "finetune.py" in line]
    assert len(said) == 1 and ": lost contact with another process (" in said[0]
    assert not any("Traceback" in outcome.err for outcome in outcomes["killed"])


def test_those_who_stop_together_wait_for_what_the_first_one_writes(outcomes: dict[str, list[Outcome]]):
    assert statuses(outcomes["stopped"]) == [143, 143]
    assert outcomes["stopped"][0].out == "written\n"
    assert lines(outcomes["stopped"]) == ["finetune.py: stopped by SIGTERM"]


def test_nothing_is_said_where_nothing_goes_wrong(outcomes: dict[str, list[Outcome]]):
    assert statuses(outcomes["fine"]) == [0, 0] and lines(outcomes["fine"]) == []
    assert [outcome.out for outcome in outcomes["fine"]] == ["2.0\n", ""]
