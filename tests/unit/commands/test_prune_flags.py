"""The flags of prune.py, what they rule out, and the options that they become."""

from __future__ import annotations

import argparse

import pytest

from isomorphic.commands.prune_flags import named_ratio, needs_images, parse_args, plan_options
from isomorphic.pruning.planning import PlanOptions
from isomorphic.pruning.ranking.amounts import Amount

MODEL = ["--model", "convnext_atto"]


def test_defaults_are_those_of_python_and_a_ratio():
    args = parse_args(MODEL)
    assert plan_options(args, None) == PlanOptions(ratio=0.5, seed=args.seed)
    assert args.save_as == "output/pruned/convnext_atto.safetensors"
    assert (args.calibration_batches, args.fusion_normalization, args.fusion_masses) == (8, "source", "uniform")
    assert args.batch_size == 64 and not args.dry_run


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--target-macs", "4.2G"], "macs", Amount(4.2e9)),
        (["--target-params", "50%"], "params", Amount(0.5, True)),
        (["--target-latency", "5ms"], "latency", Amount(0.005)),
        (["--head-pruning-ratio", "0.25"], "head_ratio", 0.25),
        (["--head-dim-pruning-ratio", "0.25"], "head_dim_ratio", 0.25),
        (["--ignore", "head", "--ignore", "stem*"], "ignore", ("head", "stem*")),
        (["--ratios", "stages.*=0.7", "head=0"], "ratios", {"stages.*": 0.7, "head": 0.0}),
        (["--no-isomorphic"], "ranking", "global"),
        (["--round-to", "8"], "round_to", 8),
        (["--pruning-type", "l2"], "criterion", "l2"),
        (["--remove-layers", "2", "--remove-blocks-scope", "all"], "remove_blocks", 2),
        (["--graph", "depgraph"], "tracer", "depgraph"),
        (["--macs-counter", "fvcore"], "macs_counter", PlanOptions.macs_counter),
        (["--macs-counter", "exact"], "macs_counter", "exact"),
        ([], "macs_counter", "paper"),
        (["--seed", "7"], "seed", 7),
    ],
)
def test_flags_become_options(words: list[str], field: str, value: object):
    assert getattr(plan_options(parse_args([*MODEL, *words]), None), field) == value


def test_a_budget_takes_the_place_of_the_ratio():
    assert plan_options(parse_args([*MODEL, "--target-macs", "50%", "--pruning-ratio", "0.3"]), None).ratio is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-macs", "4G", "--target-params", "20M"], "not allowed with argument --target-macs"),
        (["--ranking", "local", "--no-isomorphic"], "--ranking local contradicts"),
        (["--ranking", "local", "--global-pruning"], "--ranking local contradicts"),
        (["--from-plan", "p.json", "--ignore", "head"], "--from-plan brings its own choice"),
        (["--from-plan", "p.json", "--pruning-ratio", "0.5"], "--from-plan brings its own choice"),
        (["--from-plan", "p.json", "--ratios", "head=0.1"], "--from-plan brings its own choice"),
        (["--from-plan", "p.json", "--report", "r.png"], "applies a plan without scoring"),
        (["--from-plan", "p.json", "--remove-blocks", "1"], "--from-plan brings its own choice"),
        (["--dry-run", "--test-accuracy"], "--dry-run stops before the cut"),
        (["--pruning-type", "bn_scale", "--score-bias"], "--pruning-type bn_scale says itself what counts"),
        (["--steps", "0"], "0 is less than 1"),
        (["--steps", "4", "--from-plan", "p.json"], "--steps chooses anew after each cut"),
        (["--steps", "4", "--dry-run"], "--dry-run cuts nothing"),
        (["--steps", "4", "--allocate", "calibrate"], "--allocate calibrate searches the ratios of one cut"),
        (["--steps", "4", "--unstructured", "--pruning-type", "dimap"], "--steps is about whole units"),
        (["--unstructured"], "--unstructured takes --pruning-type dimap"),
        (["--unstructured", "--pruning-type", "dimap", "--ignore", "head"], "--ignore is about whole units"),
        (["--macs-counter", "fvcore", "--dry-run"], "fvcore counts the cut model"),
        (["--ratios", "head"], "'head' is not NAME=RATIO"),
        (["--ratios", "head=1"], "1 is not in [0, 1)"),
        (["--pruning-ratio", "1"], "1 is not in [0, 1)"),
        (["--report", "r.txt"], "must end in"),
        (["--save-as", "net.pth"], "must end in .safetensors"),
    ],
)
def test_contradictions_are_usage_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse_args([*MODEL, *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_ratio_belongs_to_the_name_before_the_last_sign():
    assert named_ratio("blocks.*.mlp.fc1=0.7") == ("blocks.*.mlp.fc1", 0.7)
    assert named_ratio("a=b=0.5") == ("a=b", 0.5)
    with pytest.raises(argparse.ArgumentTypeError):
        named_ratio("=0.5")


def test_images_are_needed_for_scores_that_look_at_them():
    assert needs_images(parse_args([*MODEL, "--pruning-type", "taylor"]))
    assert needs_images(parse_args([*MODEL, "--pruning-type", "l2", "--test-accuracy"]))
    assert not needs_images(parse_args([*MODEL, "--pruning-type", "l2"]))
    assert not needs_images(parse_args([*MODEL, "--pruning-type", "taylor", "--from-plan", "p.json"]))


def test_the_self_check_is_on_outside_the_papers_families():
    assert not parse_args(["--model", "deit_tiny_patch16_224"]).self_check
    assert parse_args(["--model", "deit_tiny_patch16_224", "--self-check"]).self_check
    assert parse_args(["--model", "output/pruned/deit.safetensors"]).self_check
    assert parse_args(["--model", "vgg11", "--is-torchvision"]).self_check
