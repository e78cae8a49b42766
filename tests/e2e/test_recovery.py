"""prune.py --recover and --allocate as a user asks for them, on the digits that ship with the project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from isomorphic.checkpoints.open import read_header

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS_DEIT = [
    "--model", str(REPOSITORY / "pretrained" / "digits_deit.safetensors"), "--workers", "0", "--device", "cpu",
]  # fmt: skip
VIT = [
    "--model", "deit_tiny_distilled_patch16_224", "--no-pretrained", "--input-size", "16", "--workers", "0",
    "--model-kwargs", "embed_dim=24", "depth=2", "num_heads=3", "patch_size=8", "mlp_ratio=1",
]  # fmt: skip
DIGITS = ["--dataset", "digits", "--taylor-batches", "4", "--batch-size", "32"]
Call = Callable[..., Any]


def same(one: Path, other: Path) -> bool:
    mine, others = load_file(one), load_file(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def test_compensation_brings_a_quarter_of_a_model_back(call: Call, tmp_path: Path):
    run = [*DIGITS_DEIT, "--dataset", "digits", "--taylor-batches", "8", "--target-macs", "25%", "--test-accuracy"]
    done = call("prune.py", *run, "--recover", "compensate", "--results-file", "r.json", "--save-as", "a.safetensors")
    assert (done.status, done.err) == (0, [])
    assert json.loads((tmp_path / "r.json").read_text())["top1"] > 90
    lines = done.out.splitlines()
    start = lines.index("Compensated, with the relative reconstruction error before and after:")
    end = lines.index("On 102 held-out images, mean KL to the dense model:")
    reported = [line.split() for line in lines[start + 1 : end] if line.startswith("  ")]
    assert [words[0] for words in reported][:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"]
    assert len(reported) == 9 and all(0 < float(after) < float(before) for _, before, _, after in reported)
    assert not [line for line in lines if line.startswith("Cut plainly")]
    name, before, _, after = lines[end + 1].split()
    assert name == "compensate" and float(after) < 0.1 * float(before)
    # the checkpoint knows the errors
    errors = read_header(tmp_path / "a.safetensors")["provenance"]["reconstruction_errors"]
    assert [f"{after:.4f}" for _, after in errors.values()] == [words[3] for words in reported]


@pytest.mark.slow
def test_without_compensation_little_is_left(call: Call, tmp_path: Path):
    run = [*DIGITS_DEIT, "--dataset", "digits", "--taylor-batches", "8", "--target-macs", "25%", "--test-accuracy"]
    done = call("prune.py", *run, "--results-file", "r.json", "--save-as", "a.safetensors")
    assert done.status == 0 and json.loads((tmp_path / "r.json").read_text())["top1"] < 30


def test_recoveries_run_in_one_order_and_repeat(call: Call, tmp_path: Path):
    run = [*VIT, *DIGITS, "--pruning-ratio", "0.4", "--calibration-batches", "2"]
    for name, order in {"a": ["fusion", "compensate", "bn"], "b": ["bn", "compensate", "fusion"]}.items():
        done = call("prune.py", *run, "--recover", *order, "--save-as", f"{name}.safetensors")
        assert (done.status, done.err) == (0, []), done.err
        assert "Recalibrated: no batch norms" in done.out.splitlines()
        judged = [line.split() for line in done.out.splitlines() if " => " in line and line[:2] == "  "][-2:]
        assert [words[0] for words in judged] == ["fusion", "compensate"] and judged[0][-1] == "undone"
        assert "Fusion: 0 groups merged" in done.out.splitlines()
    assert same(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_dry_run_recovers_nothing(call: Call, tmp_path: Path):
    done = call("prune.py", *VIT, *DIGITS, "--recover", "compensate", "--dry-run", "--save-as", "a.safetensors")
    assert (done.status, done.err) == (0, [])
    assert "Compensated" not in done.out and not (tmp_path / "a.safetensors").exists()
    assert done.out.splitlines()[-1].startswith("Params: ")


@pytest.mark.parametrize("steps", [["compensate"], ["bn", "compensate"]])
def test_without_training_images_the_cut_is_plain_and_says_so(call: Call, tmp_path: Path, steps: list[str]):
    for number in range(10):
        (tmp_path / "images" / "val" / str(number)).mkdir(parents=True)
    run = [*DIGITS_DEIT, "--data-path", "images", "--pruning-type", "l1", "--pruning-ratio", "0.4"]
    plain = call("prune.py", *run, "--save-as", "plain.safetensors")
    done = call("prune.py", *run, "--recover", *steps, "--save-as", "recovered.safetensors")
    assert (plain.status, done.status, done.err) == (0, 0, [])
    (said,) = [line for line in done.out.splitlines() if line.startswith("There will be no ")]
    assert said.startswith("There will be no " + " and no ".join(steps)) and "images/train" in said
    assert same(tmp_path / "plain.safetensors", tmp_path / "recovered.safetensors")


@pytest.mark.parametrize("steps", [["compensate"], ["bn", "compensate"]])
def test_without_any_images_the_cut_is_plain_and_says_so(call: Call, tmp_path: Path, steps: list[str]):
    run = [*DIGITS_DEIT, "--data-path", "nowhere", "--pruning-type", "l1", "--pruning-ratio", "0.4"]
    plain = call("prune.py", *run, "--save-as", "plain.safetensors")
    done = call("prune.py", *run, "--recover", *steps, "--save-as", "recovered.safetensors")
    assert (plain.status, done.status, plain.err, done.err) == (0, 0, [], [])
    (said,) = [line for line in done.out.splitlines() if "nowhere" in line]
    assert said.startswith("There will be no " + " and no ".join(steps))
    assert same(tmp_path / "plain.safetensors", tmp_path / "recovered.safetensors")


@pytest.mark.parametrize(
    "flags",
    [["--pruning-type", "taylor"], ["--pruning-type", "l1", "--test-accuracy"],
     ["--pruning-type", "l1", "--allocate", "calibrate"]],
)  # fmt: skip
def test_a_run_that_is_worth_nothing_without_images_stops(call: Call, tmp_path: Path, flags: list[str]):
    words = [*DIGITS_DEIT, "--data-path", "nowhere", "--recover", "compensate", "--save-as", "a.safetensors", *flags]
    done = call("prune.py", *words)
    assert done.status == 1 and len(done.err) == 1 and "nowhere" in done.err[0]
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--recover", "magic"], "invalid choice: 'magic'"),
        (["--recover"], "expected at least one argument"),
        (["--allocate", "calibrate", "--ranking", "global"], "this ranking has none"),
        (["--allocate", "calibrate", "--no-isomorphic"], "this ranking has none"),
        (["--allocate", "calibrate", "--from-plan", "p.json"], "no plan, no latency"),
        (["--allocate", "calibrate", "--target-latency", "5ms"], "no plan, no latency"),
        (["--fusion-masses", "importance", "--from-plan", "p.json", "--recover", "fusion"], "without scoring"),
        (["--unstructured", "--pruning-type", "dimap", "--recover", "compensate"], "prunes single weights"),
        (["--unstructured", "--pruning-type", "dimap", "--allocate", "calibrate"], "prunes single weights"),
        (["--calibration-batches", "0", "--recover", "bn"], "calibration-batches"),
        (["--recover", "auto", "bn"], "--recover auto chooses the steps"),
        (["--recover", "distill", "--distill-lr", "0"], "0 is not above 0"),
        (["--unlabelled", "photos"], "leave out --dataset"),
    ],
)
def test_flags_that_contradict_each_other_are_usage_errors(call: Call, flags: list[str], says: str):
    done = call("prune.py", *VIT, *DIGITS, *flags)
    assert done.status == 2 and says in done.err[-1] and done.out == ""


@pytest.mark.parametrize(
    ("flags", "owner"),
    [
        (["--fusion-normalization", "mass"], "--recover fusion"),
        (["--fusion-normalization", "source", "--recover", "compensate"], "--recover fusion"),  # a default, too
        (["--fusion-masses", "importance"], "--recover fusion"),
        (["--fusion-masses", "uniform", "--recover", "bn"], "--recover fusion"),
        (["--calibration-batches", "3"], "--recover compensate, bn, distill or auto and --allocate calibrate"),
        (["--calibration-batches", "8", "--recover", "fusion"], "--recover compensate, bn, distill or auto"),
        (["--distill-steps", "7", "--recover", "compensate"], "--recover distill and --recover auto"),
        (["--distill-lr", "1e-3"], "--recover distill and --recover auto"),
        (["--mirror-calibration"], "--recover compensate, bn, distill or auto"),
        (["--allocation-evaluations", "7"], "--allocate calibrate"),
        (["--allocation-evaluations", "40", "--recover", "compensate"], "--allocate calibrate"),
    ],
)
def test_flags_without_their_step_are_usage_errors(call: Call, flags: list[str], owner: str):
    done = call("prune.py", *VIT, *DIGITS, "--dry-run", *flags)
    assert done.status == 2 and f"{flags[0]} belongs to {owner}" in done.err[-1] and done.out == ""


def test_flags_with_their_step_are_let_through(call: Call):
    words = ["--pruning-type", "l1", "--dry-run", "--recover", "fusion", "bn", "--calibration-batches", "3"]
    words += ["--mirror-calibration"]
    words += ["--fusion-normalization", "mass", "--fusion-masses", "importance"]
    assert call("prune.py", *VIT, "--dataset", "digits", *words).status == 0


@pytest.mark.parametrize("flag", [["--max-pruning-ratio", "0.3"], ["--round-to", "8"], ["--ranking", "global"]])
def test_flags_about_units_do_not_go_with_single_weights(call: Call, flag: list[str]):
    done = call("prune.py", *VIT, *DIGITS, "--unstructured", "--pruning-type", "dimap", *flag)
    assert done.status == 2 and f"{flag[0]} is about whole units" in done.err[-1]


@pytest.mark.parametrize("step", ["compensate", "fusion"])
def test_a_masked_checkpoint_is_not_filled(call: Call, tmp_path: Path, step: str):
    masked = call("prune.py", *VIT, *DIGITS, "--unstructured", "--pruning-type", "dimap", "--save-as", "m.safetensors")
    assert masked.status == 0
    words = ["--model", "m.safetensors", "--workers", "0", *DIGITS, "--pruning-ratio", "0.3"]
    done = call("prune.py", *words, "--recover", step, "--save-as", "c.safetensors")
    assert done.status == 1 and "masked weights" in done.err[-1]
    assert not (tmp_path / "c.safetensors").exists()


def test_the_zeros_of_a_masked_checkpoint_count_for_a_model_by_name(call: Call):
    masked = call("prune.py", *VIT, *DIGITS, "--unstructured", "--pruning-type", "dimap", "--save-as", "m.safetensors")
    assert masked.status == 0
    words = ["--dataset", "digits", "--batch-size", "64"]
    by_name = call("evaluate.py", *VIT, "--checkpoint", "m.safetensors", *words)
    by_file = call("evaluate.py", "--model", "m.safetensors", "--workers", "0", *words)
    found = [[line for line in done.out.splitlines() if line.startswith("Non-zero")] for done in (by_name, by_file)]
    assert found[0] == found[1] and len(found[0]) == 1


def test_the_batch_norms_of_a_masked_checkpoint_are_recalibrated(call: Call, tmp_path: Path):
    model = ["--model", "resnet10t", "--no-pretrained", "--input-size", "32", "--workers", "0"]
    model += ["--model-kwargs", "channels=(8,12,16,24)", "stem_width=8"]
    words = [*model, *DIGITS, "--unstructured", "--pruning-type", "dimap", "--save-as", "m.safetensors"]
    assert call("prune.py", *words).status == 0
    # nothing is cut, so that the positions of the zeros are as they were
    words = ["--model", "m.safetensors", "--workers", "0", "--dataset", "digits", "--pruning-type", "l1"]
    words += ["--pruning-ratio", "0"]
    done = call("prune.py", *words, "--recover", "bn", "--calibration-batches", "2", "--save-as", "c.safetensors")
    assert (done.status, done.err) == (0, [])
    before, after = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "c.safetensors")
    norms = sum(name.endswith("running_mean") for name in before)
    assert f"Recalibrated: {norms} batch norms" in done.out.splitlines()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"num_batches_tracked"} == {"running_mean", "running_var"}
    masks = [read_header(tmp_path / f"{name}.safetensors")["structure"]["masked"] for name in ("m", "c")]
    assert masks[0] == masks[1] != []


def test_an_allocation_is_printed_stored_and_repeats(call: Call, tmp_path: Path):
    run = [*VIT, *DIGITS, "--target-macs", "65%", "--allocate", "calibrate", "--allocation-evaluations", "6",
           "--calibration-batches", "2"]  # fmt: skip
    plans = []
    for name in ("a", "b"):
        done = call("prune.py", *run, "--plan-file", f"{name}.json", "--save-as", f"{name}.safetensors")
        assert (done.status, done.err) == (0, [])
        plans.append((tmp_path / f"{name}.json").read_bytes())
        (line,) = [line for line in done.out.splitlines() if line.startswith("Calibration loss: ")]
        assert line.endswith("(6 evaluations and 3 on all images)")
        uniform, implied, found = (
            float(part.split()[0]) for part in line.removeprefix("Calibration loss: ").replace("=>", ",").split(",")
        )
        assert found <= min(uniform, implied)
    assert plans[0] == plans[1] and same(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    ratios = json.loads(plans[0])["ratios"]
    assert len(ratios) >= 3 and all(0 <= ratio <= 1 for ratio in ratios.values())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty pictures in a folder, of nothing in particular."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(folder / f"{number}.png")
    return folder


def test_images_without_labels_are_scored_and_recovered_on(call: Call, tmp_path: Path, photos: Path):
    run = [*DIGITS_DEIT, "--unlabelled", "photos", "--batch-size", "8", "--target-macs", "50%", "--recover", "auto"]
    for name in "ab":
        done = call("prune.py", *run, "--distill-steps", "10", "--save-as", f"{name}.safetensors")
        assert (done.status, done.err) == (0, []), done.err
    start = done.out.splitlines().index("On 8 held-out images, mean KL to the dense model:")
    solved, distilled = (line.split() for line in done.out.splitlines()[start + 1 : start + 3])
    assert (solved[0], distilled[0], distilled[1]) == ("compensate", "distill", solved[3])
    assert float(solved[1]) > float(solved[3])
    assert (float(distilled[3].rstrip(",")) < float(solved[3])) == (distilled[-1] != "undone")
    assert same(tmp_path / "a.safetensors", tmp_path / "b.safetensors")  # bit for bit


def test_a_folder_without_images_is_one_line(call: Call, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for folder, says in (("photos", "no images in photos"), ("nowhere", "no folder nowhere")):
        done = call("prune.py", *DIGITS_DEIT, "--unlabelled", folder, "--recover", "bn", "--save-as", "a.safetensors")
        assert done.status == 1 and len(done.err) == 1 and says in done.err[0]


@pytest.mark.parametrize("images", [1, 3])
def test_hardly_any_images_break_nothing(call: Call, tmp_path: Path, photos: Path, images: int):
    for path in sorted(photos.iterdir())[images:]:
        path.unlink()
    run = [*DIGITS_DEIT, "--unlabelled", "photos", "--target-macs", "50%", "--recover", "auto", "--distill-steps", "3"]
    done = call("prune.py", *run, "--save-as", "a.safetensors")
    assert (done.status, done.err) == (0, []), done.err
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "a.safetensors").values())
    told = "Distilled: 3 steps" if images == 1 else "On 1 held-out image, mean KL to the dense model:"
    assert told in done.out.splitlines()
