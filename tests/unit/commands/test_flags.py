"""Shared flags: one spelling each, typed values behind them, and what happens when a command fails."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from isomorphic.checkpoints.save import save_model
from isomorphic.commands import entry, flags, opening
from isomorphic.data.sources import DataSource
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from isomorphic.processes import distributed

VIT = ["--model", "deit_tiny_patch16_224", "--no-pretrained"]
SMALL = ["--model-kwargs", "embed_dim=24", "depth=1", "num_heads=3"]
DIGITS = ["--dataset", "digits"]


def parser() -> argparse.ArgumentParser:
    made = flags.make_parser("A command of the tests.")
    flags.add_model_arguments(made)
    flags.add_data_arguments(made, batch_size=64)
    made.add_argument("--amp", action="store_true")
    return made


def parse(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


def usage_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- flags ---


def test_defaults():
    args = parse("--model", "resnet18")
    assert (args.model_kwargs, args.no_pretrained, args.seed, args.device) == ([], False, 0, "auto")
    assert (args.data_path, args.dataset, args.batch_size, args.workers) == ("data/imagenet", "", 64, 8)
    assert opening.data_source(args) == DataSource("", "data/imagenet", 64, 0)


def test_the_other_spellings():
    args = parse("--model", "x", "-b", "3", "-j", "0", "--val-resize", "48")
    assert (args.batch_size, args.workers, args.val_resize_size) == (3, 0, 48)


def test_later_flags_win_and_model_arguments_add_up():
    args = parse("--model", "a", "--batch-size", "64", "--model-kwargs", "a=1", "b=2", "--model", "b", "-b", "4",
                 "--model-kwargs", "b=3")  # fmt: skip
    assert (args.model, args.batch_size, dict(args.model_kwargs)) == ("b", 4, {"a": 1, "b": 3})
    assert parse("--model", "a").model_kwargs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "x", "--nonesuch"], "unrecognized arguments: --nonesuch"),
        (["--model", "x", "--batch", "4"], "unrecognized arguments: --batch"),
        (["--model", "x", "--no-pre"], "unrecognized arguments: --no-pre"),
        (["--model", "x", "stray"], "unrecognized arguments: stray"),
        ([], "required: --model"),
        (["--model", "x", "--model-kwargs", "drop_rate"], "'drop_rate' is not KEY=VALUE"),
        (["--model", "x", "--model-kwargs", "=3"], "'=3' is not KEY=VALUE"),
        (["--model", "x", "--batch-size", "0"], "0 is less than 1"),
        (["--model", "x", "--batch-size", "many"], "'many' is not a whole number"),
        (["--model", "x", "--workers", "-1"], "-1 is less than 0"),
        (["--model", "x", "--seed", "-1"], "-1 is less than 0"),
        (["--model", "x", "--interpolation", "cubist"], "invalid choice: 'cubist'"),
    ],
)
def test_usage_errors_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in usage_error(capsys, *words)


def test_help_shows_defaults_that_say_something(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "folder with train/ and val/ (default: data/imagenet)" in text
    assert "default: None" not in text and "default: False" not in text and "default: []" not in text


# --- values ---


@pytest.mark.parametrize(
    ("text", "value", "relative"),
    [
        ("4.2G", 4.2e9, False),
        ("4.16g", 4.16e9, False),
        ("600M", 600e6, False),
        ("20k", 20e3, False),
        ("1e9", 1e9, False),
        ("1234567", 1234567, False),
        ("50%", 0.5, True),
        ("12.5%", 0.125, True),
    ],
)
def test_budgets(text: str, value: float, relative: bool):
    budget = flags.budget(text)
    assert budget.value == pytest.approx(value) and budget.relative is relative
    assert budget.of(1000) == round(1000 * value if relative else value)


@pytest.mark.parametrize(
    "text", ["", "G", "%", "4.2T", "4.2GB", "4,2G", "-1G", "0", "0%", "nan", "inf", "infG", "1e305G"]
)
def test_budgets_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        flags.budget(text)


@pytest.mark.parametrize(
    ("text", "seconds", "relative"),
    [("5ms", 0.005, False), ("0.5s", 0.5, False), ("800us", 8e-4, False), ("1e2ms", 0.1, False), ("50%", 0.5, True)],
)
def test_durations(text: str, seconds: float, relative: bool):
    budget = flags.duration(text)
    assert budget.value == pytest.approx(seconds) and budget.relative is relative


@pytest.mark.parametrize("text", ["", "5", "ms", "5 min", "-1ms", "0ms", "nanms", "infs", "110%", "5G"])
def test_durations_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        flags.duration(text)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("drop_rate=0.1", ("drop_rate", 0.1)),
        ("depths=[3, 3, 9, 3]", ("depths", [3, 3, 9, 3])),
        ("qkv_bias=false", ("qkv_bias", False)),
        ("zero_init_last=False", ("zero_init_last", False)),  # as Python writes it
        ("init_values=None", ("init_values", None)),
        ("dims=(8, 16)", ("dims", (8, 16))),
        ("in_chans=1", ("in_chans", 1)),
        ("global_pool=avg", ("global_pool", "avg")),
        ("a=b=c", ("a", "b=c")),
        ("text=", ("text", "")),
        ("code=__import__('os').getcwd()", ("code", "__import__('os').getcwd()")),
    ],
)
def test_model_arguments_are_values_of_json_or_python_or_text(text: str, pair: tuple[str, object]):
    assert flags.key_value(text) == pair


def test_a_file_name_tells_what_is_in_it():
    assert flags.results_file("a/b.json") == "a/b.json" and flags.results_file("b.csv") == "b.csv"
    for text in ("results.txt", "results", "results.json.gz", "json"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must end in \.json or \.csv"):
            flags.results_file(text)


def test_shares_and_ratios():
    assert [flags.share(text) for text in ("0", "0.25", "1")] == [0, 0.25, 1]
    assert [flags.ratio(text) for text in ("0", "0.999")] == [0, 0.999]
    for convert, texts in ((flags.share, ("1.01", "-0.1", "nan", "half")), (flags.ratio, ("1", "-0.1", "inf", ""))):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError):
                convert(text)


# --- from flags to a model and its images ---


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


def test_a_checkpoint_with_fixed_positions_takes_no_other_size(tmp_path: Path):
    spec = describe_model("deit_tiny_patch16_224", num_classes=10, input_size=32,
                          kwargs={"embed_dim": 24, "depth": 1, "num_heads": 3})  # fmt: skip
    path = tmp_path / "vit.safetensors"
    save_model(path, build_model(spec), spec, provenance={})
    with pytest.raises(UserError, match="does not take images of 64×64 pixels: .*32"):
        opening.open_model_from(parse("--model", str(path), *DIGITS, "--input-size", "64"))


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


# --- the process ---


def test_start_seeds_everything():
    def draw(seed: str) -> tuple[float, float, float]:
        device = entry.start(parse("--model", "x", "--seed", seed, "--device", "cpu"))
        assert device == torch.device("cpu")
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw("3") == draw("3") != draw("4")
    entry.start(parse("--model", "x", "--seed", str(2**32 + 1), "--device", "cpu"))


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert entry.pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["banana", "cuda:99", "", "cpu:x", "meta"])
def test_devices_that_are_not_there(name: str):
    with pytest.raises(UserError, match=f"--device {name}: not to be had here") as error:
        entry.pick_device(name)
    assert "\n" not in str(error.value)


def test_amp_stands_for_bfloat16():
    assert opening.amp_dtype(parse("--model", "x", "--amp")) is torch.bfloat16
    assert opening.amp_dtype(parse("--model", "x")) is None


def test_only_the_first_process_talks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    entry.say("first")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    entry.say("second")
    assert capsys.readouterr().out == "first\n"


def failing(error: BaseException) -> tuple[int, type[BaseException]]:
    def main() -> None:
        raise error

    with pytest.raises(BaseException) as stop:
        entry.run(main)
    return getattr(stop.value, "code", None), type(stop.value)  # type: ignore[return-value]


def test_what_the_user_can_put_right_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/prune.py"])
    assert failing(UserError("no such\nfolder")) == (1, SystemExit)
    assert capsys.readouterr().err == "prune.py: no such folder\n"
    assert failing(KeyboardInterrupt()) == (130, SystemExit)
    assert capsys.readouterr().err == "prune.py: interrupted\n"


def test_what_a_loader_process_found_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    try:
        raise UserError("cannot read image a.png")
    except UserError:
        formatted = traceback.format_exc()
    failing(UserError(f"Caught UserError in DataLoader worker process 0.\nOriginal {formatted}"))
    assert capsys.readouterr().err == "evaluate.py: cannot read image a.png\n"


def test_bugs_keep_their_traceback():
    assert failing(KeyError("bug"))[1] is KeyError
    assert failing(RuntimeError("bug"))[1] is RuntimeError


def test_a_command_that_succeeds_returns():
    entry.run(lambda: None)


def test_a_dead_loader_process_ends_the_command_at_once():
    """torch may wait for the dead one's lock when Python ends; here something waits for sure."""
    script = """
import atexit, time
from isomorphic.commands import entry, flags, opening
from isomorphic.data.workers import DeadWorker

def main():
    atexit.register(time.sleep, 1000)
    raise DeadWorker("a data loader process died")

entry.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "-c: a data loader process died\n"
