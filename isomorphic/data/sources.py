"""Images and labels: where they come from.

Four sources answer to ``--dataset``: an ImageNet-style folder (the default), the handwritten digits that ship
with the repository, seeded random images, and whatever else ``timm.data.create_dataset`` can open from disk.
All of them hand an RGB PIL image to the transform and give ``(tensor C×H×W, int label)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from isomorphic.data.classes import FolderClasses, first_difference, folder_classes, no_data
from isomorphic.data.decoding import UNREADABLE, UnreadableImage, decode, reason_of
from isomorphic.data.folders import FolderListing, list_class_folders, list_folder, some_of
from isomorphic.data.transforms import Transform
from isomorphic.errors import UserError
from isomorphic.kinds import is_kind

Split = Literal["train", "val"]


DIGITS_FILE = Path(__file__).resolve().parents[2] / "data" / "digits.npz"


DIGITS_TRAIN_IMAGES = 1437


DIGITS_CLASSES = 10


SYNTHETIC_CLASSES = 1000


TIMM_DATASET = "timm.data.dataset.ImageDataset"
TORCHVISION_FOLDER = "torchvision.datasets.folder.DatasetFolder"


# What timm and the libraries behind it raise for names they do not know and data they cannot find.
NOT_OPENED = (AssertionError, RuntimeError, OSError, ImportError, ValueError, LookupError)


@dataclass(frozen=True)
class DataSource:
    """Which images to use, and what their labels are.

    `name` is '' (a folder with train/ and val/ under `root`), 'digits', 'synthetic', or a name that
    timm's ``create_dataset`` takes, such as 'torch/cifar10', looked for under `root`.
    `synthetic_size` (images a split) and `seed` belong to 'synthetic' alone. `class_map` is a file with the labels of
    class folders; `model_classes` are the names of the model's classes, by label, where it knows them.
    """

    name: str = ""
    root: str = "data/imagenet"
    synthetic_size: int = 64
    seed: int = 0
    class_map: str | None = None
    model_classes: tuple[str, ...] = ()


def class_names(source: DataSource) -> tuple[str, ...]:
    """Returns the names of the data's classes, by label; none where the data has no names.

    Those of an image folder are the model's if these include all of the folder's.

    Raises:
        UserError: the data cannot be found.
    """
    if source.class_map and source.name != "":
        raise UserError(f"--class-map is about folders of images, and {_describe(source)} has labels of its own")
    if source.name == "synthetic":
        return ()
    if source.name == "digits":
        return tuple(map(str, range(DIGITS_CLASSES)))
    if source.name == "":
        return _folder_classes(source).names
    return _names_of(_open_with_timm(source, "val"))


def class_count(source: DataSource) -> int | None:
    """Classes of the data, or None where the data has no say ('synthetic' takes the model's).

    Raises `UserError` where the data cannot be found.
    """
    return len(class_names(source)) or None


def check_classes(model_classes: int, source: DataSource) -> None:
    """Raise `UserError` where the model's classes are not the data's: by name, or else by number.

    A class map may name fewer classes than the model has.
    """
    names = class_names(source)
    if names and source.model_classes:
        _check_names(names, source)
    too_few = source.class_map and len(names) < model_classes
    if names and len(names) != model_classes and not too_few:
        hint = "" if source.name else "; --class-map FILE says which of more classes the folders are"
        raise UserError(
            f"the model has {model_classes} classes but {_describe(source)} has {len(names)}: "
            "--num-classes auto gives it a new head for the data's; or use data or a model with the same classes, "
            f"or --no-pretrained to build a model for this data{hint}"
        )


def _check_names(names: Sequence[str], source: DataSource) -> None:
    theirs = source.model_classes
    if source.class_map:  # what it does not name is not asked for
        theirs = [their if name else "" for name, their in zip(names, theirs, strict=False)]
    difference = first_difference(names, theirs, "in the data", "in the model")
    if difference:
        raise UserError(
            f"the model was made for other classes than those of {_describe(source)}: {difference}; "
            "--num-classes auto gives it a new head for the data's; or use data with the model's classes, or "
            "--ignore-class-names to go by their order alone"
        )


def build_dataset(
    source: DataSource, split: Split, transform: Transform, *, num_classes: int | None = None, image_size: int = 224
) -> LabelledImages:
    """The images of one split, each as ``(transform(image), label)``.

    `num_classes` (1000 where the caller has none) and `image_size` shape the 'synthetic' images and mean
    nothing to the other sources. Raises `UserError` for a missing folder, a class folder of train/ without
    images, classes that only val/ has, and unknown names. Nothing is downloaded.
    """
    if source.name == "synthetic":
        return SyntheticImages(source, split, transform, num_classes or SYNTHETIC_CLASSES, image_size)
    if source.name == "digits":
        return Digits(split, transform)
    if source.name == "":
        return _open_folder(source, split, transform)
    return OpenedImages(_open_with_timm(source, split), transform, _describe(source))


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """What every source gives: ``dataset[i]`` is the transformed RGB image i and its label.

    `notes` are lines for the user, on files that do not count and on classes without images.
    """

    notes: tuple[str, ...] = ()

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
            raise UserError(
                f"cannot read image {error}; replace or remove it, or leave out such images with --skip-unreadable "
                "(python tools/check_images.py DIR names all of them)"
            ) from error
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


class FolderImages(LabelledImages):
    """The images of class folders."""

    def __init__(self, items: FolderListing, transform: Transform, notes: Sequence[str] = ()) -> None:
        super().__init__(transform)
        self.items = items
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self.items.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.items.samples[index]
        return decode(path, path), label


class OpenedImages(LabelledImages):
    """A dataset that torchvision or timm opened, with every image as RGB and no image ever skipped.

    timm's own ``ImageDataset`` steps over a file that it cannot read and gives its neighbour instead, which
    would count one image twice; here the reader below it is asked directly and the file is named.
    torchvision's folders are asked for paths, since it would clip grey levels of 16 bits.
    """

    def __init__(self, opened: Any, transform: Transform, description: str) -> None:
        super().__init__(transform)
        self.items: Any = opened.reader if is_kind(opened, TIMM_DATASET) else opened
        self.description = description

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            content, label = self.items.samples[index] if is_kind(self.items, TORCHVISION_FOLDER) else self.items[index]
        except UNREADABLE as error:
            raise UnreadableImage(f"{self._name(index)}: {reason_of(error)}") from error
        return decode(content, self._name(index)), int(label)

    def _name(self, index: int) -> str:
        if is_kind(self.items, TORCHVISION_FOLDER):
            return self.items.samples[index][0]
        if hasattr(self.items, "filename"):  # the readers of timm
            return str(self.items.filename(index, absolute=True))
        return f"{index} of {self.description}"


def _describe(source: DataSource) -> str:
    if source.name in ("digits", "synthetic"):
        return f"dataset {source.name!r}"
    return f"dataset {source.name!r} under {source.root}" if source.name else f"the data under {source.root}"


def _folder_classes(source: DataSource) -> FolderClasses:
    return folder_classes(Path(source.root), class_map=source.class_map, model_classes=source.model_classes)


def _open_folder(source: DataSource, split: Split, transform: Transform) -> FolderImages:
    folder = Path(source.root) / split
    if not folder.is_dir():
        raise no_data(folder)
    classes = _folder_classes(source)
    listing = list_class_folders(folder, classes.labels)
    filled = {label for _, label in listing.samples}
    _check_filled(folder, listing, classes, filled)
    notes = [f"Left out of {folder}: {listing.left_out}"] if str(listing.left_out) else []
    lacking = [name for label, name in enumerate(classes.names) if label not in filled]
    if lacking:
        count = f"{len(lacking)} of {len(classes.names)} classes ({some_of(lacking)})"
        notes.append(f"No images of {count} in {folder}: the labels are those of {classes.origin}")
    return FolderImages(listing, transform, notes)


def _check_filled(folder: Path, listing: FolderListing, classes: FolderClasses, filled: set[int]) -> None:
    """Raises a UserError for a split without images, and for a class folder whose class has none anywhere."""
    empty = {name: path for name, path in listing.folders.items() if classes.labels[name] not in filled}
    if folder.name == "val" and classes.origin == "train/":  # val/ may lack images of a rare class, train/ may not
        train = folder.parent / "train"
        nowhere = [path for name, path in empty.items() if not list_folder(train / name).samples]
    elif folder.name == "val" and classes.origin != "val/":  # a file knows the classes
        nowhere = []
    else:
        nowhere = list(empty.values())
    if nowhere or not filled:
        where = f"class folder {some_of(nowhere)}: fill or remove the folder" if nowhere else str(folder)
        left_out = f" (left out: {listing.left_out})" if str(listing.left_out) else ""
        raise UserError(f"no images in {where}{left_out}")


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


def unlabelled_images(folder: str, transform: Callable[[Image.Image], Any]) -> FolderImages:
    """Returns all images in a folder, whatever its subfolders are called; their labels mean nothing.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: --unlabelled names one that holds images, itself or in its subfolders")
    listing = list_folder(Path(folder))
    left_out = str(listing.left_out)
    if not listing.samples:
        raise UserError(f"no images in {folder}" + (f" (left out: {left_out})" if left_out else ""))
    return FolderImages(listing, transform, [f"Left out of {folder}: {left_out}"] if left_out else [])


def _names_of(opened: Any) -> tuple[str, ...]:
    """Returns the names of an opened dataset's classes, by label, the first one of several; none where it has none."""
    items = opened.reader if is_kind(opened, TIMM_DATASET) else opened
    named = getattr(items, "wnids", None)  # torchvision's ImageNet has several names for a class beside its folder's
    named = named or getattr(items, "class_to_idx", None) or getattr(items, "classes", ())
    if not isinstance(named, dict):
        return tuple(map(str, named))
    by_label: dict[int, str] = {}
    for name, label in named.items():
        by_label.setdefault(label, str(name))
    return tuple(by_label.get(label, str(label)) for label in range(max(by_label, default=-1) + 1))
