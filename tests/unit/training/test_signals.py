"""Signals: taken instead of died of, and answered alike by all processes after the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import pytest

from isomorphic.commands import entry
from isomorphic.processes import distributed
from isomorphic.training import signals as training_signals
from isomorphic.training.signals import Signals
from tests.processes import Outcome, run_together_once


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_request_is_known_at_once_in_one_process():
    with Signals() as signals:
        assert signals.poll() is None
        send(signal.SIGUSR1)
        assert signals.poll() == "save"
        assert signals.poll() is None
        send(signal.SIGTERM)
        assert [signals.poll(), signals.poll()] == ["stop", "stop"]


def test_stopping_wins_over_saving():
    for both in ((signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)):
        with Signals() as signals:
            for number in both:
                send(number)
            assert signals.poll() == "stop"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.usefixtures("heeded_signals")
def test_what_asks_to_stop_is_known_by_name(number: signal.Signals):
    with Signals() as signals:
        send(signal.SIGUSR1)
        send(number)
        assert [signals.poll(), signals.poll()] == ["stop", "stop"] and signals.stopped_by == number


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_and_the_background_ignore_stays_ignored(number: signal.Signals):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(number)
            assert signals.poll() is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def status_of(work: Callable[[], None]) -> int:
    """How a process ends that does this: minus the signal's number, where one ended it."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.usefixtures("heeded_signals")
def test_a_second_ctrl_c_ends_the_process_at_once(capfd: pytest.CaptureFixture[str]):
    def work() -> None:
        sys.argv[0] = "/somewhere/finetune.py"
        sys.stderr = sys.__stderr__
        with Signals() as signals:
            send(signal.SIGINT)
            assert signals.poll() == "stop"
            send(signal.SIGINT)
            time.sleep(60)

    assert status_of(work) == -signal.SIGINT
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("finetune.py: interrupted: stops after this step") and "Ctrl-C again ends it" in line


@pytest.mark.usefixtures("heeded_signals")
def test_what_torchrun_passes_on_is_no_second_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: False)

    def work() -> None:
        with Signals():
            send(signal.SIGINT)
            send(signal.SIGINT)  # the same one, from torchrun
            monkeypatch.setattr(training_signals, "ECHO_SECONDS", 0.0)
            os.write(2, b"still here\n")
            send(signal.SIGINT)
            time.sleep(60)

    assert status_of(work) == -signal.SIGINT
    assert capfd.readouterr().err.endswith("still here\n")


def test_what_was_there_before_comes_back():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(KeyError), Signals():
            send(signal.SIGUSR1)
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.SIG_IGN) and seen == []
        send(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_takes_none():
    answers = []

    def work() -> None:
        with Signals() as signals:
            answers.extend([signals.poll(), signal.getsignal(signal.SIGUSR1)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [None, signal.SIG_DFL]


# --- two processes ---


def only_one_gets_them() -> list[str | None]:
    """SIGUSR1 reaches the second process before step 3, SIGTERM the first before step 6."""
    distributed.init("cpu")
    answers = []
    with Signals() as signals:
        for step in range(9):
            if (step, distributed.rank()) in ((3, 1), (6, 0)):
                send(signal.SIGTERM if step == 6 else signal.SIGUSR1)
            answers.append(signals.poll())
    distributed.shutdown()
    return answers


def one_dies() -> None:
    sys.argv[0] = "finetune.py"

    def main() -> None:
        distributed.init("cpu")
        with Signals() as signals:
            for step in range(1000):
                if (step, distributed.rank()) == (3, 1):
                    send(signal.SIGKILL)
                signals.poll()
                time.sleep(0.01)

    entry.run(main)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    scenarios = {"only_one_gets_them": 2, "one_dies": 2}
    return run_together_once(tmp_path_factory, "tests.unit.training.test_signals", scenarios)


def test_all_answer_alike_after_the_same_step(outcomes: dict[str, list[Outcome]]):
    first, second = outcomes["only_one_gets_them"]
    assert [first.status, second.status] == [0, 0], first.err + second.err
    expected = [None, None, None, None, "save", None, None, "stop", "stop"]
    assert first.value == second.value == expected


def test_where_one_is_gone_the_other_says_so(outcomes: dict[str, list[Outcome]]):
    first, second = outcomes["one_dies"]
    assert (first.status, second.status) == (1, -9)
    assert first.err.startswith("finetune.py: rank 0 of 2: lost contact with another process (")
    assert "Traceback" not in first.err
