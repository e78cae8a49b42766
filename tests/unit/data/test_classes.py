"""What labels stand for: train/'s folders, the model's class names, or a class map."""

from __future__ import annotations

import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest

from isomorphic.data.classes import first_difference, names_of_map, read_class_map
from isomorphic.data.sources import DataSource, build_dataset, check_classes, class_count, class_names
from isomorphic.errors import UserError
from tests.unit.data.conftest import PIXELS, every, save_image


def labels(source: DataSource, split: str = "val") -> list[int]:
    return [label for _, label in every(build_dataset(source, split, PIXELS))]  # type: ignore[arg-type]


def notes(source: DataSource, split: str = "val") -> tuple[str, ...]:
    return build_dataset(source, split, PIXELS).notes  # type: ignore[arg-type]


# --- val/ lacks a class ---


@pytest.mark.parametrize("emptied", ["removed", "empty", "without images"])
def test_val_may_lack_a_class_of_train(folder: Path, emptied: str):
    """The label of dog is that of train/, where bird and cat come before it."""
    save_image(folder / "train" / "bird" / "0.png", (0, 255, 0))
    source = DataSource(root=str(folder))
    if emptied != "removed":
        (folder / "val" / "bird").mkdir()
    if emptied == "without images":
        (folder / "val" / "bird" / "notes.txt").write_text("")
    assert class_count(source) == 3 and class_names(source) == ("bird", "cat", "dog")
    assert labels(source, "train") == [0, 1, 1, 2]
    assert labels(source) == [1, 2]
    assert notes(source)[-1] == (
        f"No images of 1 of 3 classes (bird) in {folder / 'val'}: the labels are those of train/"
    )
    assert notes(source, "train") == ()


def test_a_class_that_is_empty_in_both_is_refused(folder: Path):
    for split in ("train", "val"):
        (folder / split / "bird").mkdir()
        with pytest.raises(UserError, match=f"no images in class folder .*{split}/bird: fill or remove the folder"):
            build_dataset(DataSource(root=str(folder)), split, PIXELS)  # type: ignore[arg-type]


def test_a_val_folder_alone_may_not_have_an_empty_class(folder: Path):
    shutil.rmtree(folder / "train")
    (folder / "val" / "dog" / "0.png").unlink()
    with pytest.raises(UserError, match="val/dog: fill or remove the folder"):
        build_dataset(DataSource(root=str(folder)), "val", PIXELS)


# --- the model's names ---


def test_the_models_names_decide_where_they_include_the_folders(folder: Path):
    shutil.rmtree(folder / "train")
    for names, expected in [(("dog", "cat"), [1, 0]), (("ant", "cat", "bee", "dog"), [1, 3])]:
        source = DataSource(root=str(folder), model_classes=names)
        assert class_names(source) == names and labels(source) == expected
        check_classes(len(names), source)
    assert notes(source) == (
        f"No images of 2 of 4 classes (ant, bee) in {folder / 'val'}: the labels are those of the model",
    )


def test_val_may_have_what_train_has_not_if_the_model_knows_both(folder: Path):
    save_image(folder / "val" / "bird" / "0.png", (0, 255, 0))
    source = DataSource(root=str(folder), model_classes=("bird", "cat", "dog"))
    assert labels(source) == [0, 1, 2] and labels(source, "train") == [1, 1, 2]


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (("cat", "horse"), "class 1 is 'dog' in the data and 'horse' in the model"),
        (("ant", "bee"), "class 0 is 'cat' in the data and 'ant' in the model"),
        (("Cat", "dog"), "class 0 is 'cat' in the data and 'Cat' in the model"),
        (("cat",), "class 1 is 'dog' in the data and missing in the model"),
    ],
)
def test_other_classes_are_refused_by_the_first_difference(folder: Path, names: tuple[str, ...], difference: str):
    source = DataSource(root=str(folder), model_classes=names)
    with pytest.raises(UserError, match="the model was made for other classes than those of the data under") as error:
        check_classes(len(names), source)
    assert difference in str(error.value) and "--ignore-class-names" in str(error.value)
    check_classes(2, DataSource(root=str(folder)))  # without names, numbers decide


def test_named_datasets_have_names_and_an_order_of_their_own(folder: Path):
    assert class_names(DataSource("digits")) == tuple("0123456789") and class_names(DataSource("synthetic")) == ()
    check_classes(10, DataSource("digits", model_classes=tuple("0123456789")))
    check_classes(3, DataSource("synthetic", model_classes=("a", "b", "c")))
    with pytest.raises(UserError, match="those of dataset 'digits': class 0 is '0' in the data and '9' in the model"):
        check_classes(10, DataSource("digits", model_classes=tuple("9876543210")))
    opened = DataSource("torch/image_folder", root=str(folder), model_classes=("dog", "cat"))
    with pytest.raises(UserError, match="class 0 is 'cat' in the data and 'dog' in the model"):
        check_classes(2, opened)


def test_torchvisions_imagenet_is_known_by_its_folders(monkeypatch: pytest.MonkeyPatch):
    """It has several names for a class, which are not to be counted."""
    opened = SimpleNamespace(
        wnids=["n01", "n02"],
        classes=[("tench", "Tinca"), ("crane",)],
        class_to_idx={"tench": 0, "Tinca": 0, "crane": 1},
    )
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *args, **kwargs: opened)
    assert class_names(DataSource("torch/imagenet")) == ("n01", "n02")
    del opened.wnids
    assert class_count(DataSource("torch/imagenet")) == 2


def test_differences_are_found_in_order():
    assert first_difference(["a", "b"], ["a", "b"], "here", "there") == ""
    assert first_difference(["a", "b"], ["a", "c"], "here", "there") == "class 1 is 'b' here and 'c' there"
    assert first_difference(["a"], ["a", "c"], "here", "there") == "class 1 is missing here and 'c' there"


# --- class maps ---


@pytest.fixture
def subset(folder: Path) -> DataSource:
    """The folder, and a map in which its classes are the third and the first of four."""
    (folder / "map.txt").write_text("dog\nbee\ncat\nemu\n\n")
    return DataSource(root=str(folder), class_map=str(folder / "map.txt"))


def test_a_class_map_gives_a_subset_the_labels_of_the_whole(subset: DataSource, folder: Path):
    assert labels(subset) == [2, 0] and labels(subset, "train") == [2, 2, 0]
    assert class_names(subset) == ("dog", "bee", "cat", "emu") and class_count(subset) == 4
    for classes in (4, 1000):
        check_classes(classes, subset)
    with pytest.raises(UserError, match="the model has 3 classes but the data under .* has 4"):
        check_classes(3, subset)
    assert notes(subset) == (
        f"No images of 2 of 4 classes (bee, emu) in {folder / 'val'}: the labels are those of {folder / 'map.txt'}",
    )


def test_folders_that_the_map_does_not_name_are_left_out_with_a_word(subset: DataSource, folder: Path):
    for split in ("train", "val"):
        save_image(folder / split / "fox" / "0.png", (9, 9, 9))
    assert labels(subset) == [2, 0]
    assert notes(subset)[0] == (f"Left out of {folder / 'val'}: 1 class folder that the class map does not name (fox)")
    (folder / "map.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match=r"no images in .*val \(left out: 3 class folders .*\(cat, dog, fox\)\)"):
        build_dataset(subset, "val", PIXELS)


def test_names_of_the_model_are_held_against_the_map(subset: DataSource):
    known = ("dog", "bee", "cat", "emu", "fox")
    check_classes(5, DataSource(root=subset.root, class_map=subset.class_map, model_classes=known))
    swapped = DataSource(
        root=subset.root, class_map=subset.class_map, model_classes=("cat", "bee", "dog", "emu", "fox")
    )
    with pytest.raises(UserError, match="class 0 is 'dog' in the data and 'cat' in the model"):
        check_classes(5, swapped)


def test_pickled_maps_may_join_folders_and_run_nothing(folder: Path):
    (folder / "map.pkl").write_bytes(pickle.dumps({"dog": 0, "cat": 0, "emu": 2}))
    source = DataSource(root=str(folder), class_map="map.pkl")  # looked for beside train/ as well
    assert labels(source) == [0, 0] and class_names(source) == ("cat, dog", "", "emu")
    (folder / "map.pkl").write_bytes(pickle.dumps(OrderedDict(dog=0)))
    with pytest.raises(UserError, match="map.pkl is no class map: .*OrderedDict is not permitted"):
        read_class_map("map.pkl", folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such class map"),
        ("map.csv", b"cat\n", "is no class map"),
        ("map.txt", b"", "is no class map: it needs one name"),
        ("map.txt", b"\xff\xfe\x00", "is no class map"),
        ("map.pkl", b"no pickle", "is no class map"),
        ("map.pkl", pickle.dumps(["cat"]), "is no class map"),
        ("map.pkl", pickle.dumps({"cat": -1}), "is no class map"),
        ("map.pkl", pickle.dumps({"cat": 10**12}), "is no class map"),
        ("map.pkl", pickle.dumps({"cat": "0"}), "is no class map"),
    ],
)
def test_what_is_no_class_map_is_said_in_one_line(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_class_map(str(tmp_path / name), tmp_path)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_class_maps_are_about_folders(tmp_path: Path):
    with pytest.raises(UserError, match="--class-map is about folders of images, and dataset 'digits' has labels of"):
        class_count(DataSource("digits", class_map="map.txt"))
    assert names_of_map({"b": 1, "a": 1, "c": 3}) == ("", "a, b", "", "c")


def test_a_model_with_more_classes_is_told_of_class_maps(folder: Path):
    with pytest.raises(UserError, match="the model has 1000 classes but .* has 2: .*--class-map FILE says which"):
        check_classes(1000, DataSource(root=str(folder)))
