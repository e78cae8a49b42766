"""From flags to a model and its images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isomorphic.checkpoints.save import save_model
from isomorphic.commands import flags, opening
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from tests.unit.commands.conftest import DIGITS, SMALL, VIT, parse, parser


def test_a_fresh_model_takes_the_classes_of_the_data():
    model, spec = opening.open_model_from(parse(*VIT, *SMALL, *DIGITS, "--input-size", "32"))
    assert spec.kwargs == {"embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 10, "img_size": 32}
    images = opening.evaluation_images(parse("--model", "x", *DIGITS), "val", model, spec)
    assert len(images) == 360 and images[0][0].shape == (3, 32, 32)  # type: ignore[arg-type]
    synthetic, _ = opening.open_model_from(parse(*VIT, *SMALL, "--dataset", "synthetic"))
    assert synthetic.num_classes == 1000


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([], (224, 256)),
        (["--input-size", "112"], (112, 128)),
        (["--input-size", "192"], (192, 219)),
        (["--input-size", "112", "--val-resize-size", "112"], (112, 112)),
        (["--val-resize-size", "248"], (224, 248)),
    ],
)
def test_input_size_and_resize(words: list[str], sizes: tuple[int, int]):
    _, spec = opening.open_model_from(
        parse("--model", "convnext_atto", "--no-pretrained", "--dataset", "synthetic", *words)
    )
    assert (spec.preprocessing.input_size, spec.preprocessing.resize_size) == sizes


def test_flags_of_the_transform_are_recorded_in_the_spec():
    words = ["--no-imagenet-mean-std", "--interpolation", "bilinear"]
    _, spec = opening.open_model_from(parse(*VIT, *SMALL, *DIGITS, *words))
    assert spec.preprocessing.mean == spec.preprocessing.std == (0.5, 0.5, 0.5)
    assert spec.preprocessing.interpolation == "bilinear"


def test_a_checkpoint_keeps_its_transform_unless_a_flag_says_otherwise(tmp_path: Path):
    spec = describe_model("convnext_atto", kwargs={"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_classes": 10},
                          input_size=64)  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_model(path, build_model(spec), spec, provenance={})
    assert opening.open_model_from(parse("--model", str(path), *DIGITS, "--no-pretrained"))[1] == spec
    changed = opening.open_model_from(parse("--model", str(path), *DIGITS, "--input-size", "32"))[1].preprocessing
    assert (changed.input_size, changed.resize_size, changed.mean) == (32, 37, spec.preprocessing.mean)


def test_classes_that_differ_from_the_data():
    with pytest.raises(UserError, match="model has 7 classes but dataset 'digits' has 10"):
        opening.open_model_from(parse(*VIT, *SMALL, "num_classes=7", *DIGITS))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-kwargs", "num_classes=0"], "resnet18 has no classifier with num_classes=0"),
        (["--model-kwargs", "in_chans=1"], "resnet18 does not take images of 64×64 pixels: .*1 channels"),
        (["--model", "convnext_atto", "--input-size", "16"], "convnext_atto does not take images of 16×16 pixels"),
    ],
)
def test_models_that_could_not_be_run(words: list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        opening.open_model_from(
            parse("--model", "resnet18", "--no-pretrained", "--input-size", "64", "--dataset", "synthetic", *words)
        )
    assert "\n" not in str(error.value)


def tiny_vit(tmp_path: Path) -> str:
    """A checkpoint of a DeiT for images of 32 × 32 pixels and 10 classes."""
    spec = describe_model("deit_tiny_patch16_224", num_classes=10, input_size=32,
                          kwargs={"embed_dim": 24, "depth": 1, "num_heads": 3})  # fmt: skip
    save_model(tmp_path / "vit.safetensors", build_model(spec), spec, provenance={})
    return str(tmp_path / "vit.safetensors")


def test_a_checkpoint_with_fixed_positions_takes_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tiny_vit(tmp_path)
    model, spec = opening.open_model_from(parse("--model", path, *DIGITS, "--input-size", "64"))
    assert model.get_parameter("pos_embed").shape == (1, 17, 24) and spec.kwargs["img_size"] == 64
    assert (spec.preprocessing.input_size, spec.preprocessing.resize_size) == (64, 73)
    assert f"{path}: resampled to the model's input size: pos_embed, (1, 5, 24), is" in capsys.readouterr().out


NOISE = ["--dataset", "synthetic"]


def folders(root: Path, classes: int) -> list[str]:
    for split in ("train", "val"):
        for number in range(classes):
            (root / split / str(number)).mkdir(parents=True)
    return ["--data-path", str(root)]


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        (["--num-classes", "auto", *DIGITS], 10),
        (["--num-classes", "3", *NOISE], 3),
        (["--num-classes", "auto", *NOISE], 10),
        (["--model-kwargs", "num_classes=4", *NOISE], 4),
    ],
)
def test_a_checkpoint_gets_the_classes_that_are_asked_for(words: list[str], classes: int, tmp_path: Path):
    model, spec = opening.open_model_from(parse("--model", tiny_vit(tmp_path), *words))
    assert model.get_parameter("head.weight").shape == (classes, 24) and spec.kwargs["num_classes"] == classes


def test_classes_of_a_folder_are_the_new_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, path = folders(tmp_path / "data", 3), tiny_vit(tmp_path)
    with pytest.raises(UserError, match="model has 10 classes but the data under .* has 3: --num-classes auto gives"):
        opening.open_model_from(parse("--model", path, *data))
    torch.manual_seed(7)
    model, spec = opening.open_model_from(parse("--model", path, *data, "--num-classes", "auto"))
    assert spec.kwargs["num_classes"] == 3 and "New head for 3 classes in place of 10" in capsys.readouterr().out
    torch.manual_seed(7)
    again, _ = opening.open_model_from(parse("--model", path, *data, "--num-classes", "3"))
    assert torch.equal(model.get_parameter("head.weight"), again.get_parameter("head.weight"))
    with pytest.raises(UserError, match="model has 5 classes but the data"):
        opening.open_model_from(parse("--model", path, *data, "--num-classes", "5"))


def test_weights_of_a_file_for_a_model_by_name(tmp_path: Path):
    path, data = tmp_path / "w.ckpt", folders(tmp_path / "data", 3)
    spec = describe_model("deit_tiny_patch16_224", num_classes=10, input_size=32,
                          kwargs={"embed_dim": 24, "depth": 1, "num_heads": 3})  # fmt: skip
    trained = build_model(spec)
    torch.save({"state_dict": {f"model.{name}": value for name, value in trained.state_dict().items()}}, path)
    words = ["--model", "deit_tiny_patch16_224", *SMALL, "--input-size", "32", "--checkpoint", str(path)]
    model, opened = opening.open_model_from(parse(*words, *DIGITS))
    assert opened == spec
    assert torch.equal(model.get_parameter("head.weight"), trained.get_parameter("head.weight"))
    with pytest.raises(UserError, match="model has 10 classes but the data under"):
        opening.open_model_from(parse(*words, *data))
    _, opened = opening.open_model_from(parse(*words, *data, "--num-classes", "auto"))
    assert opened.kwargs["num_classes"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet18", "--use-ema"], "choose among a checkpoint's weights, and there is no checkpoint"),
        (["--model", "resnet18", "--num-classes", "3", "--model-kwargs", "num_classes=3"], "say the same: leave one"),
        (["--model", "resnet18", "--num-classes", "0"], "0 is less than 1"),
        (["--model", "resnet18", "--num-classes", "many"], "'many' is not a whole number"),
    ],
)
def test_flags_of_the_weights_that_contradict_themselves(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        made = parser()
        flags.check_model_arguments(made, made.parse_args(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=7, side=16):
        super().__init__(nn.Flatten(), nn.Linear(3 * side * side, num_classes))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py:Net"


def test_a_model_of_the_users_own_takes_the_flags_as_others_do(own: str):
    words = ["--model", own, "--no-pretrained", *DIGITS, "--input-size", "16", "--val-resize-size", "20"]
    model, spec = opening.open_model_from(parse(*words))
    assert spec.kwargs == {"num_classes": 10} and model.get_parameter("1.weight").shape == (10, 768)
    assert (spec.preprocessing.input_size, spec.preprocessing.resize_size) == (16, 20)
    images = opening.evaluation_images(parse(*words), "val", model, spec)
    assert images[0][0].shape == (3, 16, 16)
    wide = [*words, "--input-size", "32", "--model-kwargs", "side=32"]
    assert opening.open_model_from(parse(*wide))[1].kwargs == {"num_classes": 10, "side": 32}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-pretrained"], r"own.py:Net \(without --input-size\) does not take images of 224×224 pixels: "),
        (["--no-pretrained", "--input-size", "32"], "own.py:Net does not take images of 32×32 pixels: "),
        (["--input-size", "16"], "the model has 7 classes but dataset 'digits' has 10"),
        (["--is-torchvision"], "unknown torchvision model: .*own.py:Net"),
    ],
)
def test_models_of_the_users_own_that_do_not_fit(words: list[str], message: str, own: str):
    with pytest.raises(UserError, match=message) as error:
        opening.open_model_from(parse("--model", own, *DIGITS, *words))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_the_users_own_model_opens_with_its_file(own: str, tmp_path: Path):
    words = ["--model", own, "--no-pretrained", *DIGITS, "--input-size", "16"]
    model, spec = opening.open_model_from(parse(*words))
    path = tmp_path / "own.safetensors"
    save_model(path, model, spec, provenance={})
    again = ["--model", str(path), *DIGITS]
    reloaded, same_spec = opening.open_model_from(parse(*again, "--builder-file", own.removesuffix(":Net")))
    assert same_spec == spec
    assert torch.equal(reloaded.get_parameter("1.weight"), model.get_parameter("1.weight"))
    with pytest.raises(UserError, match="own.safetensors is a model of own.py, .* --builder-file path/to/own.py"):
        opening.open_model_from(parse(*again))


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("output/finetuned/best.safetensors", "best"),
        ("code/own.py:Net", "own_Net"),
        ("/code/own.py", "own.py"),
    ],
)
def test_names_of_what_is_made_of_a_model(model: str, stem: str):
    assert opening.output_stem(model) == stem


def test_amp_stands_for_bfloat16():
    assert opening.amp_dtype(parse("--model", "x", "--amp")) is torch.bfloat16
    assert opening.amp_dtype(parse("--model", "x")) is None
