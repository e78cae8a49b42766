"""Images and labels: where they come from, how they are prepared, who sees which.

Four sources answer to ``--dataset``: an ImageNet-style folder (the default), the handwritten digits that ship
with the repository, seeded random images, and whatever else ``timm.data.create_dataset`` can open from disk.
All of them hand an RGB PIL image to the transform and give ``(tensor C×H×W, int label)``.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.datasets import DatasetFolder, ImageFolder
from torchvision.transforms import InterpolationMode, v2

from isomorphic.errors import UserError
from isomorphic.processes import distributed

Split = Literal["train", "val"]
Transform = Callable[[Image.Image], Tensor]

DIGITS_FILE = Path(__file__).resolve().parents[2] / "data" / "digits.npz"
DIGITS_TRAIN_IMAGES = 1437
DIGITS_CLASSES = 10
SYNTHETIC_CLASSES = 1000

# What Pillow raises for files that are missing, cut short, damaged or no images at all.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, MemoryError),
    *(struct.error, Image.DecompressionBombError),
)
# How many of many unreadable images a message names.
NAMED_UNREADABLE = 10
# What timm and the libraries behind it raise for names they do not know and data they cannot find.
NOT_OPENED = (AssertionError, RuntimeError, OSError, ImportError, ValueError, LookupError)


class UnreadableImage(Exception):
    """An image that cannot be decoded; its text is the file's name and the reason, in one line."""


class DeadWorker(UserError):
    """A loader's worker process died. It may have held a lock that torch waits for when the loader goes."""


class Batch(NamedTuple):
    """Images (B, C, H, W), their labels (B,), and the images that are missing among them, by name and reason."""

    images: Tensor
    labels: Tensor
    unreadable: Sequence[str] = ()


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: sizes in pixels; mean and std per RGB channel of 0..1."""

    input_size: int = 224
    resize_size: int = 256
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD


@dataclass(frozen=True)
class DataSource:
    """Which images to use.

    `name` is '' (an ImageFolder with train/ and val/ under `root`), 'digits', 'synthetic', or a name that
    timm's ``create_dataset`` takes, such as 'torch/cifar10', looked for under `root`.
    `synthetic_size` (images a split) and `seed` belong to 'synthetic' alone.
    """

    name: str = ""
    root: str = "data/imagenet"
    synthetic_size: int = 64
    seed: int = 0


def class_count(source: DataSource) -> int | None:
    """Classes of the data, or None where the data has no say ('synthetic' takes the model's).

    Raises `UserError` where the data cannot be found.
    """
    if source.name == "synthetic":
        return None
    if source.name == "digits":
        return DIGITS_CLASSES
    if source.name == "":
        return len(_class_folders(_any_split_folder(source.root)))
    return _classes_of(_open_with_timm(source, "val"))


def check_classes(model_classes: int, source: DataSource) -> None:
    """Raise `UserError`, naming both numbers, where the model's classes are not the data's."""
    data_classes = class_count(source)
    if data_classes is not None and data_classes != model_classes:
        raise UserError(
            f"the model has {model_classes} classes but {_describe(source)} has {data_classes}: "
            "use data or a model with the same classes, or --no-pretrained to build a model for this data"
        )


def build_dataset(
    source: DataSource, split: Split, transform: Transform, *, num_classes: int | None = None, image_size: int = 224
) -> LabelledImages:
    """The images of one split, each as ``(transform(image), label)``.

    `num_classes` (1000 where the caller has none) and `image_size` shape the 'synthetic' images and mean
    nothing to the other sources. Raises `UserError` for a missing folder, an empty class folder, classes
    that differ between train/ and val/, and unknown names. Nothing is downloaded.
    """
    if source.name == "synthetic":
        return SyntheticImages(source, split, transform, num_classes or SYNTHETIC_CLASSES, image_size)
    if source.name == "digits":
        return Digits(split, transform)
    if source.name == "":
        return OpenedImages(_open_image_folder(source.root, split), transform, _describe(source))
    return OpenedImages(_open_with_timm(source, split), transform, _describe(source))


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter side, crop the centre, scale to 0..1 and normalise: PIL image → float tensor 3×S×S.

    The resize is Pillow's, which filters out aliasing. Raises `UserError` for an interpolation that does not
    exist and for a resize smaller than the crop, which would frame every image in black.
    """
    p = preprocessing
    if p.resize_size < p.input_size:
        raise UserError(
            f"images resized to {p.resize_size} are too small for an input of {p.input_size}: "
            f"pass --val-resize-size {p.input_size} or more"
        )
    return v2.Compose(
        [
            v2.Resize(p.resize_size, interpolation=interpolation_mode(p.interpolation), antialias=True),
            v2.CenterCrop(p.input_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(p.mean), std=list(p.std)),
        ]
    )


def interpolation_mode(name: str) -> InterpolationMode:
    """torchvision's mode of that name ('bicubic', 'bilinear', ...). Raises `UserError` for any other."""
    try:
        return InterpolationMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise UserError(f"unknown interpolation {name!r}: choose one of {known}") from None


def loader_options(workers: int, device: torch.device | str, *, seed: int = 0) -> dict[str, Any]:
    """Settings that every DataLoader here shares: worker processes, pinned memory and a seeded generator.

    The generator decides the order of a shuffled loader and seeds torch, numpy and random in each worker, so
    that augmentation repeats with the seed; it also keeps a loader from drawing on the global random state.
    More workers than cores only slow each other down, so `workers` is an upper limit. A worker is sent for two
    batches ahead, as by default.
    """
    return {
        "num_workers": min(workers, _available_cores()),
        "pin_memory": torch.device(device).type == "cuda",
        "generator": torch.Generator().manual_seed(seed),
        "worker_init_fn": _outlive_signals,
    }


@contextlib.contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns the death of a loader's worker process into a `DeadWorker`.

    torch hears of it by a signal and raises wherever the main process happens to be: this must enclose the body of a
    loop over a loader as well.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid|unable to allocate shared memory", str(error)):
            raise
        reason = re.search(r"killed by signal: \w[\w ]*|unable to allocate shared memory", f"{error} {error.__cause__}")
        raise DeadWorker(
            f"a data loader process died ({reason[0] if reason else 'unexpectedly'}), most likely for want of memory "
            "or of shared memory (/dev/shm): lower --workers or --batch-size"
        ) from error


def build_eval_loader(
    dataset: Dataset[tuple[Tensor, int]],
    batch_size: int,
    workers: int,
    device: torch.device | str,
    *,
    collect_unreadable: bool = False,
) -> DataLoader[Any]:
    """Batches (images B×C×H×W, labels B) of this process's shard, in order: all ranks see each image once.

    Rank r of n sees images r, r + n, r + 2n, ... Shards may differ by one image: nothing is padded or
    repeated, so that sums over ranks are exact (361 images on 2 ranks count 361).

    An image that cannot be read is a `UserError`. With `collect_unreadable`, which needs `LabelledImages`, it is
    left out of its batch instead, which becomes a `Batch` that names it; a batch may have no images left.
    """
    images: Dataset[Any] = ReadableImages(cast(LabelledImages, dataset)) if collect_unreadable else dataset
    if distributed.world_size() > 1:
        mine = range(distributed.rank(), len(cast(Sized, dataset)), distributed.world_size())
        images = Subset(images, mine)
    collate = _collate_readable if collect_unreadable else None
    return DataLoader(images, batch_size, shuffle=False, collate_fn=collate, **loader_options(workers, device))


def describe_unreadable(names: Sequence[str]) -> str:
    """`image a.png: not an image`, or `12 images: a.png: not an image; b.png: …; and 2 more`."""
    if len(names) == 1:
        return f"image {names[0]}"
    rest = [f"and {len(names) - NAMED_UNREADABLE} more"] if len(names) > NAMED_UNREADABLE else []
    return f"{len(names)} images: {'; '.join([*names[:NAMED_UNREADABLE], *rest])}"


def build_scoring_loader(
    dataset: Dataset[tuple[Tensor, int]],
    batch_size: int,
    num_batches: int,
    workers: int,
    device: torch.device | str,
    *,
    seed: int = 0,
) -> DataLoader[Any]:
    """This process's share of `num_batches` batches drawn without repetition, in the order that `seed` sets.

    The batches are the same however many processes there are; rank r of n gets batches r, r + n, ... A
    dataset that is too small gives fewer, and its last batch may be smaller.
    """
    order = torch.randperm(len(cast(Sized, dataset)), generator=torch.Generator().manual_seed(seed))
    batches = [batch.tolist() for batch in order.split(batch_size)[:num_batches]]
    mine = batches[distributed.rank() :: distributed.world_size()]
    return DataLoader(dataset, batch_sampler=mine, **loader_options(workers, device, seed=seed))


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """What every source gives: ``dataset[i]`` is the transformed RGB image i and its label."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, int]:
        """RGB image and label, before the transform. Raises `UnreadableImage`."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.load(index)
        except UnreadableImage as error:
            raise UserError(f"cannot read image {error}; replace or remove it") from error
        return self.transform(image), label


class ReadableImages(Dataset[tuple[Tensor, int] | str]):
    """The same images, with name and reason in the place of each that cannot be read."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.images.load(index)
        except UnreadableImage as error:
            return str(error)
        return self.images.transform(image), label


class Digits(LabelledImages):
    """1,797 handwritten digits of 8×8 pixels in 10 classes (data/README.md), as RGB images."""

    def __init__(self, split: Split, transform: Transform) -> None:
        super().__init__(transform)
        if not DIGITS_FILE.is_file():
            raise UserError(f"{DIGITS_FILE} is missing: restore it with `git checkout -- data/digits.npz`")
        part = slice(None, DIGITS_TRAIN_IMAGES) if split == "train" else slice(DIGITS_TRAIN_IMAGES, None)
        with np.load(DIGITS_FILE) as arrays:
            images, self.labels = arrays["images"][part], arrays["labels"][part]
        # (N, 8, 8), grey levels 0..16 → 0..255, rounded
        self.pixels = ((images.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


class SyntheticImages(LabelledImages):
    """Random RGB noise with random labels, for dry runs and benchmarks.

    Image i of a split depends on the seed, the split and i alone: not on how many there are, nor on the order
    in which, or the process where, they are asked for.
    """

    def __init__(
        self, source: DataSource, split: Split, transform: Transform, num_classes: int, image_size: int
    ) -> None:
        super().__init__(transform)
        self.stream = (source.seed, 0 if split == "train" else 1)
        self.size = source.synthetic_size
        self.num_classes = num_classes
        self.image_size = image_size

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"image {index} of {self.size}")
        rng = np.random.default_rng((*self.stream, index))
        label = int(rng.integers(self.num_classes))
        pixels = rng.integers(256, size=(self.image_size, self.image_size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), label


class OpenedImages(LabelledImages):
    """A dataset that torchvision or timm opened, with every image as RGB and no image ever skipped.

    timm's own ``ImageDataset`` steps over a file that it cannot read and gives its neighbour instead, which
    would count one image twice; here the reader below it is asked directly and the file is named.
    """

    def __init__(self, opened: Any, transform: Transform, description: str) -> None:
        super().__init__(transform)
        self.items: Any = opened.reader if isinstance(opened, ImageDataset) else opened
        self.description = description

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            content, label = self.items[index]
            image = content if isinstance(content, Image.Image) else Image.open(content)
            return image.convert("RGB"), int(label)
        except UNREADABLE as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            raise UnreadableImage(f"{self._name(index)}: {reason}") from error

    def _name(self, index: int) -> str:
        if isinstance(self.items, DatasetFolder):
            return self.items.samples[index][0]
        if hasattr(self.items, "filename"):  # the readers of timm
            return str(self.items.filename(index, absolute=True))
        return f"{index} of {self.description}"


def _collate_readable(items: list[tuple[Tensor, int] | str]) -> Batch:
    names = [item for item in items if isinstance(item, str)]
    readable = [item for item in items if not isinstance(item, str)]
    images, labels = default_collate(readable) if readable else (torch.empty(0), torch.empty(0, dtype=torch.long))
    return Batch(images, labels, names)


def _describe(source: DataSource) -> str:
    if source.name in ("digits", "synthetic"):
        return f"dataset {source.name!r}"
    return f"dataset {source.name!r} under {source.root}" if source.name else f"the data under {source.root}"


def _outlive_signals(worker: int) -> None:
    """Ctrl-C, torchrun and schedulers signal whole groups, or all processes of a job.

    The main process decides what follows, and needs its workers until then. They notice by themselves that it is gone;
    while it is there, its own SIGTERM ends them: Python waits for that when it ends with an exception.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent a signal, which a handler is not told
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        threading.Thread(target=_heed_the_parent_alone, daemon=True).start()


def _heed_the_parent_alone() -> None:
    while True:
        signalled = signal.sigwaitinfo({signal.SIGTERM, signal.SIGUSR1})
        if signalled.si_signo == signal.SIGTERM and signalled.si_pid == os.getppid():
            os._exit(0)


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_image_folder(root: str, split: Split) -> ImageFolder:
    folder = Path(root) / split
    if not folder.is_dir():
        raise _no_data(folder)
    _check_same_classes(Path(root))
    _class_folders(folder)
    dataset = ImageFolder(str(folder), allow_empty=True)
    empty = set(range(len(dataset.classes))) - set(dataset.targets)
    if empty:
        names = ", ".join(str(folder / dataset.classes[label]) for label in sorted(empty)[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(f"no images in class folder {names}{more}: fill or remove the folder")
    return dataset


def _no_data(folder: Path) -> UserError:
    return UserError(
        f"no data folder {folder}: --data-path names the folder that holds train/ and val/, "
        "or try --dataset digits, which ships with the project"
    )


def _any_split_folder(root: str) -> Path:
    for split in ("val", "train"):
        folder = Path(root) / split
        if folder.is_dir():
            return folder
    raise _no_data(Path(root) / "val")


def _class_folders(folder: Path) -> list[str]:
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
    if not classes:
        raise UserError(f"no class folders in {folder}: each class needs a folder of its own, named after it")
    return classes


def _check_same_classes(root: Path) -> None:
    """A label is the position of its folder's name, so both splits need the same folders."""
    if not ((root / "train").is_dir() and (root / "val").is_dir()):
        return
    unshared = set(_class_folders(root / "train")) ^ set(_class_folders(root / "val"))
    if unshared:
        names = ", ".join(sorted(unshared)[:5]) + (", ..." if len(unshared) > 5 else "")
        raise UserError(f"train/ and val/ under {root} need the same class folders; only one has: {names}")


def _open_with_timm(source: DataSource, split: Split) -> Any:
    """The dataset of that name, without a transform, or `UserError`."""
    prefix = source.name.partition("/")[0].lower()
    if prefix not in ("torch", "hfds"):  # timm takes any other name for a folder; streams have no exact shards
        raise UserError(
            f"unknown dataset {source.name!r}: use digits, synthetic, '' for a folder with train/ and val/, "
            "or a timm name that starts with torch/ or hfds/, such as torch/cifar10"
        )
    timm_split = {"train": "train", "val": "validation"}[split]
    try:
        return create_dataset(source.name, root=source.root, split=timm_split, download=False)
    except NOT_OPENED as error:
        reason = f"{error}".strip() or type(error).__name__
        hint = "--data-path says where it lies; nothing is downloaded"
        raise UserError(f"cannot open {_describe(source)}: {reason} ({hint})") from error


def _classes_of(opened: Any) -> int | None:
    source = opened.reader if isinstance(opened, ImageDataset) else opened
    named = getattr(source, "class_to_idx", None) or getattr(source, "classes", ())
    return len(named) or None
