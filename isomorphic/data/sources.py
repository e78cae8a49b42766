"""Images and labels: where they come from.

Four sources answer to ``--dataset``: an ImageNet-style folder (the default), the handwritten digits that ship
with the repository, seeded random images, and whatever else ``timm.data.create_dataset`` can open from disk.
All of them hand an RGB PIL image to the transform and give ``(tensor C×H×W, int label)``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from isomorphic.data.transforms import Transform
from isomorphic.errors import UserError
from isomorphic.kinds import is_kind

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

Split = Literal["train", "val"]


DIGITS_FILE = Path(__file__).resolve().parents[2] / "data" / "digits.npz"


DIGITS_TRAIN_IMAGES = 1437


DIGITS_CLASSES = 10


SYNTHETIC_CLASSES = 1000


TIMM_DATASET = "timm.data.dataset.ImageDataset"


# What Pillow raises for files that are missing, cut short, damaged or no images at all.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, MemoryError),
    *(struct.error, Image.DecompressionBombError),
)


# What timm and the libraries behind it raise for names they do not know and data they cannot find.
NOT_OPENED = (AssertionError, RuntimeError, OSError, ImportError, ValueError, LookupError)


class UnreadableImage(Exception):
    """An image that cannot be decoded; its text is the file's name and the reason, in one line."""


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
        self.items: Any = opened.reader if is_kind(opened, TIMM_DATASET) else opened
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
        if is_kind(self.items, "torchvision.datasets.folder.DatasetFolder"):
            return self.items.samples[index][0]
        if hasattr(self.items, "filename"):  # the readers of timm
            return str(self.items.filename(index, absolute=True))
        return f"{index} of {self.description}"


def _describe(source: DataSource) -> str:
    if source.name in ("digits", "synthetic"):
        return f"dataset {source.name!r}"
    return f"dataset {source.name!r} under {source.root}" if source.name else f"the data under {source.root}"


def _open_image_folder(root: str, split: Split) -> ImageFolder:
    from torchvision.datasets import ImageFolder

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
    from timm.data.dataset_factory import create_dataset

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
    source = opened.reader if is_kind(opened, TIMM_DATASET) else opened
    named = getattr(source, "class_to_idx", None) or getattr(source, "classes", ())
    return len(named) or None


class ImageFiles:
    """Image files without labels, as `OpenedImages` takes them: each has the label -1, which no loss takes."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.names[index], -1

    def filename(self, index: int, absolute: bool = True) -> str:
        """Returns the path, as it was found."""
        return self.names[index]


def unlabelled_images(folder: str, transform: Callable[[Image.Image], Any]) -> tuple[OpenedImages, list[str]]:
    """Returns the images in a folder and in its subfolders, in order of their paths, and the other files among them.

    A file is an image if its ending is that of a format that Pillow reads; subfolders may be classes or anything else.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: --unlabelled names one that holds images, itself or in its subfolders")
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(os.path.join(path, name) for path, _, names in os.walk(folder, followlinks=True) for name in names)
    images = [name for name in files if Path(name).suffix.lower() in endings]
    if not images:
        raise UserError(f"no images in {folder}: none of its {len(files)} files has the ending of an image")
    return OpenedImages(ImageFiles(images), transform, folder), sorted(set(files) - set(images))
