"""Images that are left out: what stands in for them, and how many there may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from isomorphic.data.loaders import build_scoring_loader
from isomorphic.data.skipping import SkippedImages, SubstitutedImages, check_share
from isomorphic.data.sources import DataSource, LabelledImages, build_dataset
from isomorphic.errors import UserError
from isomorphic.processes import distributed
from isomorphic.training.recipe import AugmentRecipe, LoaderRecipe
from isomorphic.training.sampling import build_train_loader, start_epoch
from tests.unit.data.conftest import PIXELS, save_image

BAD = {1, 4, 5, 9}


@pytest.fixture
def ten(tmp_path: Path) -> LabelledImages:
    """Ten images in two classes, of which each has its own red; four are text."""
    for number in range(10):
        path = tmp_path / "train" / ("cat" if number < 5 else "dog") / f"{number}.png"
        save_image(path, (number, 0, 0), (8, 8))
        if number in BAD:
            path.write_text("not an image")
    return build_dataset(DataSource(root=str(tmp_path)), "train", PIXELS)


def number(name: str) -> int:
    return int(Path(name.partition(": ")[0]).stem)


def test_the_next_image_stands_in_for_one_that_cannot_be_read(ten: LabelledImages):
    images = SubstitutedImages(ten, 0.5)
    assert len(images) == 10
    seen = [images[index] for index in range(10)]
    assert [int(image[0, 0, 0]) for image, _, _ in seen] == [0, 2, 2, 3, 6, 6, 6, 7, 8, 0]  # the first follows the last
    assert [label for _, label, _ in seen] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    named = [[number(name) for name in names] for _, _, names in seen]
    assert named == [[], [1], [], [], [4, 5], [5], [], [], [], [9]]


def test_many_in_a_row_stop_it(ten: LabelledImages):
    with pytest.raises(UserError, match=r"cannot read 2 images: .*; these are more than 10% of 10 images"):
        SubstitutedImages(ten, 0.1)[4]
    for path, _ in ten.items.samples:  # type: ignore[attr-defined]
        Path(path).write_text("")
    with pytest.raises(UserError, match="there is no image that can be read: 10 images: "):
        SubstitutedImages(ten, 1.0)[3]


def test_a_share_of_all_images_may_be_left_out():
    check_share([], 0, 0.0)
    check_share(["a: x"] * 4, 40, 0.1)
    with pytest.raises(
        UserError, match="cannot read 5 images: .*more than 12% of 40 images: .*--skip-unreadable SHARE"
    ):
        check_share(["a: x"] * 5, 40, 0.12)
    with pytest.raises(
        UserError, match="cannot read image a: x; replace .*, or leave them out with --skip-unreadable$"
    ):
        check_share(["a: x"], 40, 0.0)


def test_what_several_processes_skip_is_told_once(monkeypatch: pytest.MonkeyPatch):
    skipped = SkippedImages(20, 0.2)
    assert list(skipped.strip([(1, ["b"]), (2, []), (3, ["a", "b"])])) == [1, 2, 3]
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, {"c", "a"}])
    assert skipped.news() == ["a", "b", "c"]
    skipped.add(["a", "c"])
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine])
    assert skipped.news() == []
    skipped.add(["d"])
    with pytest.raises(UserError, match="cannot read 5 images: a; b; c; d; e; these are more than 20% of 20 images"):
        skipped.add(["e"])
    other = SkippedImages(20, 0.2)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, {"v", "w", "x"}, {"y", "z"}])
    with pytest.raises(UserError, match="cannot read 5 images: v; w; x; y; z"):
        other.news()


@pytest.mark.parametrize("workers", [0, 2])
def test_scoring_batches_are_whole(ten: LabelledImages, workers: int):
    ten.transform = v2.Compose([PIXELS, v2.ToDtype(torch.float32)])
    skipped = SkippedImages(10, 0.5)
    loader = build_scoring_loader(SubstitutedImages(ten, 0.5), 4, 3, workers, "cpu")
    batches = list(skipped.strip(loader))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    reds = sorted(int(red) for images, _ in batches for red in images[:, 0, 0, 0])
    assert reds == [0, 0, 2, 2, 3, 6, 6, 6, 7, 8]
    assert sorted(map(number, skipped.news())) == sorted(BAD)


def epoch(images: LabelledImages, batch_size: int, workers: int = 0, skip: int = 0) -> tuple[list[list[int]], set[int]]:
    """The reds of the batches of one epoch, and the images that were named."""
    skipped = SkippedImages(10, 0.5)
    recipe = LoaderRecipe(batch_size=batch_size, workers=workers, seed=3)
    loader = build_train_loader(SubstitutedImages(images, 0.5), recipe, AugmentRecipe(8), "cpu")
    start_epoch(loader, 1, skip)
    batches = list(skipped.strip(loader))  # type: ignore[arg-type]
    assert all(batch.images.dtype == torch.uint8 and batch.boxes.shape == (len(batch.labels), 4) for batch in batches)
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches], set(map(number, skipped.news()))


def test_an_epoch_with_stand_ins_depends_on_nothing_but_the_files(ten: LabelledImages, monkeypatch: pytest.MonkeyPatch):
    """On workers, on where it was interrupted, and on how many processes share it."""
    whole, named = epoch(ten, 4)
    assert [len(batch) for batch in whole] == [4, 4, 2] and named == BAD
    assert not BAD & {red for batch in whole for red in batch}
    assert epoch(ten, 4, workers=2) == (whole, named)
    assert epoch(ten, 4, skip=4)[0] == whole[1:]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(epoch(ten, 2)[0])
    together = [sorted(ours + theirs) for ours, theirs in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in whole]
