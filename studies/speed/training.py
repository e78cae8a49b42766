"""Times training steps for studies.speed: this project's engine beside a plain loop of the published style.

A recipe is a script of scripts/finetuning. Its model is what the script of the same name in scripts/pruning leaves, cut
by L1 from random weights to the published MACs; its teacher has random weights. Images are JPEG files of ImageNet's
usual size, held in memory and decoded each time, under the recipe's augmentation; repeated augmentation, which picks
images and makes none dearer, is left out.

Both loops start from the same weights and see the same images through the same number of workers, in batches of the
same size. A turn is an epoch of a few steps, from opening the loader to the last update, and all ways take turns in one
process, after one turn each that does not count (it compiles, too). What they do not share:

- plain: plain_loop.py, as torchvision's reference trainer has it.
- ours: what `training_run.build_job` puts together and `engine.train_one_epoch` runs, under --channels-last. In "ours
  fp32" the teacher computes in bf16 (`--teacher-dtype auto`), in "ours all fp32" it does not.

Autocast of the plain loop is what it was published with, fp16 with a gradient scaler, on CUDA; the CPU has no fp16, so
that fp32 is its published style there, and bf16 shows what the number format alone would give it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from isomorphic.commands import entry
from isomorphic.commands.train import build_job, open_student
from isomorphic.data.sources import LabelledImages
from isomorphic.data.transforms import Transform
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.complexity import count_complexity, format_macs
from isomorphic.models import example_inputs, num_classes
from isomorphic.provenance import hardware
from isomorphic.training.augment import train_transform
from isomorphic.training.checkpointer import Checkpointer
from isomorphic.training.engine import Job, train_one_epoch
from isomorphic.training.losses import separate_heads
from isomorphic.training.optim import learning_rate, set_learning_rate
from isomorphic.training.precision import AMP_DTYPES, choose_algorithms, pick_teacher_dtype
from isomorphic.training.resume import TrainState, seed_process
from isomorphic.training.sampling import build_train_loader
from isomorphic.training.signals import Signals
from isomorphic.training.tracking import RunFolder
from studies.rows import write_rows
from studies.speed.plain_loop import Setting, plain_way
from studies.speed.script_flags import TRAINING_SCRIPTS, find_pruning_script, prune, read_training_script

RECIPES = ("deit_4.2G", "convnext_4.2G", "resnet50_2.0G")
IMAGENET_SIZE = (500, 375)


class Way(NamedTuple):
    """A loop and what differs from the script's flags."""

    run: Callable[[Setting], Callable[[], int]]
    flags: dict[str, Any]


class TrainingRow(NamedTuple):
    """One way of one recipe: the columns of training.csv. Speeds and ratios are medians over the turns.

    Attributes:
        dtype, teacher_dtype: in what student and teacher compute; empty where there is no teacher.
        macs: of the student and one image, paper's counter.
        speed: images per second, loading included.
        by_plain_fp32, by_plain_amp: this way's speed by the plain loop's of the same turn; None where that was not run.
        added_mib: what a turn adds at most to the memory of a CUDA device; None elsewhere.
    """

    recipe: str
    way: str
    dtype: str
    teacher: str
    teacher_dtype: str
    macs: int
    batch_size: int
    image_size: int
    workers: int
    threads: int
    steps: int
    turns: int
    speed: float
    speed_min: float
    speed_max: float
    by_plain_fp32: float | None
    by_plain_fp32_min: float | None
    by_plain_fp32_max: float | None
    by_plain_amp: float | None
    by_plain_amp_min: float | None
    by_plain_amp_max: float | None
    added_mib: float | None
    device: str
    torch: str


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        steps: a turn.
        turns: that count.
        threads: of torch.
        ways: which of `WAYS`, None for all; compiled ones only with `compile`.
        flags: of the training commands, after those of the script.
    """

    steps: int = 4
    turns: int = 3
    threads: int = 2
    batch_size: int = 16
    workers: int = 2
    ways: Sequence[str] | None = None
    compile: bool = True
    flags: Sequence[str] = ()


def run(recipes: Sequence[str], options: Options, path: Path) -> None:
    """Measures each recipe, prints a table of it and writes all rows.

    Raises:
        UserError: no such script, flags that it does not take, or the file cannot be written.
    """
    check_writable(path)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        all_args = {name: read_recipe(name, options, Path(folder)) for name in recipes}  # all, before the first is run
        rows: list[TrainingRow] = []
        for name, args in all_args.items():
            rows += measure(name, args, options)
    write_rows(path, TrainingRow, rows)
    print(f"Saving the rows to {path}")


# --- a recipe ---


def read_recipe(name: str, options: Options, folder: Path) -> argparse.Namespace:
    """The flags that a script of scripts/finetuning gives its command, on the model that it is for.

    The model is cut here and goes into `folder`, unless the options name another one.

    Raises:
        UserError: no such script, or it calls something else.
    """
    script = TRAINING_SCRIPTS / f"{name}.sh"
    if not script.is_file():
        raise UserError(f"{name}: no such script in {TRAINING_SCRIPTS}")
    measured = ["--batch-size", str(options.batch_size), "--workers", str(options.workers)]
    dry = ["--no-pretrained", "--dataset", "synthetic", "--synthetic-size", "1", "--output-dir", str(folder)]
    args = read_training_script(script, [*measured, *dry, *options.flags])
    args.ra_sampler = False
    if "--model" not in options.flags:
        args.model = str(prune(find_pruning_script(name), folder))
    return args


class JpegImages(LabelledImages):
    """`count` photo-like JPEG files of ImageNet's usual size, held in memory; image i depends on i alone."""

    def __init__(self, transform: Transform, count: int, classes: int, size: tuple[int, int] = IMAGENET_SIZE) -> None:
        super().__init__(transform)
        self.classes = classes
        self.files = [_jpeg(number, size) for number in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB"), index % self.classes


def _jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """About as many bytes as ImageNet's files have: large patches of colour, and some grain."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
    patches = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)  # (height, width, 3)
    grain = rng.normal(0, 12, (size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray((patches + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# --- our loop ---


def our_way(setting: Setting) -> Callable[[], int]:
    """The engine's, likewise."""
    job, state = our_job(setting)
    folder = RunFolder(Path(setting.args.output_dir), setting.spec, {}, {}, {})
    return lambda: our_epoch(job, state, folder)


def our_job(setting: Setting) -> tuple[Job, TrainState]:
    """What the training commands put together, with the benchmark's images."""
    recipe, spec = setting.recipe, setting.spec
    nothing = DataLoader(cast(Any, []))  # nobody validates
    job, state = build_job(setting.args, recipe, setting.model, spec, nothing)
    images = setting.images(train_transform(recipe.augment, spec.preprocessing))
    loader = build_train_loader(images, recipe.loader, recipe.augment, setting.device)
    return dataclasses.replace(job, train_loader=loader), state


def our_epoch(job: Job, state: TrainState, folder: RunFolder) -> int:
    """The training part of an epoch of `engine.fit`, which writes nothing."""
    set_learning_rate(state.optimizer, learning_rate(job.recipe.schedule, 0))
    with Signals() as signals, separate_heads(state.model, job.recipe.loss.distillation != "none"):
        checkpointer = Checkpointer(job.recipe.loop, state, folder, signals, job.device)
        images = train_one_epoch(job, state, checkpointer, lambda step, loss: None)
    state.end_epoch(0.0, 0.0)
    return images


PLAIN = {"channels_last": False, "compile": False, "teacher_dtype": "fp32"}
OURS = {"channels_last": True, "compile": False, "teacher_dtype": "auto"}
FP32: dict[str, Any] = {"amp": False, "amp_dtype": None}
PUBLISHED_AMP: dict[str, Any] = {"amp": True, "amp_dtype": None}
BF16: dict[str, Any] = {"amp": True, "amp_dtype": "bf16"}
WAYS = {
    "plain fp32": Way(plain_way, PLAIN | FP32),
    "plain amp": Way(plain_way, PLAIN | PUBLISHED_AMP),
    "ours all fp32": Way(our_way, OURS | FP32 | {"teacher_dtype": "fp32"}),
    "ours fp32": Way(our_way, OURS | FP32),
    "ours bf16": Way(our_way, OURS | BF16),
    "ours fp32 compiled": Way(our_way, OURS | FP32 | {"compile": True}),
    "ours bf16 compiled": Way(our_way, OURS | BF16 | {"compile": True}),
}


# --- turns ---


def measure(name: str, args: argparse.Namespace, options: Options) -> list[TrainingRow]:
    """The rows of a recipe, one for each way; prints them."""
    device = entry.start(args)
    choose_algorithms(False)
    settings = {way: build(args, WAYS[way], device, options.steps) for way in ways_of(args, options)}
    epochs = {way: open_way(way, setting) for way, setting in settings.items()}
    speeds, added = take_turns(epochs, options.turns, device)
    rows = [make_row(name, way, setting, options, speeds, added[way]) for way, setting in settings.items()]
    print(heading(rows[0]), *map(line, rows), sep="\n", flush=True)
    return rows


def ways_of(args: argparse.Namespace, options: Options) -> list[str]:
    """The ways that were asked for, in order; a recipe without a teacher does not tell the two in fp32 apart."""
    chosen = [way for way in WAYS if options.ways is None or way in options.ways]
    if not options.compile:
        chosen = [way for way in chosen if not WAYS[way].flags["compile"]]
    return chosen if args.teacher_model else [way for way in chosen if way != "ours all fp32"]


def build(args: argparse.Namespace, way: Way, device: torch.device, steps: int) -> Setting:
    """What a way starts from: the same weights and images as every other one's."""
    own = argparse.Namespace(**vars(args) | way.flags)
    torch.manual_seed(args.seed)  # a model that is no checkpoint has random weights
    model, spec, recipe = open_student(own, device, adjust_ema=False)
    classes, count = num_classes(model, spec), steps * recipe.loader.batch_size
    return Setting(own, device, model, spec, recipe, lambda transform: JpegImages(transform, count, classes))


def open_way(way: str, setting: Setting) -> Callable[[], int]:
    """The way's loop, with the teacher that every other one has."""
    seed_process(setting.args.seed)
    return WAYS[way].run(setting)


def take_turns(
    epochs: dict[str, Callable[[], int]], turns: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Images per second of each way and turn, after one that does not count; and the most memory that one adds, MiB."""
    speeds: dict[str, list[float]] = {way: [] for way in epochs}
    added: dict[str, list[float]] = {way: [] for way in epochs}
    for turn in range(1 + turns):
        for way, epoch in epochs.items():
            gc.collect()  # what came before
            with _watched(device) as seen:
                images = epoch()
            if turn:
                speeds[way].append(images / seen["seconds"])
                added[way] += [seen["added_mib"]] if "added_mib" in seen else []
    return speeds, {way: max(mib, default=None) for way, mib in added.items()}


@contextmanager
def _watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds, with nothing left to do on the device before and after; on CUDA also the largest addition to memory."""
    seen: dict[str, float] = {}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    yield seen
    if cuda:
        torch.cuda.synchronize(device)
        seen["added_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    seen["seconds"] = time.perf_counter() - start


def make_row(
    name: str, way: str, setting: Setting, options: Options, speeds: dict[str, list[float]], added: float | None
) -> TrainingRow:
    """What a way's turns came to, beside the plain loop's."""
    args, recipe = setting.args, setting.recipe
    teacher_dtype = pick_teacher_dtype(args.teacher_dtype, recipe.loop.amp_dtype) if way.startswith("ours") else None
    if way == "plain amp":
        teacher_dtype = recipe.loop.amp_dtype
    mine = speeds[way]
    fp32, amp = (compare(mine, speeds.get(other)) for other in ("plain fp32", "plain amp"))
    return TrainingRow(
        recipe=name,
        way=way,
        dtype=dtype_name(recipe.loop.amp_dtype),
        teacher=args.teacher_model or "",
        teacher_dtype=dtype_name(teacher_dtype) if args.teacher_model else "",
        macs=count_complexity(setting.model, example_inputs(setting.spec, setting.device)).macs_paper,
        batch_size=recipe.loader.batch_size,
        image_size=recipe.augment.train_crop_size,
        workers=recipe.loader.workers,
        threads=torch.get_num_threads(),
        steps=options.steps,
        turns=options.turns,
        speed=median(mine),
        speed_min=min(mine),
        speed_max=max(mine),
        by_plain_fp32=fp32[0],
        by_plain_fp32_min=fp32[1],
        by_plain_fp32_max=fp32[2],
        by_plain_amp=amp[0],
        by_plain_amp_min=amp[1],
        by_plain_amp_max=amp[2],
        added_mib=added,
        device=device_name(setting.device),
        torch=torch.__version__,
    )


def dtype_name(dtype: torch.dtype | None) -> str:
    return next((name for name, known in AMP_DTYPES.items() if known is dtype), "fp32")


def device_name(device: torch.device) -> str:
    """The GPU's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(hardware()["cpu"])


def compare(mine: Sequence[float], other: Sequence[float] | None) -> tuple[float, float, float] | tuple[None, ...]:
    """Median, smallest and largest of the ratios of each turn; None where the other way was not run."""
    if other is None:
        return None, None, None
    ratios = [one / two for one, two in zip(mine, other, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def heading(row: TrainingRow) -> str:
    """Of a recipe's table: what was trained, and how; then the columns."""
    teacher = f", teacher {row.teacher}" if row.teacher else ""
    images = f"{row.batch_size} images of {row.image_size} pixels a step, {row.steps} steps a turn"
    return (
        f"{row.recipe}: {format_macs(row.macs)} MACs{teacher}; {images}; {row.workers} workers, {row.threads} threads, "
        f"{row.device}, torch {row.torch}\n"
        f"{'way':20}{'teacher':>8}{'images/s (min … max)':>26}{'/ plain fp32':>23}{'/ plain amp':>23}{'MiB':>8}"
    )


def line(row: TrainingRow) -> str:
    """A row of the printed table; what was not measured is a dash."""

    def spread(middle: float | None, low: float | None, high: float | None, width: int) -> str:
        return f"{'-' if middle is None else f'{middle:.2f} ({low:.2f} … {high:.2f})':>{width}}"

    memory = "-" if row.added_mib is None else f"{row.added_mib:.0f}"
    return (
        f"{row.way:20}{row.teacher_dtype or '-':>8}{spread(row.speed, row.speed_min, row.speed_max, 26)}"
        f"{spread(row.by_plain_fp32, row.by_plain_fp32_min, row.by_plain_fp32_max, 23)}"
        f"{spread(row.by_plain_amp, row.by_plain_amp_min, row.by_plain_amp_max, 23)}{memory:>8}"
    )
