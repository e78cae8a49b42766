"""Shared flags: one spelling each, and typed values behind them."""

from __future__ import annotations

import argparse

import pytest

from isomorphic.commands import flags, opening
from isomorphic.data.sources import DataSource
from tests.unit.commands.conftest import parse


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
