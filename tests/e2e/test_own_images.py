"""A user's own folder of images, from training to pruning: class names, class maps, rare classes, broken files."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from isomorphic.checkpoints.open import open_model, read_header
from isomorphic.checkpoints.save import save_model
from isomorphic.models import build_model, describe_model
from tests.e2e.conftest import REPOSITORY
from tests.versions import IS_NEWEST_TORCH

PAGE = REPOSITORY / "docs" / "images.md"
CLASSES = ["ant", "bee", "cat", "dog", "eel"]
KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
COMMON = ["--workers", "0", "--batch-size", "8", "--device", "cpu"]
FRESH = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--input-size", "16", *COMMON, "--model-kwargs"]
FRESH += [f"{name}={value}" for name, value in KWARGS.items()]
TRAIN = ["--epochs", "1", "--opt", "adamw", "--lr", "1e-3"]
IN_TRAINING = 4  # images of a class


def make_images(root: Path, classes: list[str]) -> None:
    """Noise with a colour of its own for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IN_TRAINING), ("val", 2)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = rng.integers(60, size=(20, 20, 3), dtype=np.uint8)
                pixels[..., number % 3] += np.uint8(40 * (number + 1) % 190)
                Image.fromarray(pixels).save(root / split / name / f"{image}.png")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    make_images(tmp_path / "own", CLASSES)
    return tmp_path / "own"


def save_net(path: Path, names: tuple[str, ...] = ()) -> None:
    """A random model of five classes, with or without their names."""
    spec = describe_model("vit_tiny_patch16_224", kwargs=KWARGS, num_classes=5, input_size=16)
    torch.manual_seed(0)
    save_model(path, build_model(spec), dataclasses.replace(spec, class_names=names), provenance={})


def results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def names_in(path: Path) -> list[str] | None:
    return read_header(path).get("class_names")


def evaluate(call: Callable[..., Any], *words: str) -> tuple[Any, dict[str, Any]]:
    done = call("evaluate.py", *COMMON, *words, "--results-file", "r.json")
    return done, results(Path("r.json")) if done.status == 0 else {}


# --- class names ---


def test_names_travel_from_training_to_pruning_to_training(call: Callable[..., Any], own: Path, tmp_path: Path):
    data = ["--data-path", "own"]
    assert call("finetune.py", *FRESH, *TRAIN, *data, "--output-dir", "dense").status == 0
    assert results(tmp_path / "dense" / "run.json")["class_names"] == CLASSES
    prune = ["--model", "dense/best.safetensors", *COMMON, "--pruning-type", "l1", "--save-as", "pruned.safetensors"]
    assert call("prune.py", *prune, *data).status == 0
    again = ["--model", "pruned.safetensors", *COMMON, *TRAIN, "--output-dir", "pruned"]
    assert call("finetune.py", *again, *data).status == 0
    for file in ("dense/best", "dense/last", "pruned", "pruned/best"):
        assert names_in(tmp_path / f"{file}.safetensors") == CLASSES, file
    spec = open_model(tmp_path / "pruned" / "best.safetensors")[1]
    assert spec.class_names == tuple(CLASSES)


@pytest.mark.parametrize("command", ["evaluate.py", "finetune.py", "prune.py", "weights alone"])
def test_data_of_other_classes_stop_every_command(command: str, call: Callable[..., Any], tmp_path: Path):
    make_images(tmp_path / "other", ["ant", "bee", "cow", "dog", "eel"])
    save_net(tmp_path / "net.safetensors", tuple(CLASSES))
    words = ["--model", "net.safetensors", *COMMON, "--data-path", "other"]
    more = {"finetune.py": [*TRAIN, "--output-dir", "run"], "prune.py": ["--save-as", "new.safetensors"]}
    words += more.get(command, [])
    if command == "weights alone":
        command = "evaluate.py"
        words = [*FRESH, "num_classes=5", "--checkpoint", "net.safetensors", "--data-path", "other"]
    done = call(command, *words)
    assert done.status == 1 and len(done.err) == 1
    assert "class 2 is 'cow' in the data and 'cat' in the model" in done.err[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "new.safetensors").exists()
    assert call(command, *words, "--ignore-class-names").status == 0
    if command == "finetune.py":  # what it was trained on is what its logits stand for
        assert names_in(tmp_path / "run" / "best.safetensors") == ["ant", "bee", "cow", "dog", "eel"]
    if command == "prune.py":
        assert names_in(tmp_path / "new.safetensors") == CLASSES


def test_a_model_without_names_is_evaluated_as_before_and_learns_them(
    call: Callable[..., Any], own: Path, tmp_path: Path
):
    save_net(tmp_path / "net.safetensors")
    assert names_in(tmp_path / "net.safetensors") is None
    make_images(tmp_path / "other", ["v", "w", "x", "y", "z"])
    for data in ("own", "other"):
        assert evaluate(call, "--model", "net.safetensors", "--data-path", data)[0].status == 0
    words = ["--model", "net.safetensors", *COMMON, "--data-path", "own"]
    assert call("prune.py", *words, "--pruning-type", "l1", "--save-as", "unseen.safetensors").status == 0
    assert call("prune.py", *words, "--taylor-batches", "1", "--save-as", "seen.safetensors").status == 0
    assert names_in(tmp_path / "unseen.safetensors") is None  # images that it had nothing to do with
    assert names_in(tmp_path / "seen.safetensors") == CLASSES


def test_a_resumed_run_has_the_same_classes(call: Callable[..., Any], own: Path, tmp_path: Path):
    words = ["finetune.py", *FRESH, *TRAIN, "--data-path", "own", "--output-dir", "run"]
    assert call(*words).status == 0
    for split in ("train", "val"):
        (own / split / "cat").rename(own / split / "cow")
    done = call(*words, "--resume", "auto")
    assert done.status == 1 and len(done.err) == 1
    assert "belongs to a run with other classes: class 2 is 'cow' now and 'cat' then" in done.err[0]
    assert call(*words, "--resume", "auto", "--ignore-class-names").status == 0


def test_a_teacher_of_other_classes_is_refused(call: Callable[..., Any], own: Path, tmp_path: Path):
    save_net(tmp_path / "teacher.safetensors", ("ant", "bee", "cat", "eel", "dog"))
    words = [*FRESH, *TRAIN, "--data-path", "own", "--output-dir", "run", "--teacher-model", "teacher.safetensors"]
    done = call("finetune.py", *words)
    assert done.status == 1 and len(done.err) == 1
    assert "made for other classes: class 3 is 'dog' of the student and 'eel' of the teacher" in done.err[0]
    assert call("finetune.py", *words, "--ignore-class-names").status == 0


# --- parts of the classes ---


def test_a_part_of_the_classes_has_the_labels_of_the_whole(call: Callable[..., Any], own: Path, tmp_path: Path):
    """By the model's names, or by a class map; each image counts for its own class."""
    save_net(tmp_path / "named.safetensors", tuple(CLASSES))
    save_net(tmp_path / "nameless.safetensors")
    shutil.rmtree(own / "val" / "ant")
    _, expected = evaluate(call, "--model", "nameless.safetensors", "--data-path", "own")  # by train/
    shutil.rmtree(own / "train")
    done, named = evaluate(call, "--model", "named.safetensors", "--data-path", "own")
    assert "No images of 1 of 5 classes (ant) in own/val: the labels are those of the model" in done.out
    (tmp_path / "five.txt").write_text("\n".join(CLASSES))
    _, mapped = evaluate(call, "--model", "nameless.safetensors", "--data-path", "own", "--class-map", "five.txt")
    for found in (named, mapped):
        assert {key: found[key] for key in ("num_images", "top1", "loss")} == {
            key: expected[key] for key in ("num_images", "top1", "loss")
        }
    done, _ = evaluate(call, "--model", "nameless.safetensors", "--data-path", "own")
    assert done.status == 1 and "the model has 5 classes but the data under own has 4" in done.err[0]


def test_a_class_map_trains_a_model_of_all_its_classes(call: Callable[..., Any], own: Path, tmp_path: Path):
    (tmp_path / "seven.txt").write_text("eel\nfox\nant\ncat\nbee\ngnu\ndog\n")
    words = [*FRESH, *TRAIN, "--data-path", "own", "--output-dir", "run", "--class-map", "seven.txt"]
    assert call("finetune.py", *words).status == 0
    assert names_in(tmp_path / "run" / "best.safetensors") == ["eel", "fox", "ant", "cat", "bee", "gnu", "dog"]
    _, without = evaluate(call, "--model", "run/best.safetensors", "--data-path", "own")  # the names are enough
    _, with_map = evaluate(call, "--model", "run/best.safetensors", "--data-path", "own", "--class-map", "seven.txt")
    assert without["loss"] == with_map["loss"] and without["num_images"] == 10


# --- broken images ---


def break_images(own: Path, *names: str) -> None:
    for name in names:
        (own / name).write_text("<html>")


def test_a_run_that_met_a_broken_image_goes_on_without_it(call: Callable[..., Any], own: Path, tmp_path: Path):
    """It ends with the very weights of a run that was told to skip it from the start."""
    break_images(own, "train/bee/3.png", "val/eel/0.png")
    words = ["finetune.py", *FRESH, *TRAIN, "--data-path", "own", "--batch-size", "2", "--checkpoint-steps", "1"]
    words += ["--auto-augment", "ra", "--epochs", "2", "--mixup-alpha", "0.2"]
    done = call(*words, "--output-dir", "run")
    assert done.status == 1 and len(done.err) == 1
    assert "cannot read image own/train/bee/3.png: not an image" in done.err[0]
    assert "--skip-unreadable" in done.err[0] and "tools/check_images.py" in done.err[0]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["counters"]["step"] == 8
    done = call(*words, "--output-dir", "run", "--resume", "auto")
    assert done.status == 1, "it is still there"
    resumed = call(*words, "--output-dir", "run", "--resume", "auto", "--skip-unreadable")
    whole = call(*words, "--output-dir", "whole", "--skip-unreadable")
    for done in (resumed, whole):
        assert (done.status, done.err) == (0, [])
        notes = [line for line in done.out.splitlines() if line.startswith("Skipped")]
        assert notes == [
            "Skipped image own/train/bee/3.png: not an image; the next image that can be read stands in for each",
            "Skipped image own/val/eel/0.png: not an image; validation is of the other images",
        ]
    for name in ("best", "last"):
        ours, theirs = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("run", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


def test_broken_validation_images_are_all_named_after_the_epoch(call: Callable[..., Any], own: Path, tmp_path: Path):
    break_images(own, "val/ant/0.png", "val/dog/1.png")
    words = [*FRESH, *TRAIN, "--data-path", "own", "--output-dir", "run"]
    done = call("finetune.py", *words)
    assert done.status == 1 and len(done.err) == 1
    assert "cannot read 2 images: own/val/ant/0.png: not an image; own/val/dog/1.png" in done.err[0]
    assert (tmp_path / "run" / "state.pt").is_file(), "the epoch is not lost"
    done = call("finetune.py", *words, "--resume", "auto", "--skip-unreadable", "0.15")
    assert done.status == 1 and "these are more than 15% of 10 images" in done.err[0]
    done = call("finetune.py", *words, "--resume", "auto", "--skip-unreadable", "0.2")
    assert done.status == 0 and "Skipped 2 images: own/val/ant/0.png" in done.out


def test_pruning_scores_on_what_can_be_read(call: Callable[..., Any], own: Path, tmp_path: Path):
    break_images(own, "train/ant/0.png", "train/ant/1.png", "val/dog/1.png")
    words = [*FRESH, "--data-path", "own", "--save-as", "pruned.safetensors", "--recover", "compensate"]
    words += ["--test-accuracy", "--taylor-batches", "9", "--calibration-batches", "9"]
    done = call("prune.py", *words)
    assert done.status == 1 and "cannot read image own/val/dog/1.png" in done.err[0]
    assert not (tmp_path / "pruned.safetensors").exists()
    done = call("prune.py", *words, "--skip-unreadable")
    assert done.status == 0
    assert done.out.count("Skipped image own/val/dog/1.png: not an image; what follows is of the other 9") == 2
    assert done.out.count("Skipped 2 images: own/train/ant/0.png: not an image; own/train/ant/1.png") == 2
    done = call("prune.py", *words, "--skip-unreadable", "0.05")
    assert done.status == 1 and "more than 5% of" in done.err[0]


@pytest.mark.slow
def test_two_processes_skip_together(start: Callable[..., Any], own: Path, tmp_path: Path):
    break_images(own, "train/bee/2.png", "train/eel/0.png")
    words = [*FRESH, *TRAIN, "--data-path", str(own), "--batch-size", "3", "--output-dir", "run", "--skip-unreadable"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "finetune.py")]
    done = start(*torchrun, *words)
    assert done.status == 0, done.err
    (note,) = [line for line in done.out.splitlines() if line.startswith("Skipped")]
    assert note.startswith("Skipped 2 images: ") and "bee/2.png" in note and "eel/0.png" in note
    failed = start(*torchrun, *words[:-1], "--skip-unreadable", "0.05", "--output-dir", "other")
    assert failed.status == 1
    assert len([line for line in failed.err if "these are more than 5% of 20 images" in line]) == 1


def test_all_broken_images_are_listed_before_training(call: Callable[..., Any], own: Path):
    break_images(own, "train/bee/2.png", "train/bee/3.png", "val/eel/0.png")
    (own / "train" / "ant" / "._0.png").write_text("")
    (own / "train" / "ant" / "0.heic").write_text("")
    for workers in ("0", "2"):
        done = call("tools/check_images.py", "own", "--workers", workers)
        assert done.status == 1
        assert sorted(done.out.splitlines()[:3]) == [
            f"own/{name}: not an image" for name in ("train/bee/2.png", "train/bee/3.png", "val/eel/0.png")
        ]
        assert done.out.splitlines()[3:] == [
            "Left out of own/train: 1 .heic (not read by Pillow); 1 hidden or of another system",
            "30 images in own, of which 3 cannot be read",
        ]
    done = call("tools/check_images.py", "own/val/ant")
    assert (done.status, done.out) == (0, "2 images in own/val/ant, of which 0 cannot be read\n")
    done = call("tools/check_images.py", "own/test")
    assert done.status == 1 and done.err == ["check_images.py: cannot list own/test: No such file or directory"]


# --- the page ---


# What keeps the commands of the page short on one processor.
LESS = {
    "tools/check_images.py": ["--workers", "1"],
    "finetune.py": [*COMMON, "--epochs", "1"],
    "prune.py": COMMON,
    "evaluate.py": COMMON,
}


def page_commands() -> list[list[str]]:
    """The commands at the top of docs/images.md, without the interpreter."""
    block = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_the_commands_of_the_page(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As they stand, but for a small model, small images, one epoch; ImageNet's weights are random ones in a file."""
    monkeypatch.chdir(tmp_path)
    drawing = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    exec(drawing.replace('"train": 40, "val": 10', '"train": 4, "val": 2'), {})
    spec = describe_model("resnet10t", kwargs={"channels": [8, 8, 8, 8], "stem_width": 8})
    torch.save(build_model(spec).state_dict(), "imagenet.pth")
    kwargs = ["channels=[8,8,8,8]", "stem_width=8"]
    small = ["--model", "resnet10t", "--checkpoint", "imagenet.pth", "--input-size", "32", "--model-kwargs", *kwargs]
    said = []
    commands = page_commands()
    assert len(commands) == 6
    can_export = IS_NEWEST_TORCH and all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    for command, *words in commands:
        if command == "tools/export.py" and not can_export:
            continue
        if "mobilenetv3_small_100.lamb_in1k" in words:
            at = words.index("mobilenetv3_small_100.lamb_in1k")
            words[at - 1 : at + 1] = small
        words += LESS.get(command, [])
        done = call(command, *words)
        assert (done.status, done.err) == (0, []), command
        said.append(done.out)
    shapes = ["circle", "frame", "ring", "square", "wedge"]
    assert said[0].startswith("30 images in mine, of which 0 cannot be read")
    assert "New head for 5 classes in place of 1000" in said[1]
    assert names_in(tmp_path / "output/mine/finetuned/best.safetensors") == shapes
    macs, left = (float(value) for value in re.findall(r"MACs: (\S+) M => (\S+) M", said[2])[0])
    assert 0.3 * macs < left <= 0.5 * macs
    assert re.search(r"^Accuracy: ", said[4], re.MULTILINE) and "Latency" in said[4]
    if can_export:
        import onnx

        told = {entry.key: json.loads(entry.value) for entry in onnx.load("mine.onnx").metadata_props}
        assert told["class_names"] == shapes and told["preprocessing"]["input_size"] == 32
