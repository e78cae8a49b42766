"""The flags of the two training commands."""

from __future__ import annotations

import pytest

from isomorphic.commands.train_flags import FLAG_DEFAULTS, from_timm, parse_convnext_args, parse_finetune_args
from isomorphic.training.recipe import default_values

MODEL = ["--model", "convnext_atto"]


def test_finetune_defaults_are_the_reference_trainers():
    args = parse_finetune_args(MODEL)
    assert (args.epochs, args.batch_size, args.workers, args.lr, args.momentum) == (90, 32, 8, 0.1, 0.9)
    assert (args.opt, args.weight_decay, args.lr_scheduler, args.lr_step_size) == ("sgd", 1e-4, "steplr", 30)
    assert (args.lr_warmup_method, args.lr_warmup_decay, args.lr_gamma, args.lr_min) == ("constant", 0.01, 0.1, 0)
    assert (args.model_ema, args.model_ema_steps, args.model_ema_decay) == (False, 32, 0.99998)
    assert (args.ra_magnitude, args.augmix_severity, args.ra_reps, args.random_erase_mode) == (9, 3, 3, "const")
    assert (args.label_smoothing, args.mixup_alpha, args.cutmix_alpha, args.random_erase) == (0, 0, 0, 0)
    assert (args.accumulate, args.start_epoch, args.resume, args.output_dir) == (1, 0, None, "output")
    assert (args.drop, args.drop_path, args.layer_decay, args.vector_weight_decay) == (None,) * 4


def test_every_recipe_field_has_a_flag_of_its_default():
    args = vars(parse_finetune_args(MODEL))
    values = default_values()
    computed = {"train_crop_size": None, "ra_reps": 3, "distillation": None}
    assert computed == FLAG_DEFAULTS
    assert values.keys() <= args.keys()
    for name in values.keys() - computed.keys():
        assert args[name] == values[name] and type(args[name]) is type(values[name]), name
    assert (args["train_crop_size"], args["ra_reps"], args["distillation"]) == (None, 3, "none")


def test_convnext_defaults_are_its_recipe():
    args = parse_convnext_args(MODEL)
    assert (args.seed, args.epochs, args.opt, args.lr, args.weight_decay) == (42, 300, "adamw", 2e-3, 0.05)
    assert (args.vector_weight_decay, args.lr_scheduler, args.lr_min) == (0.0, "cosineannealinglr", 1e-6)
    assert (args.auto_augment, args.random_erase, args.random_erase_mode) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
    assert (args.mixup_alpha, args.cutmix_alpha, args.label_smoothing) == (0.2, 1.0, 0.1)
    assert (args.model_ema, args.model_ema_decay, args.model_ema_steps) == (False, 0.9999, 1)


def test_timm_spellings_are_taken_by_convnext_train_alone(capsys: pytest.CaptureFixture[str]):
    words = "--pruned-model net.safetensors --data-dir d --sched cosine --smoothing 0.2 --aa rand-m7 --reprob=0.5"
    words += " --mixup 0.3 --cutmix 0.4 --grad-accum-steps 4 --output out --drop 0.1 --drop-path 0.2 --color-jitter 0.4"
    words += " --train-interpolation random --model-ema --model-ema-decay 0.999"
    args = parse_convnext_args(words.split())
    assert (args.model, args.data_path, args.lr_scheduler) == ("net.safetensors", "d", "cosineannealinglr")
    assert (args.label_smoothing, args.auto_augment, args.random_erase) == (0.2, "rand-m7", 0.5)
    assert (args.mixup_alpha, args.cutmix_alpha, args.accumulate, args.output_dir) == (0.3, 0.4, 4, "out")
    assert (args.drop, args.drop_path, args.color_jitter, args.train_interpolation) == (0.1, 0.2, 0.4, "random")
    with pytest.raises(SystemExit) as stop:
        parse_finetune_args([*MODEL, "--aa", "rand-m7"])
    assert stop.value.code == 2 and "unrecognized arguments: --aa rand-m7" in capsys.readouterr().err


def test_only_flags_and_schedules_are_translated():
    assert from_timm(["--model", "step", "--sched=step"]) == ["--model", "step", "--lr-scheduler=steplr"]
    assert from_timm(["--lr-scheduler", "step"]) == ["--lr-scheduler", "steplr"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distillation", "hard"], "--distillation hard needs --teacher-model"),
        (["--amp-dtype", "bf16"], "--amp-dtype needs --amp"),
        (["--sparsify-reg", "1e-4"], "--sparsify-reg belongs to --sparsify group or bn or growing"),
        (["--sparsify", "group", "--sparsify-delta", "1"], "--sparsify-delta belongs to --sparsify growing"),
        (["--sparsify", "group", "--fsdp"], "--sparsify needs whole parameters in each process, and --fsdp shards"),
        (["--extend"], "--extend lets a run go on for more epochs: it needs --resume auto"),
        (["--start-epoch", "3", "--epochs", "3"], "--start-epoch 3 leaves nothing of --epochs 3"),
        (["--accumulate", "0"], "0 is less than 1"),
        (["--drop-path", "1"], "1 is not in [0, 1)"),
    ],
)
def test_contradictions_are_usage_errors(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    for parse in (parse_finetune_args, parse_convnext_args):
        with pytest.raises(SystemExit) as stop:
            parse([*MODEL, *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err
