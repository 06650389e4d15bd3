"""TinyImageNet against a tiny stand-in, as a folder, as a zip and over a network that is not there."""

from __future__ import annotations

import hashlib
import io
import shutil
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.sources import open_source, tinyimagenet
from tests.sources import check_shared_reading, encode, error, luma, random_images, reading_error, write

pytestmark = pytest.mark.usefixtures("no_network")

WNIDS = [f"n{number:08d}" for number in (1443537, 1629819, 12267677)]


def tiny_image(name: str) -> np.ndarray:
    """64×64 of one colour, so that JPEG keeps it nearly."""
    return np.broadcast_to(random_images((3,), seed=sum(name.encode())), (64, 64, 3))


def write_tinyimagenet(parent: Path, images_per_class: int = 12) -> Path:
    """The folder as the official zip unpacks: classes in no order, boxes beside images, unlabelled test images."""
    root = parent / "tiny-imagenet-200"
    write(root / "wnids.txt", "\n".join(WNIDS[::-1]) + "\n")
    write(root / "words.txt", "".join(f"{wnid}\tsome name\n" for wnid in WNIDS))
    for wnid in WNIDS:
        write(root / f"train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
        for number in range(images_per_class):
            name = f"{wnid}_{number}.JPEG"
            write(root / f"train/{wnid}/images/{name}", encode(tiny_image(name), "JPEG", quality=95))
    annotations = ""
    for number, wnid in enumerate((WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[0])):
        name = f"val_{number}.JPEG"
        write(root / f"val/images/{name}", encode(tiny_image(name), "JPEG", quality=95))
        annotations += f"{name}\t{wnid}\t0\t32\t44\t62\n"
    write(root / "val/val_annotations.txt", annotations)
    write(root / "test/images/test_0.JPEG", encode(tiny_image("test_0.JPEG"), "JPEG"))
    return root


def zip_folder(folder: Path, archive: Path, top: str = "tiny-imagenet-200/") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, top + path.relative_to(folder).as_posix())
    return archive


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder "unpacked" with the unpacked folder in it, and a folder "zipped" with the zip in it."""
    parent = tmp_path_factory.mktemp("tiny")
    folder = write_tinyimagenet(parent / "unpacked")
    (parent / "zipped").mkdir()
    zip_folder(folder, parent / "zipped" / "tiny-imagenet-200.zip")
    return parent


@pytest.mark.parametrize("root", ["unpacked", "unpacked/tiny-imagenet-200", "zipped", "zipped/tiny-imagenet-200.zip"])
def test_tinyimagenet(root: str, tiny: Path) -> None:
    opened = {"kind": None, "dataset": "tinyimagenet", "root": tiny / root}
    train = open_source(**opened, subset="train")
    assert train.class_names == tuple(sorted(WNIDS))
    assert train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    test = open_source(**opened, subset="test")
    assert test.class_names == train.class_names
    assert test.labels.tolist() == [2, 0, 1, 0]
    train_names = sorted(f"{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(12))
    for source, names in ((train, train_names), (test, [f"val_{number}.JPEG" for number in range(4)])):
        for index, name in enumerate(names):
            assert name in source.describe(index)
            image, label = source[index]
            assert label == source.labels[index]
            assert image.shape == (64, 64, 3) and image.dtype == np.uint8
            assert np.abs(image.astype(int) - tiny_image(name)).max() <= 4
    grey, _ = open_source(**opened, subset="test", channels=1)[0]
    assert grey.shape == (64, 64, 1)
    assert np.abs(grey - luma(tiny_image("val_0.JPEG"))).max() <= 4


def test_tinyimagenet_folder_and_zip_give_the_same(tiny: Path) -> None:
    folder, archive = (
        open_source(None, dataset="tinyimagenet", subset="train", root=tiny / name) for name in ("unpacked", "zipped")
    )
    assert (folder.labels == archive.labels).all()
    assert all((folder[index][0] == archive[index][0]).all() for index in range(len(folder)))
    assert folder.describe(0) == str(tiny / f"unpacked/tiny-imagenet-200/train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG")
    assert archive.describe(0) == (
        f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG in {tiny / 'zipped/tiny-imagenet-200.zip'}"
    )


def test_tinyimagenet_zip_without_top_folder(tiny: Path, tmp_path: Path) -> None:
    zip_folder(tiny / "unpacked/tiny-imagenet-200", tmp_path / "tiny-imagenet-200.zip", top="")
    source = open_source(None, dataset="tinyimagenet", subset="test", root=tmp_path)
    assert source.labels.tolist() == [2, 0, 1, 0]
    assert np.abs(source[3][0].astype(int) - tiny_image("val_3.JPEG")).max() <= 4


def test_tinyimagenet_zip_read_by_threads_forks_and_copies(tmp_path: Path) -> None:
    images = random_images((40, 64, 64, 3))
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tiny-imagenet-200/wnids.txt", WNIDS[0])
        for number, image in enumerate(images):
            file.writestr(f"tiny-imagenet-200/train/{WNIDS[0]}/images/{number:02}.png", encode(image))
    source = open_source(None, dataset="tinyimagenet", subset="train", root=tmp_path)
    check_shared_reading(source, list(images))


class Response(io.BytesIO):
    """What `urllib.request.urlopen` gives."""

    def __init__(self, url: str, content: bytes) -> None:
        super().__init__(content)
        self.url, self.length = url, len(content)


def test_tinyimagenet_is_downloaded_and_checked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (tiny / "zipped/tiny-imagenet-200.zip").read_bytes()
    asked = []

    def serve(request: urllib.request.Request) -> Response:
        asked.append(request.full_url)
        return Response(request.full_url, content)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    opened = {"kind": None, "dataset": "tinyimagenet", "subset": "test", "root": tmp_path / "new"}
    message = error(**opened)
    assert set(asked) == {"http://cs231n.stanford.edu/tiny-imagenet-200.zip"}
    assert "File not found or corrupted" in message and "connect to the network" in message
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr(tinyimagenet, "_MD5", hashlib.md5(content).hexdigest())
    assert open_source(**opened).labels.tolist() == [2, 0, 1, 0]


def test_tinyimagenet_without_data_or_network(tmp_path: Path) -> None:
    message = error(kind=None, dataset="tinyimagenet", subset="train", root=tmp_path)
    assert str(tmp_path) in message and "tiny-imagenet-200/wnids.txt" in message and "no network" in message


def test_tinyimagenet_incomplete(tmp_path: Path) -> None:
    folder = write_tinyimagenet(tmp_path, images_per_class=1)
    opened = {"kind": None, "dataset": "tinyimagenet", "root": folder}
    (folder / "val/images/val_2.JPEG").unlink()
    assert f"there is no {folder / 'val/images/val_2.JPEG'}; unpack or" in error(**opened, subset="test")
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn00000000\t0\t0\t1\t1\n")
    assert "'n00000000', the class of test images, is not in" in error(**opened, subset="test")
    (folder / "val/val_annotations.txt").unlink()
    assert f"{folder / 'val/val_annotations.txt'} is missing or damaged; unpack or" in error(**opened, subset="test")
    assert len(open_source(**opened, subset="train")) == 3
    shutil.rmtree(folder / "train")
    assert f"no images found in {folder / 'train'}; unpack or" in error(**opened, subset="train")


def test_tinyimagenet_damaged_zip(tiny: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tiny-imagenet-200.zip"
    opened = {"kind": None, "dataset": "tinyimagenet", "subset": "test", "root": tmp_path}
    whole = (tiny / "zipped/tiny-imagenet-200.zip").read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert error(**opened) == f"{archive} is not a complete zip file; delete it and get it again"
    zip_folder(tiny / "unpacked/tiny-imagenet-200/val", archive, top="tiny-imagenet-200/val/")
    assert f"wnids.txt in {archive} is missing or damaged" in error(**opened)

    archive.write_bytes(whole)
    with zipfile.ZipFile(archive) as file:
        member = file.getinfo("tiny-imagenet-200/val/images/val_1.JPEG")
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    archive.write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    source = open_source(**opened)
    assert "val/images/val_1.JPEG in " in reading_error(source, 1)
    assert source[2][1] == 1
    archive.unlink()
    assert "No such file" in reading_error(source, 2, InputError)
