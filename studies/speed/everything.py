"""Times what a user waits for, step by step, for `studies.speed all`, each step beside the plain way in one process.

| step | ours | the plain way |
|---|---|---|
| scoring, Taylor | `accumulate` of gradients | a loop of forward and backward over the same batches |
| scoring, Hessian | `accumulate` of squared gradients of single images | a backward pass for each image |
| group, rank, cut | exact tracer, search for a budget, cut (`pruning.py`) | torch-pruning's BasePruner at a ratio |
| scoring, Taylor, bf16 | the same under autocast, as it goes on by default where that pays | the loop, in fp32 |
| evaluation | `measure_accuracy` on this project's loader | a loop in the style of torchvision's reference |
| evaluation, bf16 | the same in bfloat16 and channels_last, as it goes on by default | the loop, in fp32 |
| training step | the engine (`training.py`) | such a loop |
| saving, loading | a checkpoint, which runs no code | torch.save and torch.load of the whole model, a pickle |
| export, .pt2 | `export`, which reads the file back and compares it | torch.export alone, which does not |
| export, ONNX | the same, by onnxruntime; with its libraries only | torch.onnx.export alone |

The two ways of a step take turns; the first round does not count. Speeds of scoring and evaluation are images/s, of
the rest seconds. A ratio is how many times as fast ours is, in the same round.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from isomorphic import progress
from isomorphic.checkpoints.open import load_model, open_model
from isomorphic.checkpoints.save import save_model
from isomorphic.data.loaders import build_eval_loader
from isomorphic.data.transforms import eval_transform
from isomorphic.data.workers import loader_options
from isomorphic.exporting import onnx
from isomorphic.exporting.face import export
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.models import ModelSpec, example_inputs, num_classes
from isomorphic.provenance import hardware
from isomorphic.pruning.gradients import accumulate
from studies.speed import pruning, training
from studies.speed.rows import measure_scripts
from studies.speed.script_flags import TRAINING_SCRIPTS, prune, read_pruning_script

MODELS = ("deit_4.2G", "swin_4.5G", "resnet50_2.0G")
Way = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        batches, batch_size: images of a round.
        rounds: that count.
        threads: of torch.
        workers: processes that load.
    """

    batches: int = 2
    batch_size: int = 16
    rounds: int = 3
    threads: int = 2
    workers: int = 2

    @property
    def images(self) -> int:
        """How many there are in a round."""
        return self.batches * self.batch_size


class StepRow(NamedTuple):
    """One step of one model: the columns of speed.csv. `ours` and `plain` are medians over the rounds.

    Attributes:
        model: a script of scripts/pruning.
        ours, plain: in `unit`, images/s or s.
        faster: how many times as fast ours is; the median of the rounds' ratios, the least and the most of them.
    """

    step: str
    model: str
    unit: str
    ours: float | None
    plain: float | None
    faster: float | None
    faster_min: float | None
    faster_max: float | None
    plain_way: str


def run(names: Sequence[str], options: Options, path: Path) -> None:
    """Measures each model step by step; writes rows to `path`, and a table of them with the hardware beside it, as .md.

    Raises:
        UserError: no such script, or a file cannot be written.
    """
    torch.set_num_threads(options.threads)
    measure_scripts(
        names, StepRow, lambda file, folder: measure(file, options, folder), lambda rows: page(rows, options), path
    )


def measure(file: Path, options: Options, folder: Path) -> list[StepRow]:
    """Returns the rows of one script's model, and prints each: the dense model is scored, then pruned, and so on."""
    rows = []

    def keep(row: StepRow) -> None:
        rows.append(row)
        print(line(row), flush=True)

    args = read_pruning_script(file)
    progress.stage(f"scoring the model of {file.stem}")
    dense, image, _ = pruning.prepare(args)
    for row in scoring_rows(file.stem, dense, image, options):
        keep(row)
    progress.stage("pruning it")
    keep(pruning_row(pruning.measure_apart(file.stem, args, options.rounds, options.threads, 600)))
    checkpoint = prune(file, folder)
    progress.stage("evaluating it")
    model, spec = open_model(str(checkpoint))
    for row in evaluation_rows(file.stem, model, spec, options):
        keep(row)
    if (TRAINING_SCRIPTS / file.name).is_file():
        progress.stage("training it")
        keep(training_row(file.stem, options, folder))
    progress.stage("saving, loading and exporting it")
    for row in file_rows(file.stem, checkpoint, options):
        keep(row)
    return rows


# --- steps ---


def scoring_rows(name: str, model: nn.Module, image: Tensor, options: Options) -> list[StepRow]:
    """Images/s of the two statistics that criteria need, and of the first one in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, *image.shape[1:])
    batches = [
        (torch.randn(shape, generator=generator), torch.arange(options.batch_size)) for _ in range(options.batches)
    ]
    one_by_one = [(images[i : i + 1], labels[i : i + 1]) for images, labels in batches for i in range(len(images))]

    def gradients(parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        model.zero_grad()
        for images, labels in parts:
            F.cross_entropy(model(images), labels).backward()

    def squares() -> None:
        sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for part in one_by_one:
            gradients([part])
            for total, parameter in zip(sums, model.parameters(), strict=True):
                if parameter.grad is not None:
                    total += parameter.grad.square()
        model.zero_grad()

    model.eval()
    taylor = compare(lambda: accumulate(model, batches, "gradient"), lambda: gradients(batches), options.rounds)
    low = compare(
        lambda: accumulate(model, batches, "gradient", amp_dtype=torch.bfloat16),
        lambda: gradients(batches),
        options.rounds,
    )
    hessian = compare(lambda: accumulate(model, batches, "squared_gradient"), squares, options.rounds)
    return [
        speed_row("scoring, Taylor", name, options.images, taylor, "forward and backward"),
        speed_row("scoring, Taylor, bf16", name, options.images, low, "forward and backward"),
        speed_row("scoring, Hessian", name, options.images, hessian, "a backward pass an image"),
    ]


def pruning_row(found: pruning.PruningRow) -> StepRow:
    """Group, rank and cut, beside BasePruner."""
    middle, low, high = (None if one is None else 1 / one for one in (found.ratio, found.ratio_max, found.ratio_min))
    way = "BasePruner" if found.status == pruning.OK else found.status
    return StepRow("group, rank, cut", found.script, "s", found.ours, found.reference, middle, low, high, way)


def evaluation_rows(name: str, model: nn.Module, spec: ModelSpec, options: Options) -> list[StepRow]:
    """Images/s of an evaluation, decoding and loading included, in full precision and in bfloat16."""
    own = spec.preprocessing
    images = training.JpegImages(eval_transform(own), options.images, num_classes(model, spec))
    interpolation = transforms.InterpolationMode(own.interpolation)
    plain_transform = transforms.Compose(
        [
            transforms.Resize(own.resize_size, interpolation=interpolation),
            transforms.CenterCrop(own.input_size),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(own.mean, own.std),
        ]
    )
    plain_images = training.JpegImages(plain_transform, options.images, num_classes(model, spec))
    loader = build_eval_loader(images, options.batch_size, options.workers, "cpu")
    plain_loader = DataLoader(plain_images, options.batch_size, **loader_options(options.workers, "cpu"))

    @torch.inference_mode()
    def plain() -> None:
        model.eval()
        for batch, labels in plain_loader:
            logits = model(batch)
            F.cross_entropy(logits, labels).item()
            hits = logits.topk(5, dim=1).indices == labels[:, None]
            for k in (1, 5):
                hits[:, :k].any(dim=1).sum().item()

    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    low = {"amp_dtype": torch.bfloat16, "channels_last": True}
    ways: dict[str, Way] = {
        "evaluation": lambda: measure_accuracy(model, loader, "cpu"),
        "evaluation, bf16": lambda: measure_accuracy(laid_out, loader, "cpu", **low),
    }
    return [
        speed_row(step, name, options.images, compare(way, plain, options.rounds), "torchvision's loop")
        for step, way in ways.items()
    ]


def training_row(name: str, options: Options, folder: Path) -> StepRow:
    """Seconds of a training step in bf16, beside the plain loop in bf16; loading included."""
    ways = ("plain amp", "ours bf16")
    how = training.Options(
        options.batches, options.rounds, options.threads, options.batch_size, options.workers, ways, compile=False
    )
    rows = {row.way: row for row in training.measure(name, training.read_recipe(name, how, folder), how)}
    ours, plain = rows["ours bf16"], rows["plain amp"]
    return StepRow(
        "training step, bf16",
        name,
        "s",
        options.batch_size / ours.speed,
        options.batch_size / plain.speed,
        ours.by_plain_amp,
        ours.by_plain_amp_min,
        ours.by_plain_amp_max,
        "torchvision's loop",
    )


def file_rows(name: str, checkpoint: Path, options: Options) -> list[StepRow]:
    """Seconds of saving, loading and exporting a pruned model."""
    model, spec = open_model(str(checkpoint))
    own, pickle = checkpoint.with_name("own.safetensors"), checkpoint.with_name("whole.pth")
    saving = compare(
        lambda: save_model(own, model, spec, provenance={}), lambda: torch.save(model, pickle), options.rounds
    )
    loading = compare(lambda: load_model(own), lambda: torch.load(pickle, weights_only=False), options.rounds)
    image, program = example_inputs(spec), checkpoint.with_name("program.pt2")
    batch = {0: torch.export.Dim.DYNAMIC}
    pair = torch.cat([image, image])
    exporting = compare(
        lambda: export(model, image, program),
        lambda: torch.export.save(torch.export.export(model, (pair,), dynamic_shapes=(batch,)), program),
        options.rounds,
    )
    rows = [
        seconds_row("saving", name, saving, "torch.save of the whole model"),
        seconds_row("loading", name, loading, "torch.load of the whole model"),
        seconds_row("export, .pt2", name, exporting, "torch.export, neither read back nor compared"),
    ]
    if all(importlib.util.find_spec(library) for library in onnx.REQUIRED):
        graph = str(checkpoint.with_name("graph.onnx"))
        how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": (batch,), "verbose": False, "external_data": False}
        translating = compare(
            lambda: export(model, image, graph), lambda: torch.onnx.export(model, (pair,), graph, **how), options.rounds
        )
        rows.append(seconds_row("export, ONNX", name, translating, "torch.onnx.export, neither read back nor compared"))
    return rows


# --- turns and rows ---


def compare(ours: Way, plain: Way, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of either way, round by round, after one that does not count."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(1 + rounds):
        for way, taken in zip((ours, plain), seconds, strict=True):
            gc.collect()  # what came before
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return seconds[0][1:], seconds[1][1:]


def seconds_row(step: str, name: str, seconds: tuple[list[float], list[float]], way: str) -> StepRow:
    """A row of a step that is told in seconds."""
    ours, plain = seconds
    ratios = [other / mine for mine, other in zip(ours, plain, strict=True)]
    return StepRow(step, name, "s", median(ours), median(plain), median(ratios), min(ratios), max(ratios), way)


def speed_row(step: str, name: str, images: int, seconds: tuple[list[float], list[float]], way: str) -> StepRow:
    """A row of a step that is told in images/s."""
    row = seconds_row(step, name, seconds, way)
    assert row.ours is not None and row.plain is not None
    return row._replace(unit="images/s", ours=images / row.ours, plain=images / row.plain)


def page(rows: Sequence[StepRow], options: Options) -> list[str]:
    """Returns the lines of the table, with the machine."""
    machine: dict[str, Any] = hardware()
    device = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    how = f"{options.rounds} rounds of {options.batches} batches of {options.batch_size} images"
    lines = [
        "# Speed, step by step",
        "",
        f"{device}; {options.threads} threads, {options.workers} workers, torch {torch.__version__}; {how}.",
        "",
        "| step | model | ours | plain way | times as fast | the plain way |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.step, row.model, amount(row.ours, row.unit), amount(row.plain, row.unit), ratio(row)]
        lines.append(f"| {' | '.join([*cells, row.plain_way])} |")
    return lines


def line(row: StepRow) -> str:
    """A row as it is printed."""
    cells = f"{amount(row.ours, row.unit):>16}{amount(row.plain, row.unit):>16}   {ratio(row)}"
    return f"{row.step:22}{row.model:18}{cells}  ({row.plain_way})"


def amount(value: float | None, unit: str) -> str:
    """`12.3 images/s`; what was not measured is a dash."""
    return "-" if value is None else f"{value:.3g} {unit}"


def ratio(row: StepRow) -> str:
    """`1.23 (1.20 … 1.31)`."""
    return "-" if row.faster is None else f"{row.faster:.2f} ({row.faster_min:.2f} … {row.faster_max:.2f})"
