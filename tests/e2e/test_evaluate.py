"""evaluate.py as a user runs it: whose weights, at what precision, and what becomes of images that cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from isomorphic.checkpoints.save import save_model
from isomorphic.models import build_model, describe_model

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS_DEIT = ["--model", str(REPOSITORY / "pretrained" / "digits_deit.safetensors"), "--dataset", "digits"]
TINY = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
# a name with published weights, which are neither fetched nor of these widths
NAMED = ["--model", "convnext_atto.d2_in1k", "--model-kwargs", "dims=[8, 8, 8, 8]", "depths=[1, 1, 1, 1]",
         "--input-size", "32", "--workers", "0"]  # fmt: skip
# the keys of timm's validate.py
TIMM_KEYS = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]
IMAGES = 361  # odd: the shares of two processes differ by one
DAMAGED = (0, 1, 2, 3, 150, 360)  # with batches of two, the whole first batch of either of two processes


def results(folder: Path, name: str = "results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


# --- precision and layout ---


@pytest.mark.parametrize(
    ("flags", "settings", "tolerance"),
    [
        ([], (None, False, False), 0),
        (["--amp"], ("bf16", False, False), 1e-3),
        (["--channels-last"], (None, True, False), 1e-6),
        (["--amp", "--amp-dtype", "bf16", "--channels-last"], ("bf16", True, False), 1e-3),
        pytest.param(["--compile", "--channels-last"], (None, True, True), 1e-4, marks=pytest.mark.slow),
    ],
)
def test_precision_and_layout_leave_the_accuracy_alone(
    call: Callable[..., Any], tmp_path: Path, flags: list[str], settings: tuple[Any, ...], tolerance: float
):
    done = call("evaluate.py", *DIGITS_DEIT, "--workers", "0", *flags, "--results-file", "results.json")
    assert done.status == 0, done.err
    row = results(tmp_path)
    assert (row["amp_dtype"], row["channels_last"], row["compiled"]) == settings
    assert (row["top1"], row["top1_err"], row["num_images"]) == (98.8889, 1.1111, 360)
    assert row["loss"] == pytest.approx(0.13559572, abs=tolerance + 1e-6)
    if row["amp_dtype"]:
        assert abs(row["loss"] - 0.13559572) > 2e-6, "nothing was rounded to bf16"


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--amp", "--amp-dtype", "fp16", "--device", "cpu"], 1, "--amp-dtype fp16 needs a CUDA device"),
        (["--amp-dtype", "bf16"], 2, "--amp-dtype needs --amp"),
        (["--amp", "--amp-dtype", "fp8"], 2, "invalid choice: 'fp8'"),
    ],
)
def test_precisions_that_are_not_to_be_had(call: Callable[..., Any], flags: list[str], status: int, message: str):
    done = call("evaluate.py", *DIGITS_DEIT, *flags)
    assert done.status == status
    assert len(done.err) == 1 and message in done.err[0]


# --- results ---


@pytest.mark.parametrize("name", ["results.json", "results.csv"])
def test_results_have_the_keys_of_timms_validate(call: Callable[..., Any], tmp_path: Path, name: str):
    done = call("evaluate.py", *DIGITS_DEIT, "--workers", "0", "--batch-size", "90", "--results-file", name)
    assert (done.status, done.err) == (0, [])
    if name.endswith(".csv"):
        with open(tmp_path / name, newline="") as file:
            (row,) = csv.DictReader(file)
    else:
        row = {key: str(value) for key, value in results(tmp_path, name).items()}
    assert [key for key in row if key in TIMM_KEYS] == TIMM_KEYS
    expected = [DIGITS_DEIT[1], "98.8889", "1.1111", "100.0", "0.0", "0.2089", "32", "1.0", "bicubic"]
    assert [row[key] for key in TIMM_KEYS] == expected
    assert (row["num_images"], row["num_unreadable"], row["batch_size"]) == ("360", "0", "90")
    assert float(row["samples_per_sec"]) > 0


def test_the_latency_of_a_batch(call: Callable[..., Any], tmp_path: Path):
    words = ["--workers", "0", "--latency", "--latency-batch-size", "2", "--channels-last"]
    done = call("evaluate.py", *DIGITS_DEIT, *words, "--results-file", "results.json")
    assert (done.status, done.err) == (0, [])
    row = results(tmp_path)
    assert 0 < row["latency_ms_p10"] <= row["latency_ms"] <= row["latency_ms_p90"] and row["latency_batch_size"] == 2
    assert f"Latency: {row['latency_ms']:.2f} ms (batch 2; 80% of " in done.out and row["top1"] == 98.8889


# --- weights ---


def tiny_model(seed: int) -> torch.nn.Module:
    """The model that `NAMED` builds for digits, with weights that another seed gives."""
    torch.manual_seed(seed)
    model = build_model(describe_model("convnext_atto.d2_in1k", kwargs=TINY, num_classes=10, input_size=32))
    for parameter in model.parameters():  # a fresh head is almost zero: this one has opinions
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def loss_of(call: Callable[..., Any], folder: Path, *words: str) -> float:
    done = call("evaluate.py", *words, "--dataset", "digits", "--results-file", "results.json")
    assert (done.status, done.err) == (0, [])
    return results(folder)["loss"]


def test_weights_of_a_checkpoint_for_a_model_by_name(
    start: Callable[..., Any], call: Callable[..., Any], tmp_path: Path
):
    spec = describe_model("convnext_atto.d2_in1k", kwargs=TINY, num_classes=10, input_size=32)
    for seed in (1, 2):
        save_model(tmp_path / f"{seed}.safetensors", tiny_model(seed), spec, provenance={})
    whole = [loss_of(call, tmp_path, "--model", f"{seed}.safetensors", "--workers", "0") for seed in (1, 2)]
    assert abs(whole[0] - whole[1]) > 1e-3
    # into a model by name, whose published weights are left where they are
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    words = [*NAMED, "--checkpoint", "2.safetensors", "--dataset", "digits", "--results-file", "named.json"]
    done = start("evaluate.py", *words, **environment)
    assert (done.status, done.err) == (0, [])
    row = results(tmp_path, "named.json")
    assert (row["model"], row["checkpoint"]) == ("convnext_atto.d2_in1k", "2.safetensors")
    assert row["loss"] == pytest.approx(whole[1], rel=1e-9)
    # and into the structure of another checkpoint
    both = ["--model", "1.safetensors", "--workers", "0", "--checkpoint", "2.safetensors"]
    assert loss_of(call, tmp_path, *both) == pytest.approx(whole[1], rel=1e-9)


def test_averaged_weights_are_taken_where_there_are_some(call: Callable[..., Any], tmp_path: Path):
    raw, averaged = tiny_model(1).state_dict(), tiny_model(2).state_dict()
    torch.save({"model": raw, "model_ema": averaged, "epoch": 3}, tmp_path / "both.pth")
    torch.save({"model": raw}, tmp_path / "raw.pth")
    torch.save({"model": averaged}, tmp_path / "averaged.pth")
    only_raw, only_averaged = (loss_of(call, tmp_path, *NAMED, "--checkpoint", f"{n}.pth") for n in ("raw", "averaged"))
    assert abs(only_raw - only_averaged) > 1e-3
    both = [*NAMED, "--checkpoint", "both.pth"]
    assert loss_of(call, tmp_path, *both) == loss_of(call, tmp_path, *both, "--use-ema") == only_averaged
    assert loss_of(call, tmp_path, *both, "--no-use-ema") == only_raw


def test_averaged_weights_of_a_training_run(call: Callable[..., Any], tmp_path: Path):
    spec = describe_model("convnext_atto.d2_in1k", kwargs=TINY, num_classes=10, input_size=32)
    save_model(tmp_path / "averaged.safetensors", tiny_model(1), spec, provenance={}, averaged=True)
    save_model(tmp_path / "raw.safetensors", tiny_model(1), spec, provenance={})
    whole, into = (
        ["--model", "averaged.safetensors", "--workers", "0"],
        [*NAMED, "--checkpoint", "averaged.safetensors"],
    )
    loss = loss_of(call, tmp_path, "--model", "raw.safetensors", "--no-use-ema", "--workers", "0")
    assert [loss_of(call, tmp_path, *words, "--use-ema") for words in (whole, into)] == [loss, loss]
    for words in (whole, into):
        done = call("evaluate.py", *words, "--no-use-ema", "--dataset", "digits")
        expected = "evaluate.py: averaged.safetensors holds averaged weights only: leave out --no-use-ema"
        assert (done.status, done.err) == (1, [expected])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([*NAMED, "--use-ema"], 2, "there is no checkpoint"),
        ([*NAMED, "--no-use-ema"], 2, "there is no checkpoint"),
        ([*NAMED, "--checkpoint", "missing.safetensors"], 1, "no such checkpoint: missing.safetensors"),
        ([*NAMED, "--checkpoint", DIGITS_DEIT[1]], 1, "digits_deit.safetensors"),
        ([*DIGITS_DEIT[:2], "--use-ema"], 1, "digits_deit.safetensors holds no averaged weights"),
        ([*NAMED, "--checkpoint", DIGITS_DEIT[1], "--use-ema"], 1, "digits_deit.safetensors holds no averaged weights"),
    ],
)
def test_weights_that_are_not_there(call: Callable[..., Any], words: list[str], status: int, message: str):
    done = call("evaluate.py", *words, "--dataset", "digits")
    assert done.status == status
    assert len(done.err) == 1 and message in done.err[0]


# --- unreadable images ---


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """361 images of random colours in two classes; six of them are cut short."""
    root = tmp_path_factory.mktemp("images")
    colours = torch.randint(256, (IMAGES, 3), generator=torch.Generator().manual_seed(0)).tolist()
    for number, colour in enumerate(colours):
        path = root / "val" / ("cat" if number < 180 else "dog") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), tuple(colour)).save(path)
        if number in DAMAGED:
            path.write_bytes(path.read_bytes()[:40])
    return root


def words_for(images: Path, model: Path, *, workers: int = 0) -> list[str]:
    return ["--model", str(model), "--data-path", str(images), "--batch-size", "2", "--workers", str(workers)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-class model that is sometimes right."""
    path = tmp_path_factory.mktemp("model") / "two.safetensors"
    kwargs = {"patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 1}
    spec = describe_model("vit_tiny_patch16_224", kwargs=kwargs, num_classes=2, input_size=16)
    torch.manual_seed(0)
    save_model(path, build_model(spec), spec, provenance={})
    return path


def names_in(text: str) -> list[int]:
    return [number for number in range(IMAGES) if f"/{number:03}.png: " in text]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_images_are_named_and_fail_the_run(
    call: Callable[..., Any], tmp_path: Path, images: Path, classifier: Path, workers: int
):
    words = words_for(images, classifier, workers=workers)
    done = call("evaluate.py", *words, "--results-file", "results.json")
    assert done.status == 1 and len(done.err) == 1
    assert done.err[0].startswith("evaluate.py: cannot read 6 images: ") and "--skip-unreadable" in done.err[0]
    assert names_in(done.err[0]) == list(DAMAGED)
    assert "Accuracy" not in done.out and not list(tmp_path.iterdir())

    done = call("evaluate.py", *words, "--results-file", "results.json", "--skip-unreadable")
    assert (done.status, done.err) == (0, [])
    skipped, accuracy = done.out.splitlines()[-2:]
    assert skipped.startswith("Skipped 6 images: ") and skipped.endswith("; what follows is of the other 355")
    assert names_in(skipped) == list(DAMAGED) and accuracy.startswith("Accuracy: 0.")
    row = results(tmp_path)
    assert (row["num_images"], row["num_unreadable"]) == (IMAGES - 6, 6)


def test_two_processes_count_and_name_what_one_does(
    start: Callable[..., Any], call: Callable[..., Any], tmp_path: Path, images: Path, classifier: Path
):
    alone = call("evaluate.py", *words_for(images, classifier), "--skip-unreadable", "--results-file", "alone.json")
    assert (alone.status, alone.err) == (0, [])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "evaluate.py")]
    flags = ["--device", "cpu", "--results-file", "two.json"]
    failed = start(*torchrun, *words_for(images, classifier), *flags)
    assert failed.status == 1 and not (tmp_path / "two.json").exists()
    (line, *_) = [line for line in failed.err if "of 2: cannot read 6 images: " in line]
    assert names_in(line) == list(DAMAGED)
    assert "Accuracy" not in failed.out

    done = start(*torchrun, *words_for(images, classifier, workers=2), *flags, "--skip-unreadable")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-2:] == alone.out.splitlines()[-2:], "names, counts and accuracy"
    one, two = results(tmp_path, "alone.json"), results(tmp_path, "two.json")
    assert (two["num_images"], two["num_unreadable"]) == (IMAGES - 6, 6)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    different = {"loss", "samples_per_sec"}
    assert {key: two[key] for key in two if key not in different} == {
        key: one[key] for key in one if key not in different
    }
    assert 0 < one["top1"] < 100


def test_no_readable_image_at_all_is_said_with_skip_too(call: Callable[..., Any], tmp_path: Path, classifier: Path):
    for name in ("cat", "dog"):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        (folder / "0.png").write_text("not an image")
    done = call("evaluate.py", *words_for(tmp_path, classifier), "--skip-unreadable")
    assert done.status == 1 and len(done.err) == 1
    assert "no images to evaluate on: cannot read 2 images: " in done.err[0]
    assert "cat/0.png: not an image" in done.err[0]
