"""evaluate.py --against: how far a pruned model agrees with the dense one, and how much faster it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from isomorphic.checkpoints.open import load_model, open_model
from isomorphic.checkpoints.save import save_model
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.measure import latency
from isomorphic.models import ModelSpec, build_model, describe_model

REPOSITORY = Path(__file__).resolve().parents[2]
DENSE = str(REPOSITORY / "pretrained" / "digits_deit.safetensors")
DIGITS = ["--dataset", "digits", "--workers", "0"]
RESULTS = ["--results-file", "results.json"]


def results(folder: Path, name: str = "results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits model with narrower blocks, by the real command."""
    path = tmp_path_factory.mktemp("pruned") / "pruned.safetensors"
    words = ["--model", DENSE, *DIGITS, "--pruning-type", "l1", "--pruning-ratio", "0.3", "--save-as", str(path)]
    subprocess.run([sys.executable, str(REPOSITORY / "prune.py"), *words], check=True, capture_output=True)
    return str(path)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing as it is, but for its patience: nothing is claimed of the figures."""
    monkeypatch.setattr(latency, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(latency, "TURN_SECONDS", 0.002)
    monkeypatch.setattr(latency, "MIN_ROUNDS", 3)
    monkeypatch.setattr(latency, "MAX_SECONDS_COMPARED", 0.1)


# --- fidelity ---


def recount(pruned: str, images: list[torch.Tensor]) -> tuple[float, float, float]:
    """Agreement in percent, KL in nats and the error of the logits, image by image."""
    model, dense = load_model(pruned), load_model(DENSE)
    with torch.no_grad():
        a, b = (torch.cat([network(image[None]) for image in images]).double() for network in (model, dense))
    agreement = 100 * sum(int(x.argmax()) == int(y.argmax()) for x, y in zip(a, b, strict=True)) / len(images)
    p, q = b.softmax(1), a.softmax(1)
    kl = (p * (p.log() - q.log())).sum() / len(images)
    return agreement, kl.item(), (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()


def test_fidelity_on_labelled_images_stands_beside_the_accuracy(call: Callable[..., Any], tmp_path: Path, pruned: str):
    done = call("evaluate.py", "--model", pruned, *DIGITS, "--against", DENSE, *RESULTS)
    assert (done.status, done.err) == (0, [])
    row = results(tmp_path)
    transform = eval_transform(open_model(DENSE)[1].preprocessing)
    dataset = build_dataset(DataSource("digits"), "val", transform)
    expected = recount(pruned, [dataset[index][0] for index in range(len(dataset))])
    assert (row["agreement"], row["kl"], row["logits_error"]) == pytest.approx(expected, rel=1e-4)
    assert (row["against"], row["fidelity_images"], row["fidelity_unreadable"]) == (DENSE, 360, 0)
    assert 0 < row["agreement"] < 100 and row["num_images"] == 360 and row["top1"] > 10
    lines = done.out.splitlines()
    assert lines[-2].startswith(f"Comparing {pruned} with {DENSE}") and lines[-3].startswith("Accuracy: ")
    assert lines[-1] == (
        f"Fidelity to {DENSE}: top-1 agrees on {row['agreement']:.2f}% of 360 images, KL {row['kl']:.4f} nats, "
        f"relative error of the logits {row['logits_error']:.4f}"
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 images in nested folders of any names, two of them damaged, and files that are none."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for number in range(41):
        folder = root / ("" if number % 3 == 0 else f"holidays/{number % 3}")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (24, 20 + number % 5, 3), generator=generator, dtype=torch.uint8)
        path = folder / f"{number:02}.{('png', 'JPG', 'webp')[number % 3]}"
        Image.fromarray(pixels.numpy()).save(path, {".JPG": "JPEG"}.get(path.suffix))
        if number in (5, 30):
            path.write_bytes(path.read_bytes()[:30])
    (root / "notes.txt").write_text("no image")
    (root / "holidays" / "prices.csv").write_text("0")
    return root


def test_unlabelled_images_in_any_folder(call: Callable[..., Any], tmp_path: Path, pruned: str, photos: Path):
    words = ["--model", pruned, "--against", DENSE, "--unlabelled", str(photos), "--workers", "0", *RESULTS]
    done = call("evaluate.py", *words)
    assert done.status == 1 and len(done.err) == 1 and "cannot read 2 " in done.err[0]
    assert f"Left out of {photos}: 1 .csv, 1 .txt (not read by Pillow)" in done.out
    assert "05.webp" in done.err[0] and "30.png" in done.err[0] and not (tmp_path / "results.json").exists()

    done = call("evaluate.py", *words, "--batch-size", "7", "--skip-unreadable")
    assert (done.status, done.err) == (0, [])
    assert "what follows is of the other 39" in done.out and "of 39 images" in done.out
    assert "Accuracy" not in done.out
    row = results(tmp_path)
    transform = eval_transform(open_model(DENSE)[1].preprocessing)
    paths = [path for path in sorted(photos.rglob("*.*")) if path.suffix in (".png", ".JPG", ".webp")]
    readable = [path for path in paths if path.stem not in ("05", "30")]
    expected = recount(pruned, [transform(Image.open(path).convert("RGB")) for path in readable])
    assert (row["agreement"], row["kl"], row["logits_error"]) == pytest.approx(expected, rel=1e-4)
    assert (row["fidelity_images"], row["fidelity_unreadable"], row["unlabelled"]) == (39, 2, str(photos))
    assert "top1" not in row and "samples_per_sec" not in row and row["macs"] > 0


@pytest.mark.slow
def test_two_processes_compare_as_one_does(start: Callable[..., Any], tmp_path: Path, pruned: str, photos: Path):
    words = ["--model", pruned, "--against", DENSE, "--unlabelled", str(photos), "--workers", "0", "--skip-unreadable"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "evaluate.py")]
    done = start(*torchrun, *words, "--device", "cpu", "--results-file", "two.json")
    assert done.status == 0, done.err
    alone = start("evaluate.py", *words, "--results-file", "one.json")
    assert (alone.status, alone.err) == (0, [])
    one, two = results(tmp_path, "one.json"), results(tmp_path, "two.json")
    for key in ("kl", "logits_error"):
        assert two[key] == pytest.approx(one[key], rel=1e-6)
    assert {k: v for k, v in two.items() if k not in ("kl", "logits_error")} == {
        k: v for k, v in one.items() if k not in ("kl", "logits_error")
    }
    assert done.out.splitlines()[-1] == alone.out.splitlines()[-1]


VIT = {"patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 1}


def tiny(path: Path, classes: int, size: int, mean: float) -> ModelSpec:
    """Writes a small transformer for images of its own size and colours."""
    spec = describe_model("vit_tiny_patch16_224", kwargs=VIT, num_classes=classes, input_size=size)
    changed = spec.to_dict()
    changed["preprocessing"] |= {"mean": [mean] * 3, "std": [0.5] * 3}
    spec = ModelSpec.from_dict(changed)
    torch.manual_seed(size)
    save_model(path, build_model(spec), spec, provenance={})
    return spec


def test_each_model_sees_the_images_as_it_was_made_for(call: Callable[..., Any], tmp_path: Path, photos: Path):
    specs = [tiny(tmp_path / "a.safetensors", 4, 16, 0.5), tiny(tmp_path / "b.safetensors", 4, 24, 0.2)]
    words = ["--unlabelled", str(photos), "--skip-unreadable", "--workers", "0", *RESULTS]
    done = call("evaluate.py", "--model", "a.safetensors", "--against", "b.safetensors", *words)
    assert (done.status, done.err) == (0, [])
    paths = [path for path in photos.rglob("*.*") if path.suffix not in (".txt", ".csv")]
    images = [Image.open(path).convert("RGB") for path in paths if path.stem not in ("05", "30")]
    logits = []
    for name, spec in zip("ab", specs, strict=True):
        batch = torch.stack([eval_transform(spec.preprocessing)(image) for image in images])
        logits.append(load_model(f"{name}.safetensors")(batch).detach())
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert results(tmp_path)["logits_error"] == pytest.approx(error.item(), rel=1e-4)


def test_other_classes_are_one_line(call: Callable[..., Any], tmp_path: Path, photos: Path, pruned: str):
    tiny(tmp_path / "four.safetensors", 4, 16, 0.5)
    words = ["--against", "four.safetensors", "--unlabelled", str(photos)]
    done = call("evaluate.py", "--model", pruned, *words)
    expected = f"four.safetensors has 4 classes and {pruned} has 10: --against takes a model of the same classes"
    assert (done.status, done.err) == (1, [f"evaluate.py: {expected}"])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--unlabelled", "photos"], 2, "--unlabelled needs --against"),
        (["--round-to", "8"], 2, "--round-to needs --latency"),
        (["--latency-modes", "fp32"], 2, "--latency-modes needs --latency"),
        (["--latency", "--target-macs", "50%"], 2, "--target-macs needs --round-to"),
        (["--latency", "--round-to", "0"], 2, "0 is less than 1"),
        (["--latency", "--round-to", "8,8"], 2, "8,8 repeats itself"),
        (["--latency", "--latency-modes", "quick"], 2, "'quick' is no way to run a model"),
        (["--latency", "--latency-modes", "cuda_graph", "--device", "cpu"], 1, "cuda_graph needs a CUDA device"),
        (["--against", DENSE, "--unlabelled", "x", "--dataset", "digits"], 2, "leave out --dataset"),
        (["--against", DENSE, "--unlabelled", "missing"], 1, "no folder missing: --unlabelled names one that"),
        (["--against", DENSE, "--unlabelled", "."], 1, "no images in ."),
        (["--against", "resnet_of_nobody", "--dataset", "digits"], 1, "unknown timm model: resnet_of_nobody"),
    ],
)
def test_what_cannot_be_is_one_line(call: Callable[..., Any], words: list[str], status: int, message: str):
    done = call("evaluate.py", "--model", DENSE, *words)
    assert done.status == status and len(done.err) == 1 and message in done.err[0]


# --- latency ---


def test_the_dense_model_takes_turns(call: Callable[..., Any], tmp_path: Path, pruned: str, hurried: None):
    done = call("evaluate.py", "--model", pruned, *DIGITS, "--latency", "--against", DENSE, *RESULTS)
    assert (done.status, done.err) == (0, [])
    row = results(tmp_path)
    assert row["macs_ratio"] == pytest.approx(row["against_macs"] / row["macs"], abs=1e-4) and row["macs_ratio"] > 1.3
    assert row["kept_share"] == pytest.approx(row["speedup"] / row["macs_ratio"], abs=1e-3) and row["kept_share"] > 0
    assert row["speedup_p10"] <= row["speedup"] <= row["speedup_p90"]
    assert 0 < row["against_latency_ms_p10"] <= row["against_latency_ms"] and row["against_latency_batch_size"] == 1
    assert 0 < row["peak_memory_mib"] < row["against_peak_memory_mib"]
    for line in (
        f"Latency: {row['latency_ms']:.2f} ms (batch 1; 80% of ",
        f"Peak memory: {row['peak_memory_mib']} MiB, of which ",
        f"Against {DENSE}: {row['against_latency_ms']:.2f} ms (batch 1; ",
        f"Speed-up: {row['speedup']:.2f}× (80% of ",
        f"{row['kept_share']:.0%} of the {row['macs_ratio']:.2f}× that MACs promise (paper counter)",
    ):
        assert line in done.out


def test_modes_and_sizes_of_batches(call: Callable[..., Any], tmp_path: Path, hurried: None):
    words = ["--latency", "--latency-batch-size", "1,3", "--latency-modes", "fp32,bf16+channels_last"]
    done = call("evaluate.py", "--model", DENSE, *DIGITS, *words, *RESULTS)
    assert (done.status, done.err) == (0, [])
    assert "Timing batches of 1, 3..." in done.out
    for label, batch in (("fp32", 1), ("fp32", 3), ("bf16+channels_last", 1), ("bf16+channels_last", 3)):
        assert done.out.count(f"Latency ({label}): ") == 2 and f" ms (batch {batch}; 80% of " in done.out
    row = results(tmp_path)
    prefixes = ("", "fp32_b3_", "bf16+channels_last_b1_", "bf16+channels_last_b3_")
    assert [row[f"{prefix}latency_batch_size"] for prefix in prefixes] == [1, 3, 1, 3]
    assert all(row[f"{prefix}latency_ms"] > 0 for prefix in prefixes) and row["top1"] == 98.8889


def test_roundings_at_the_same_macs(call: Callable[..., Any], tmp_path: Path, pruned: str, hurried: None):
    words = ["--latency", "--against", DENSE, "--round-to", "1,4,1024"]
    done = call("evaluate.py", "--model", pruned, *DIGITS, *words, *RESULTS)
    assert (done.status, done.err) == (0, [])
    assert "Cutting copies with --round-to 1, 4, 1024...\nNo copy with --round-to 1024: " in done.out
    heading = "round-to       MACs     latency  speed-up  MACs ratio   kept"
    table = done.out[done.out.index(heading) :].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["1", "4"]
    row = results(tmp_path)
    for round_to in (1, 4):
        assert row[f"round_to_{round_to}_macs"] == pytest.approx(row["macs"], rel=0.15)
        assert row[f"round_to_{round_to}_latency_ms"] > 0
    assert row["faster_round_to"] in (None, 1, 4) and "at the same MACs" in table[3]


def test_a_named_model_is_rounded_to_a_budget(call: Callable[..., Any], tmp_path: Path, hurried: None):
    words = ["--latency", "--round-to", "2", "--target-macs", "40%"]
    done = call("evaluate.py", "--model", DENSE, *DIGITS, *words, *RESULTS)
    assert (done.status, done.err) == (0, [])
    row = results(tmp_path)
    assert 0.3 * row["macs"] < row["round_to_2_macs"] <= 0.4 * row["macs"]


def test_bad_alignment_is_said_and_a_better_rounding_measured(
    call: Callable[..., Any], tmp_path: Path, pruned: str, hurried: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    alone = call("evaluate.py", "--model", pruned, *DIGITS, "--latency")
    said = "% of the MACs are in layers of widths that are no multiples of 8, what this CPU computes at a time; "
    assert f"{said}--against DENSE times what --round-to would bring" in alone.out
    done = call("evaluate.py", "--model", pruned, *DIGITS, "--latency", "--against", DENSE, *RESULTS)
    assert "Cutting copies with --round-to 1, 8..." in done.out and said in done.out
    row = results(tmp_path)
    assert {"round_to_1_latency_ms", "round_to_8_latency_ms", "faster_round_to"} <= row.keys()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "none")
    monkeypatch.setattr("isomorphic.measure.alignment.OTHER_VECTOR_BYTES", 4)
    assert "Widths: " not in call("evaluate.py", "--model", pruned, *DIGITS, "--latency", "--against", DENSE).out
