"""What counts in folders of images, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from isomorphic.data.folders import class_folders, list_class_folders, list_folder
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.errors import UserError
from tests.unit.data.conftest import PIXELS, save_image

LABELS = {"cat": 0, "dog": 1}


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


def names(folder: Path) -> list[str]:
    """The images of a split, relative to it."""
    return [os.path.relpath(path, folder) for path, _ in list_class_folders(folder, LABELS).samples]


def test_the_order_is_that_of_torchvision(tmp_path: Path):
    """Runs that were begun with torchvision's lists go on with the same images."""
    for name in ["cat/b.png", "cat/a.png", "cat/a-1/z.png", "cat/a/y.png", "cat/a/B/x.png", "cat/Z/w.PNG", "dog/0.png"]:
        save_image(tmp_path / name, (1, 2, 3))
    assert list_class_folders(tmp_path, LABELS).samples == ImageFolder(str(tmp_path)).samples


def test_every_ending_that_pillow_reads_counts(tmp_path: Path):
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    (tmp_path / "val" / "cat").mkdir(parents=True)
    for name, kind in [
        ("a.jfif", "JPEG"),
        ("b.JFIF", "JPEG"),
        ("c.jp2", "JPEG2000"),
        ("d.gif", "GIF"),
        ("e.tga", "TGA"),
    ]:
        image.save(tmp_path / "val" / "cat" / name, kind)
    dataset = build_dataset(DataSource(root=str(tmp_path)), "val", PIXELS)
    assert len(dataset) == 5 and dataset.notes == ()
    assert all(dataset[index][0].shape == (3, 4, 4) for index in range(5))


def test_what_is_left_out_is_counted_in_one_line(folder: Path):
    train = folder / "train"
    for name in ["cat/notes.txt", "cat/a.heic", "cat/b.HEIC", "dog/c.heic", "dog/README"]:
        (train / name).write_text("")
    for name in ["cat/._0.png", "cat/.DS_Store", "dog/Thumbs.db", ".DS_Store"]:
        (train / name).write_text("")
    for name in [".ipynb_checkpoints/0.png", "__MACOSX/0.png", "cat/@eaDir/0.jpg", "lonely.png"]:
        save_image(train / name, (0, 0, 0))
    dataset = build_dataset(DataSource(root=str(folder)), "train", PIXELS)
    assert [label for _, label in (dataset[index] for index in range(len(dataset)))] == [0, 0, 1]
    assert dataset.notes == (
        f"Left out of {train}: 3 .heic, 1 .txt, 1 without an ending (not read by Pillow); "
        "7 hidden or of another system; 1 image outside of class folders",
    )
    assert build_dataset(DataSource(root=str(folder)), "val", PIXELS).notes == ()


@pytest.mark.parametrize(
    ("at", "to"),
    [
        ("cat/back", "."),  # train/
        ("cat/again", "cat"),
        ("cat/deep/er/up", "cat/deep"),
        ("whole", "."),  # a class folder that holds all the others
        ("cat/far", ".."),
    ],
)
def test_a_link_to_a_folder_around_it_is_left_out(folder: Path, at: str, to: str):
    train = folder / "train"
    before = names(train)
    link(train / at, train / to)
    assert names(train) == before and list_class_folders(train, LABELS).left_out.links == 1
    assert class_folders(train) == ["cat", "dog"]


def test_links_that_lead_to_each_other_end(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    extra = tmp_path_factory.mktemp("extra")
    train = folder / "train"
    save_image(extra / "images" / "9.png", (0, 0, 0))
    link(train / "cat" / "more", extra / "images")
    link(extra / "images" / "back", train / "cat")
    link(extra / "images" / "up", extra)
    link(extra / "images" / "nowhere", extra / "missing")
    (extra / "images" / "itself").symlink_to(extra / "images" / "itself")
    listing = list_class_folders(train, LABELS)
    assert names(train) == ["cat/0.png", "cat/1.png", "cat/more/9.png", "dog/0.png"]
    assert listing.left_out.links == 2 and listing.left_out.endings == {"without an ending": 2}


def test_links_to_other_folders_and_files_count(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    extra = tmp_path_factory.mktemp("extra")
    save_image(extra / "7.png", (0, 0, 0))
    train = folder / "train"
    link(train / "cat" / "more", extra)
    link(train / "cat" / "once more", extra)  # whoever wants images twice may have them
    (train / "dog" / "x.png").symlink_to(extra / "7.png")
    link(train / "emu", folder / "val" / "cat")
    assert names(train) == ["cat/0.png", "cat/1.png", "cat/more/7.png", "cat/once more/7.png", "dog/0.png", "dog/x.png"]
    assert class_folders(train) == ["cat", "dog", "emu"]
    moved = folder.parent / f"{folder.name}_linked"
    link(moved, folder)
    assert names(moved / "train") == names(train)


def test_a_class_whose_files_are_all_left_out_says_so(folder: Path):
    (folder / "train" / "dog" / "0.png").rename(folder / "train" / "dog" / "0.heic")
    with pytest.raises(UserError, match=r"train/dog: fill or remove .*left out: 1 .heic \(not read by Pillow\)"):
        build_dataset(DataSource(root=str(folder)), "train", PIXELS)


def test_a_folder_without_classes_is_listed_whole(tmp_path: Path):
    for name in ["a.png", "b/c.jpg", "b/d/e.webp"]:
        save_image(tmp_path / name, (1, 1, 1))
    (tmp_path / "b" / "notes.txt").write_text("")
    listing = list_folder(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path, _ in listing.samples] == ["a.png", "b/c.jpg", "b/d/e.webp"]
    assert str(listing.left_out) == "1 .txt (not read by Pillow)"
    with pytest.raises(UserError, match="cannot list .*missing: No such file"):
        list_folder(tmp_path / "missing")
