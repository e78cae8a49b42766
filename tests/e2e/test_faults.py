"""Training that is killed, stopped, starved or misled: nothing is lost, and what went wrong is said in one line.

Most commands are forked from a process that has imported everything (see `tests.preloaded`). Several processes are
told who they are by the test: nobody but they themselves ends the others when one fails. torchrun starts the rest.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tests.faults import contents
from tests.preloaded import REPOSITORY, Preloaded, Started, wait_until

HERE = "tests.e2e.test_faults"
LIMIT = 30.0  # seconds from a fault to the end of the last process
VIT = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
CONVNEXT = ["--model", "convnext_atto", "--model-kwargs", "depths=[1,1,1,1]", "dims=[8,16,24,32]", "patch_size=2"]
COMMON = ["--no-pretrained", "--device", "cpu", "--input-size", "32", "--workers", "0", "--output-dir", "run"]
DIGITS = [*COMMON, "--dataset", "digits", "--hflip", "0"]
# 15 steps an epoch; random numbers are drawn in the loader and in the main process, for all that draws any
RANDOM = "--batch-size 96 --opt adamw --lr 2e-3 --model-ema --model-ema-steps 2 --model-ema-decay 0.9 --mixup-alpha 0.2"
RANDOM += " --cutmix-alpha 1 --random-erase 0.25 --auto-augment ra --drop 0.1 --drop-path 0.1 --checkpoint-steps 3"
# 6 steps an epoch, nothing random but the order and the crops: the processes do not matter
PLAIN = "--dataset synthetic --synthetic-size 384 --epochs 2 --opt sgd --lr 0.05 --log-every 2 --checkpoint-steps 2"
PLAIN_VIT = [*VIT, "num_classes=10", *COMMON, *PLAIN.split()]
PLAIN_NET = ["--model", "net.py:build", "--model-kwargs", "num_classes=10", *COMMON, *PLAIN.split()]


# --- what the tests have in common ---


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded() as server:
        yield server


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that is over: exit statuses in order of rank, and the lines of all its processes."""

    statuses: list[int]
    out: list[str]
    err: list[str]


def await_end(*processes: Started, within: float = 300.0) -> Ended:
    wait_until(lambda: all(process.is_gone() for process in processes), within)
    out = [line for process in processes for line in process.out.splitlines()]
    err = [line for process in processes for line in process.err.splitlines()]
    noise = ("gloo", "[W", "it/s]")  # C++ code of torch; progress bars
    err = [line for line in err if line.strip() and not any(words in line for words in noise)]
    return Ended([int(process.poll() or 0) for process in processes], out, err)


def one(preloaded: Preloaded, folder: Path, *words: str, command: str = "finetune.py", **options: Any) -> Ended:
    """Runs a command in one process to its end."""
    return await_end(preloaded.start(command, *words, folder=folder, **options))


@dataclasses.dataclass
class Group:
    """finetune.py in processes that work together, on a store that outlives them, as torchrun's does."""

    processes: list[Started]
    store: TCPStore


def several(preloaded: Preloaded, folder: Path, size: int, *words: str) -> Group:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    everyone = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    everyone |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    mine = [everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    started = [preloaded.start("finetune.py", *words, folder=folder, environment=variables) for variables in mine]
    return Group(started, store)


def end_of_several(preloaded: Preloaded, folder: Path, size: int, *words: str) -> Ended:
    group = several(preloaded, folder, size, *words)
    return await_end(*group.processes)


class Torchrun:
    """finetune.py in two processes under torchrun; a context that ends all of them."""

    def __init__(self, folder: Path, *words: str, max_restarts: int = 0) -> None:
        self.token = uuid.uuid4().hex
        options = ["--standalone", "--nproc_per_node=2", f"--max-restarts={max_restarts}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(REPOSITORY / "finetune.py"), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ISOMORPHIC_TEST": self.token}
        self.out_file, self.err_file = folder / "torchrun.out", folder / "torchrun.err"
        with open(self.out_file, "w") as out, open(self.err_file, "w") as err:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in (self.process.pid, *self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self, **variables: str) -> list[int]:
        """All processes of the run that have these environment variables, loaders' workers included."""
        wanted = {f"{name}={value}" for name, value in (variables | {"ISOMORPHIC_TEST": self.token}).items()}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(path.read_text().split("\0")):
                    found.append(int(path.parent.name))
        return found

    def await_end(self, within: float = 300.0) -> tuple[int, list[str], str]:
        """Exit status and what was printed, once no process is left."""
        wait_until(lambda: self.process.poll() is not None and not self.pids(), within, every=0.1)
        return self.process.returncode, self.out_file.read_text().splitlines(), self.err_file.read_text()


def read_state(folder: Path, name: str = "state.pt") -> dict[str, Any]:
    return torch.load(folder / "run" / name, weights_only=True)


def steps_saved(folder: Path) -> int:
    """The step of the newest state; 0 while there is none, as at the moment when it changes its name."""
    try:
        return read_state(folder)["counters"]["step"]
    except FileNotFoundError:
        return 0


def metrics(folder: Path) -> list[dict[str, float]]:
    with open(folder / "run" / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(content, Mapping):
        content = list(content.items())
    elif isinstance(content, (list, tuple)):
        content = list(enumerate(content))
    else:
        return {name: content}
    return {path: leaf for key, value in content for path, leaf in flat(value, f"{name}/{key}").items()}


def tensors(content: Any) -> dict[str, torch.Tensor]:
    return {name: leaf for name, leaf in flat(content).items() if isinstance(leaf, torch.Tensor)}


def weights(ours: Path, theirs: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a checkpoint of either run holds."""
    return load_file(ours / "run" / f"{name}.safetensors"), load_file(theirs / "run" / f"{name}.safetensors")


def assert_equal_tensors(pair: tuple[Any, Any], atol: float = 0.0) -> None:
    ours, theirs = tensors(pair[0]), tensors(pair[1])
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def assert_equal_metrics(ours: Path, theirs: Path, tolerance: float) -> None:
    rows = list(zip(metrics(ours), metrics(theirs), strict=True))
    for one, other in rows:
        for name in one.keys() - {"seconds", "images_per_second"}:
            assert one[name] == pytest.approx(other[name], abs=tolerance), name
        assert one["seconds"] > 0


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit: both checkpoints, model, average, optimizer and random numbers of the state, and the metrics."""
    for name in ("best", "last"):
        assert_equal_tensors(weights(ours, theirs, name))
    states = read_state(ours), read_state(theirs)
    assert_equal_tensors(states)
    assert flat(states[0]["settings"]) == flat(states[1]["settings"])
    numbers = [{n: v for n, v in flat(state).items() if not isinstance(v, torch.Tensor)} for state in states]
    assert numbers[0] == numbers[1]
    assert_equal_metrics(ours, theirs, 1e-9)


def new_folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def copy_of(folder: Path, name: str) -> Path:
    return shutil.copytree(folder, folder.with_name(name))


# --- what happens to a process; it comes from the environment of `--model` or is called by `tests.preloaded` ---


def signals_at(text: str) -> None:
    """`7:SIGUSR1,10:SIGTERM`: which signal comes while which step of the run is under way."""
    from isomorphic.training import engine

    wanted = dict(word.split(":") for word in text.split(","))
    train_step = engine.train_step

    def step(job: Any, state: Any, batches: Any) -> torch.Tensor:
        if name := wanted.get(str(state.step + 1)):
            os.kill(os.getpid(), signal.Signals[name])
        return train_step(job, state, batches)

    engine.train_step = step


def killed_in(text: str) -> None:
    """`save:2`: killed when half of the second state is written; `state.pt:2`: before it takes its name."""
    place, _, number = text.partition(":")
    left = int(number)
    save, replace = torch.save, os.replace

    def count() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def half(content: Any, path: Path) -> None:
        save(content, path)
        if place == "save" and count():
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def rename(source: Path, target: Path) -> None:
        if place == Path(target).name and Path(source).name.startswith(".") and count():
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    torch.save, os.replace = half, rename


NET = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.calls = 0
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, num_classes))

    def forward(self, images):
        self.calls += self.training
        if self.training and self.calls == 4 and os.environ.get("RANK", "1") == "1":
            raise KeyError("the fourth batch of rank 1")
        return self.body(images)

def build(num_classes=1000):
    return Net(num_classes)
"""


# --- killed ---


def run_and_kill(preloaded: Preloaded, folder: Path, words: list[str], moments: list[tuple[int, float]]) -> None:
    """Kills a run so many seconds after it has saved a step, again and again, and lets it finish in the end."""
    for step, seconds in moments:
        run = preloaded.start("finetune.py", *words, "--resume", "auto", folder=folder)
        wait_until(lambda: steps_saved(folder) >= step or run.poll() is not None, every=0.005)  # noqa: B023
        time.sleep(seconds)
        run.send(signal.SIGKILL)
        assert await_end(run).statuses == [-9]
    assert one(preloaded, folder, *words, "--resume", "auto").statuses == [0]


@pytest.mark.parametrize(("kills", "epochs"), [(3, 2), pytest.param(20, 6, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, epochs: int, preloaded: Preloaded, tmp_path: Path):
    words = [*VIT, *DIGITS, *RANDOM.split(), "--epochs", str(epochs)]
    calm, killed = new_folder(tmp_path, "calm"), new_folder(tmp_path, "killed")
    assert one(preloaded, calm, *words).statuses == [0]
    draw = random.Random(kills)
    steps = sorted(draw.sample(range(1, 15 * epochs - 8), kills))
    run_and_kill(preloaded, killed, words, [(step, draw.uniform(0, 0.2)) for step in steps])
    assert_same_run(killed, calm)
    assert contents(killed / "run").keys() == contents(calm / "run").keys()  # no half-written file is left
    assert all(row["images_per_second"] > 1 for row in metrics(calm))


def test_killed_while_it_writes(preloaded: Preloaded, tmp_path: Path):
    recipe = "--epochs 1 --max-steps 12 --batch-size 96 --checkpoint-steps 3 --model-ema"
    words = [*CONVNEXT, *DIGITS, *recipe.split()]
    calm, killed = new_folder(tmp_path, "calm"), new_folder(tmp_path, "killed")
    assert one(preloaded, calm, *words, command="convnext_train.py").statuses == [0]
    for moment in ("save:1", "state.pt:2", "save:2", "last.safetensors:1"):
        options: dict[str, Any] = {"command": "convnext_train.py", "before": (HERE, "killed_in", moment)}
        assert one(preloaded, killed, *words, "--resume", "auto", **options).statuses == [-9]
        assert len(list((killed / "run").glob(".*"))) == 1  # that of this time, not those of earlier ones
    assert one(preloaded, killed, *words, "--resume", "auto", command="convnext_train.py").statuses == [0]
    assert_same_run(killed, calm)
    assert contents(killed / "run").keys() == contents(calm / "run").keys()


@pytest.mark.parametrize("victim", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_torchrun_restarts_what_a_killed_rank_left(victim: str, preloaded: Preloaded, tmp_path: Path):
    words = [*VIT, *DIGITS, *RANDOM.split(), "--batch-size", "48", "--epochs", "2"]
    calm, killed = new_folder(tmp_path, "calm"), new_folder(tmp_path, "killed")
    assert end_of_several(preloaded, calm, 2, *words).statuses == [0, 0]
    with Torchrun(killed, *words, max_restarts=3) as run:
        wait_until(lambda: steps_saved(killed) >= 6)
        (pid,) = run.pids(RANK=victim)
        os.kill(pid, signal.SIGKILL)
        status, out, err = run.await_end()
    assert status == 0, err
    assert sum("steps done; going on" in line for line in out) == 1
    assert_equal_metrics(killed, calm, 1e-5)
    assert_equal_tensors(weights(killed, calm, "best"), 1e-5)


# --- stopped ---


@pytest.fixture(scope="module")
def interrupted(preloaded: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Path, Ended]:
    """Flags, a run that nothing disturbs, one with SIGUSR1 in step 7 and SIGTERM in step 18, and how that one ended."""
    words = [*VIT, *DIGITS, *RANDOM.split(), "--epochs", "2", "--checkpoint-steps", "10", "--checkpoint-hist", "9"]
    base = tmp_path_factory.mktemp("interrupted")
    calm, stopped = new_folder(base, "calm"), new_folder(base, "stopped")
    assert one(preloaded, calm, *words).statuses == [0]
    return words, calm, stopped, one(preloaded, stopped, *words, before=(HERE, "signals_at", "7:SIGUSR1,18:SIGTERM"))


def test_sigusr1_saves_and_sigterm_stops(preloaded: Preloaded, tmp_path: Path, interrupted: Any):
    words, calm, stopped, ended = interrupted
    done = "stopped by SIGTERM in epoch 2, step 18; the training state is written: --resume auto goes on"
    assert (ended.statuses, ended.err) == ([143], [f"finetune.py: {done}"])
    names = ["state.pt", "state.1.pt", "state.2.pt", "state.3.pt"]
    assert [read_state(stopped, name)["counters"]["step"] for name in names] == [18, 15, 10, 7]
    assert not (stopped / "run" / "state.4.pt").exists()
    resumed = shutil.copytree(stopped, tmp_path / "resumed")
    assert one(preloaded, resumed, *words, "--resume", "auto").statuses == [0]
    assert_same_run(resumed, calm)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_torn_state_gives_way_to_the_one_before(share: float, preloaded: Preloaded, tmp_path: Path, interrupted: Any):
    words, calm, stopped, _ = interrupted
    torn = shutil.copytree(stopped, tmp_path / "torn")
    path = torn / "run" / "state.pt"
    os.truncate(path, int(share * path.stat().st_size))
    ended = one(preloaded, torn, *words, "--resume", "auto")
    assert (ended.statuses, ended.err) == ([0], [])
    assert ended.out[0].startswith("skipping it: run/state.pt is not a whole training state")
    assert ended.out[1] == "run/state.1.pt: 0 epochs and 15 steps done; going on"  # before validation
    assert_same_run(torn, calm)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_to_torchrun_ends_all_its_processes(workers: str, preloaded: Preloaded, tmp_path: Path):
    words = [*PLAIN_VIT, "--workers", workers, "--epochs", "9"]
    one_process, stopped = new_folder(tmp_path, "one_process"), new_folder(tmp_path, "stopped")
    with Torchrun(stopped, *words, "--batch-size", "32") as run:
        wait_until(lambda: steps_saved(stopped) >= 8)
        begin, seen = time.monotonic(), steps_saved(stopped)
        run.process.send_signal(signal.SIGTERM)
        status, _, err = run.await_end()
        assert time.monotonic() - begin < LIMIT
    assert status != 0 and steps_saved(stopped) >= seen
    assert err.count("finetune.py: stopped by SIGTERM in epoch ") == 1
    assert f", step {steps_saved(stopped)}; the training state is written" in err
    # and one process goes on, by steps of as many images
    ended = one(preloaded, stopped, *words, "--batch-size", "64", "--resume", "auto")
    assert ended.statuses == [0], ended.err
    assert ended.out[0].startswith("processes 2 (now 1), batch_size 32 (now 64): the images of each step stay the same")
    assert one(preloaded, one_process, *words, "--batch-size", "64").statuses == [0]
    assert_equal_metrics(stopped, one_process, 1e-5)
    assert_equal_tensors(weights(stopped, one_process, "last"), 1e-5)


# --- another number of processes, other settings ---


def test_a_run_goes_on_in_another_layout(preloaded: Preloaded, tmp_path: Path):
    calm, stopped = new_folder(tmp_path, "calm"), new_folder(tmp_path, "stopped")
    assert one(preloaded, calm, *PLAIN_VIT, "--batch-size", "64").statuses == [0]
    before = (HERE, "signals_at", "9:SIGTERM")
    assert one(preloaded, stopped, *PLAIN_VIT, "--batch-size", "64", before=before).statuses == [143]
    layouts = {"processes": 2, "batch_size": 32}, {"batch_size": 32, "accumulate": 2}
    for layout in layouts:
        folder = copy_of(stopped, "_".join(layout))
        words = [*PLAIN_VIT, "--batch-size", "32", "--accumulate", str(layout.get("accumulate", 1)), "--resume", "auto"]
        ended = end_of_several(preloaded, folder, layout.get("processes", 1), *words)
        assert set(ended.statuses) == {0}, ended.err
        then = {"processes": 1, "batch_size": 64, "accumulate": 1}
        changes = ", ".join(f"{name} {then[name]} (now {value})" for name, value in layout.items())
        assert ended.out[0].startswith(f"{changes}: the images of each step stay the same")
        assert ended.out[1] == "run/state.pt: 1 epochs and 9 steps done; going on"
        assert_equal_metrics(folder, calm, 1e-5)
        assert_equal_tensors(weights(folder, calm, "last"), 1e-5)


def test_other_settings_are_refused_each_by_its_name(preloaded: Preloaded, tmp_path: Path):
    words = [*PLAIN_VIT, "--batch-size", "64", "--max-steps", "2"]
    assert one(preloaded, tmp_path, *words).statuses == [0]
    others = ["--batch-size", "32", "--lr", "0.01", "--synthetic-size", "96", "--resume", "auto"]
    files = contents(tmp_path / "run")
    ended = one(preloaded, tmp_path, *words, *others)
    assert ended.statuses == [1] and len(ended.err) == 1
    start, end = "finetune.py: run/state.pt belongs to a run with other settings: ", "; repeat those, or choose another"
    assert ended.err[0].startswith(start) and end in ended.err[0]
    for change in ("global_batch 64 (now 32)", "lr 0.05 (now 0.01)", "train_images 384 (now 96)"):
        assert change in ended.err[0]
    assert contents(tmp_path / "run") == files


# --- starved or misled ---


def test_a_full_disk_costs_nothing_that_was_written(preloaded: Preloaded, tmp_path: Path, interrupted: Any):
    words, calm, stopped, _ = interrupted
    folder = shutil.copytree(stopped, tmp_path / "full")
    before = contents(folder / "run")
    ended = one(preloaded, folder, *words, "--resume", "auto", file_size=300_000)  # a state has 600 kB, a model 140
    assert ended.statuses == [1] and len(ended.err) == 1
    assert ended.err[0].startswith("finetune.py: cannot write run/state.pt: ")
    after = contents(folder / "run")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name.endswith((".pt", ".safetensors")))
    assert one(preloaded, folder, *words, "--resume", "auto").statuses == [0]
    assert_same_run(folder, calm)


def end_of_two(preloaded: Preloaded, folder: Path, *words: str) -> Ended:
    """Two processes that fail, and must be gone in time from when the first one says so."""
    group = several(preloaded, folder, 2, *words)
    wait_until(lambda: any(process.err or process.poll() is not None for process in group.processes))
    return await_end(*group.processes, within=LIMIT)


def test_a_loss_that_is_not_finite(preloaded: Preloaded, tmp_path: Path):
    ended = end_of_two(preloaded, tmp_path, *PLAIN_VIT, "--lr", "1e30")
    assert ended.statuses == [1, 1] and len(ended.err) == 1
    assert " of 2: the loss is not finite at epoch 1, step 2: lower --lr" in ended.err[0]
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read(workers: str, preloaded: Preloaded, tmp_path: Path):
    draw = np.random.default_rng(0)
    for name in [f"{split}/{kind}/{number}" for split in ("train", "val") for kind in "ab" for number in range(8)]:
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    torn = tmp_path / "images" / "train" / "b" / "5.png"
    os.truncate(torn, 100)
    words = [*VIT, *COMMON, "--data-path", "images", "--batch-size", "2", "--workers", workers, "--epochs", "2"]
    ended = end_of_two(preloaded, tmp_path, *words)
    assert ended.statuses == [1, 1] and len(ended.err) == 1
    assert "images/train/b/5.png" in ended.err[0]


def test_a_teacher_that_is_not_there(preloaded: Preloaded, tmp_path: Path):
    ended = end_of_two(preloaded, tmp_path, *PLAIN_VIT, "--teacher-model", "none.safetensors")
    assert ended.statuses == [1, 1] and len(ended.err) == 1
    assert "none.safetensors" in ended.err[0]


def test_a_bug_in_one_process(preloaded: Preloaded, tmp_path: Path):
    (tmp_path / "net.py").write_text(NET)
    ended = end_of_two(preloaded, tmp_path, *PLAIN_NET)
    assert ended.statuses == [1, 1]
    text = "\n".join(ended.err)
    assert text.count("Traceback") == 1 and ended.err[-1] == "KeyError: 'the fourth batch of rank 1'"


def test_a_bug_does_not_wait_for_the_processes_that_load_images(preloaded: Preloaded, tmp_path: Path):
    (tmp_path / "net.py").write_text(NET)
    process = preloaded.start("finetune.py", *PLAIN_NET, "--workers", "1", folder=tmp_path)
    wait_until(lambda: process.err)
    ended = await_end(process, within=LIMIT)
    assert ended.statuses == [1] and ended.err[-1] == "KeyError: 'the fourth batch of rank 1'"


@pytest.mark.slow
def test_torchrun_ends_after_a_bug_in_one_process(tmp_path: Path):
    (tmp_path / "net.py").write_text(NET)
    with Torchrun(tmp_path, *PLAIN_NET) as run:
        wait_until(lambda: "Traceback" in run.err_file.read_text())
        status, _, err = run.await_end(within=LIMIT)
    assert status == 1
    assert err.count("KeyError: 'the fourth batch of rank 1'") == 1
