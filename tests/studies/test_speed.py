"""The benchmarks: what they compare, count and write. Nothing that they time is asserted."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorphic.checkpoints.open import open_model
from isomorphic.errors import UserError
from isomorphic.measure.complexity import count_complexity
from isomorphic.models import build_model, describe_model, example_inputs
from isomorphic.training.sampling import RawBatch, drawing_from
from studies.rows import read_rows
from studies.speed.script_flags import read_pruning_script

WAYS = ["exact", "exact, tried", "depgraph", "depgraph, shapes"]
RESNET: dict[str, Any] = {"channels": [8, 12, 16, 24], "stem_width": 8, "num_classes": 10}


@pytest.fixture
def benchmark() -> Any:
    return importlib.import_module("studies.speed.tracing")


@pytest.fixture
def run_benchmark(run_study: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(run_study, "speed")


def test_ratios_are_those_of_each_round(benchmark: Any):
    seconds = {"exact": [1.0, 4.0, 3.0], "depgraph": [2.0, 4.0, 12.0]}
    assert benchmark.compare(seconds, "depgraph") == (4.0, 0.5, 0.25, 1.0)
    assert benchmark.compare(seconds, "exact") == (3.0, 1.0, 1.0, 1.0)


@pytest.mark.slow
def test_all_ways_take_turns_and_leave_the_model_as_it_was(benchmark: Any, monkeypatch: pytest.MonkeyPatch):
    model = build_model(describe_model("resnet10t", kwargs=RESNET))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order: list[str] = []
    for way, construct in benchmark.WAYS.items():
        monkeypatch.setitem(benchmark.WAYS, way, lambda *args, w=way, c=construct: (order.append(w), c(*args)))
    seconds = benchmark.take_turns(model, torch.zeros(1, 3, 32, 32), 2)
    assert order == 3 * WAYS
    assert {way: len(times) for way, times in seconds.items()} == dict.fromkeys(WAYS, 2)
    assert not model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_rows_and_table(run_benchmark: Callable[..., Any], tmp_path: Path):
    done = run_benchmark(
        "trace", "--models", "resnet10t", "--repetitions", "2", "--threads", "1", "--csv", tmp_path / "rows.csv"
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == WAYS
    assert {(row["model"], row["rounds"], row["threads"]) for row in rows} == {("resnet10t", "2", "1")}
    assert [row["groups"] for row in rows] == ["10", "10", "11", "11"]  # the library counts the outputs as one more
    assert all(float(row["added_mib"]) >= 0 for row in rows)
    assert all(float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"]) for row in rows)
    header, *table, last = done.stdout.splitlines()
    assert header.startswith("model") and len(table) == len(WAYS)
    assert all(line.startswith(f"resnet10t{'':21}{way}") for line, way in zip(table, WAYS, strict=True))
    assert last == f"Saving the rows to {tmp_path / 'rows.csv'}"


def test_an_unknown_model_is_one_line_before_anything_is_measured(run_benchmark: Callable[..., Any], tmp_path: Path):
    done = run_benchmark("trace", "--models", "resnet10t", "resnet0", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("studies.speed: ") and "resnet0" in line


# --- prune -------------------------------------------------------------------------------------------------

SCRIPT = """#!/usr/bin/env bash
# The published batches were unseeded: append --target-macs 5M to fix the sizes.
"$ISOMORPHIC_PYTHON" prune.py --model resnet10t \\
  --model-kwargs channels=[8,12,16,24] stem_width=8 num_classes=10 --pruning-ratio 0.5 --round-to 2 "$@"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "small.sh"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_a_script_is_timed_for_its_published_macs(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    benchmark, path = importlib.import_module("studies.speed.pruning"), tmp_path / "rows.csv"
    benchmark.run([str(script)], 1, 1, 100, path)
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == benchmark.PruningRow._fields
    told = {name: row[name] for name in ("script", "target", "rounds", "threads", "status")}
    assert told == {"script": "small", "target": "5000000", "rounds": "1", "threads": "1", "status": "ok"}
    assert 0.9 * 5e6 < int(row["macs"]) <= 5e6
    assert float(row["ours"]) == pytest.approx(sum(float(row[phase]) for phase in benchmark.PHASES))
    assert float(row["ratio"]) == pytest.approx(float(row["ours"]) / float(row["reference"]))
    header, line, last = capsys.readouterr().out.splitlines()
    assert header.startswith("script") and line.startswith("small ")
    assert last == f"Saving the rows to {path}"


@pytest.mark.slow
def test_a_pruner_that_fails_is_a_row_that_says_so(script: Path, monkeypatch: pytest.MonkeyPatch):
    benchmark, rows = importlib.import_module("studies.speed.pruning"), []
    monkeypatch.setattr(benchmark, "time_theirs", lambda *_: [][0])
    row = benchmark.measure("small", read_pruning_script(script), 2, rows.append)
    assert rows[-1] == row and row.status == "BasePruner: IndexError: list index out of range"
    assert row.ours is not None and row.macs is not None and row.reference is None and row.ratio is None
    assert benchmark.line(row).endswith(row.status)


def test_a_script_that_takes_too_long_is_ended(script: Path):
    benchmark = importlib.import_module("studies.speed.pruning")
    row = benchmark.measure_apart("small", read_pruning_script(script), 1, 1, 0.0)
    assert row.status == "start: took longer than 0 s" and row.ours is None


def test_the_reference_takes_what_the_published_scripts_ask_for():
    benchmark = importlib.import_module("studies.speed.pruning")
    args = read_pruning_script(Path(__file__).parents[2] / "scripts/pruning/deit_4.2G.sh")
    model = build_model(describe_model("deit_tiny_distilled_patch16_224", kwargs={"depth": 2, "num_classes": 7}))
    options = benchmark.pruner_options(model, args, 7)
    assert (options["pruning_ratio"], options["head_pruning_ratio"], options["round_to"]) == (0.5, 0.5, 2)
    assert options["prune_num_heads"] and options["prune_head_dims"] and options["isomorphic"]
    attention = [module for module in model.modules() if hasattr(module, "qkv")]
    assert options["num_heads"] == {module.qkv: 3 for module in attention}
    assert options["pruning_ratio_dict"] == {tuple(module.qkv for module in attention): 0.25}
    assert options["ignored_layers"] == [model.head, model.head_dist]


@pytest.mark.parametrize(
    ("text", "message"),
    [(SCRIPT.replace("--target-macs 5M", ""), "does not say"), (SCRIPT.replace("prune.py", "finetune.py"), "not call")],
)
def test_a_script_that_cannot_be_read_is_named(script: Path, text: str, message: str):
    script.write_text(text)
    with pytest.raises(UserError, match=f"small.sh does {message.removeprefix('does ')}"):
        read_pruning_script(script)


# --- train -------------------------------------------------------------------------------------------------

DEIT = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "depth=1", "embed_dim=24", "--input-size", "32"]
TEACHER = ["--teacher-model", "resnet10t"]
CONVNEXT = ["--model", "convnext_atto", "--model-kwargs", "depths=[1,1,1,1]", "dims=[8,8,16,16]", "--input-size", "32"]
RESNET10 = ["--model", "resnet10t", "--input-size", "32"]
FIXED = [
    "--scale",
    "1",
    "1",
    "--ratio",
    "1",
    "1",
    "--hflip",
    "0",
    "--random-erase",
    "0",
    "--train-interpolation",
    "bicubic",
]
UNMIXED = ["--mixup-alpha", "0", "--cutmix-alpha", "0"]
SGD = ["--opt", "sgd", "--lr", "1e-2", "--drop-path", "0"]  # AdamW's first step takes little but the sign of a gradient


@pytest.fixture
def train() -> Any:
    return importlib.import_module("studies.speed.training")


@pytest.fixture
def plain_loop() -> Any:
    return importlib.import_module("studies.speed.plain_loop")


@pytest.fixture
def settings(train: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`settings(recipe, *flags)`: what the plain loop and ours in fp32 are built from, without any chance."""

    def make(recipe: str, *flags: str, steps: int = 1, policy: bool = False) -> dict[str, Any]:
        options = train.Options(batch_size=4, workers=0, flags=[*flags, *FIXED])
        args = train.read_recipe(recipe, options, tmp_path)
        if not policy:
            args.auto_augment = None
        ways = ("plain fp32", "ours all fp32")
        return {way: train.build(args, train.WAYS[way], torch.device("cpu"), steps) for way in ways}

    return make


@pytest.mark.slow
def test_training_rows_and_table(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = train.Options(steps=2, turns=2, threads=1, batch_size=3, workers=0, compile=False)
    options = dataclasses.replace(options, flags=[*DEIT, *TEACHER])
    train.run(["deit_0.6G"], options, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == train.TrainingRow._fields
    ways = ["plain fp32", "plain amp", "ours all fp32", "ours fp32", "ours bf16"]
    assert [row["way"] for row in rows] == ways
    assert [row["dtype"] for row in rows] == ["fp32", "bf16", "fp32", "fp32", "bf16"]
    assert [row["teacher_dtype"] for row in rows] == ["fp32", "bf16", "fp32", "bf16", "bf16"]
    told = {"recipe": "deit_0.6G", "teacher": "resnet10t", "batch_size": "3", "image_size": "32", "workers": "0"}
    told |= {"threads": "1", "steps": "2", "turns": "2", "added_mib": "", "torch": torch.__version__}
    assert all(row.items() >= told.items() for row in rows)
    assert float(rows[0]["by_plain_fp32"]) == float(rows[1]["by_plain_amp"]) == 1
    for row in rows:
        for name in ("speed", "by_plain_fp32", "by_plain_amp"):
            assert 0 < float(row[f"{name}_min"]) <= float(row[name]) <= float(row[f"{name}_max"])
    about, header, *table, last = capsys.readouterr().out.splitlines()
    assert about.startswith("deit_0.6G: ") and "3 images of 32 pixels a step, 2 steps a turn" in about
    assert header.startswith("way") and [line[:20].strip() for line in table] == ways
    assert last == f"Saving the rows to {tmp_path / 'rows.csv'}"


def test_ways_take_turns_and_the_first_turn_does_not_count(train: Any):
    order: list[str] = []
    epochs = {way: lambda way=way: (order.append(way), 8)[1] for way in "ab"}
    speeds, added = train.take_turns(epochs, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert {way: len(values) for way, values in speeds.items()} == {"a": 2, "b": 2}
    assert added == {"a": None, "b": None}


def test_memory_is_the_most_that_a_turn_that_counts_adds(train: Any, monkeypatch: pytest.MonkeyPatch):
    measured = iter([9.0, 3.0, 5.0, 4.0])

    @contextmanager
    def watched(device: torch.device) -> Iterator[dict[str, float]]:
        yield {"seconds": 2.0, "added_mib": next(measured)}

    monkeypatch.setattr(train, "_watched", watched)
    assert train.take_turns({"a": lambda: 8}, 3, torch.device("cpu")) == ({"a": [4.0, 4.0, 4.0]}, {"a": 5.0})


def test_training_ratios_are_those_of_each_turn(train: Any):
    assert train.compare([2.0, 9.0, 8.0], [1.0, 3.0, 8.0]) == (2.0, 1.0, 3.0)
    assert train.compare([2.0], None) == (None, None, None)


def test_both_loops_see_the_same_images(train: Any, plain_loop: Any, settings: Callable[..., dict[str, Any]]):
    plain, ours = settings("resnet50_2.0G", *RESNET10, steps=2).values()
    theirs = [torch.cat(parts) for parts in zip(*plain_loop.plain_loader(plain), strict=True)]
    job = train.our_job(ours)[0]
    mine = [torch.cat(parts) for parts in zip(*map(job.prepare, job.train_loader), strict=True)]
    (images, labels), (other_images, other_labels) = (
        (images[labels.argsort()], labels.sort().values) for images, labels in (theirs, mine)
    )
    assert labels.tolist() == other_labels.tolist() == list(range(8))
    assert images.shape == (8, 3, 32, 32)
    torch.testing.assert_close(images, other_images, rtol=0, atol=1e-5)
    assert len(images.unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("recipe", "flags"), [("deit_0.6G", [*DEIT, *TEACHER]), ("convnext_4.2G", CONVNEXT)], ids=["ra", "timm"]
)
def test_both_loops_have_the_same_policy(
    train: Any, plain_loop: Any, settings: Callable[..., dict[str, Any]], recipe: str, flags: list[str]
):
    plain, ours = settings(recipe, *flags, policy=True).values()
    augment, preprocessing = ours.recipe.augment, ours.spec.preprocessing
    assert augment == plain.recipe.augment and augment.auto_augment
    job, images = train.our_job(ours)[0], plain.images(plain_loop.plain_transform(augment, preprocessing))
    for index in range(4):
        with drawing_from(index):
            image, label = images[index]
        mine, own_label, box = job.train_loader.dataset[index, index]
        assert own_label == label
        prepared, _ = job.prepare(RawBatch(mine[None], torch.tensor([label]), box[None]))
        torch.testing.assert_close(prepared[0], image, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("deit_0.6G", [*DEIT, *TEACHER, *UNMIXED]),
        ("convnext_4.2G", [*CONVNEXT, *UNMIXED, *SGD]),
        ("resnet50_2.0G", RESNET10),
    ],
    ids=["deit", "convnext", "resnet"],
)
def test_both_loops_take_the_same_step(
    train: Any, settings: Callable[..., dict[str, Any]], recipe: str, flags: list[str]
):
    both = settings(recipe, *flags)
    before = copy.deepcopy(both["plain fp32"].model.state_dict())
    assert [train.open_way(way, setting)() for way, setting in both.items()] == [4, 4]
    plain, ours = (setting.model.state_dict() for setting in both.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in plain.items())
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)


def test_the_plain_loop_averages_weights_as_ours_does(
    train: Any, plain_loop: Any, settings: Callable[..., dict[str, Any]]
):
    flags = [*CONVNEXT, *UNMIXED, *SGD, "--model-ema-decay", "0.5"]
    plain, ours = settings("convnext_4.2G", *flags).values()
    loop, (job, state) = plain_loop.PlainLoop(plain), train.our_job(ours)
    folder = train.RunFolder(Path(ours.args.output_dir), ours.spec, {}, {}, {})
    for _ in range(2):
        loop.epoch()
        train.our_epoch(job, state, folder)
    mine, theirs = state.ema.module.state_dict(), loop.ema.module.state_dict()
    assert not torch.equal(mine["stem.0.weight"], ours.model.state_dict()["stem.0.weight"])
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-5)


def test_top_1_and_top_5_of_plain_and_soft_labels(plain_loop: Any):
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([0, 4, 5, 1])
    soft = 0.7 * torch.nn.functional.one_hot(labels, 6) + 0.05
    for target in (labels, soft):
        assert [number.item() for number in plain_loop.plain_accuracies((logits, None), target)] == [25.0, 75.0]


@pytest.mark.slow
def test_a_pruning_script_makes_the_model_of_its_published_macs(script: Path, tmp_path: Path):
    prune = importlib.import_module("studies.speed.script_flags").prune
    model, spec = open_model(str(prune(script, tmp_path)))
    assert spec.name == "resnet10t"
    assert 0.9 * 5e6 < count_complexity(model, example_inputs(spec)).macs_paper <= 5e6


def test_a_recipe_that_does_not_exist_is_named_before_anything_runs(train: Any, tmp_path: Path):
    with pytest.raises(UserError, match=r"deit_9G: no such script in scripts/finetuning"):
        train.run(["deit_9G"], train.Options(flags=RESNET10), tmp_path / "rows.csv")


def test_what_the_plain_loop_cannot_do_is_refused(train: Any, settings: Callable[..., dict[str, Any]]):
    plain = settings("resnet50_2.0G", *RESNET10, "--accumulate", "2")["plain fp32"]
    with pytest.raises(UserError, match="--accumulate"):
        train.open_way("plain fp32", plain)


def test_a_sparse_step_is_timed_beside_a_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sparse = importlib.import_module("studies.speed.sparse")
    path = tmp_path / "sparse_step.csv"
    sparse.run(["resnet10t"], 2, 1, 1, path)
    rows = read_rows(path, sparse.SparseRow)
    assert [row.kind for row in rows] == ["group", "bn", "growing"]
    for row in rows:
        assert 0 < row.regularizer_seconds < row.step_seconds
        assert row.share == pytest.approx(row.regularizer_seconds / row.step_seconds, rel=0.01)
        assert row.units > 500 and row.params > 5_000_000
    assert rows[1].units < rows[0].units + 1
    assert capsys.readouterr().out.count("of a step") == 3
