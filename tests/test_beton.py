"""FFCV files: what was written is what is read, and nothing half-written, damaged or foreign passes for whole."""

from __future__ import annotations

import dataclasses
import errno
import io
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from data_pipeline import beton
from data_pipeline.beton import find_build, find_split, read_build
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError
from data_pipeline.ffcv_writer import Encoding
from data_pipeline.files import replacing
from data_pipeline.images import decode
from data_pipeline.loader import load_all
from data_pipeline.protocols import Protocol
from data_pipeline.sources import open_source

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture
def folder_of_images(tmp_path) -> Path:
    """Three classes of ten colour images of odd sizes, in train/ and test/."""
    rng = np.random.default_rng(0)
    for subset, count in (("train", 40), ("test", 4)):
        for name in ("cat", "dog", "fox"):
            for i in range(count):
                path = tmp_path / "images" / subset / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def custom(root: Path, out: Path, **options) -> BuildConfig:
    return BuildConfig(protocol="custom", known=("cat", "fox"), root=root, out=out, image_size=16, **options)


def test_digits_come_back_pixel_for_pixel(digits):
    protocol = Protocol("digits", 0)
    for name, part in protocol.partitions.items():
        source = open_source(None, dataset="digits", subset=part.subset, root=None, channels=1)
        indices, labels = part.select(source)
        batch = load_all(digits, name, device=CPU)
        assert batch.images.shape == (len(indices), 16, 16, 1)
        assert torch.equal(batch.labels, torch.from_numpy(labels))
        assert torch.equal(batch.indices, torch.arange(len(indices)))
        for place in (0, 7, len(indices) - 1):
            image = Image.fromarray(source[int(indices[place])][0].squeeze())
            expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
            assert np.array_equal(batch.images[place].squeeze().numpy(), expected)


def test_the_manifest_says_what_is_in_the_files(digits):
    manifest, protocol = digits.manifest, Protocol("digits", 0)
    assert read_build(digits.folder) == digits
    assert manifest.split_hash == protocol.split_hash and digits.protocol == protocol
    assert manifest.class_names == tuple(map(str, protocol.known))
    assert (manifest.image_size, manifest.channels, manifest.write_mode) == (16, 1, "raw")
    assert all(source.startswith("bundled ") for source in manifest.sources.values())
    assert list(manifest.files) == ["train", "calibration", "test_known", "test_unknown"]
    for name, record in manifest.files.items():
        labels = load_all(digits, name, device=CPU).labels
        assert record.count == len(labels)
        counts = () if name == "test_unknown" else tuple((labels == place).sum().item() for place in range(6))
        assert record.class_counts == counts


def test_colour_images_are_cropped_to_the_centre_square(folder_of_images, tmp_path):
    made = build(custom(folder_of_images, tmp_path / "data"), QUIET)
    batch = load_all(made, "test_known", device=CPU)
    assert made.manifest.class_names == ("cat", "fox") and batch.images.shape == (8, 16, 16, 3)
    image = Image.open(folder_of_images / "test" / "cat" / "0.png").crop((5, 0, 25, 20))
    assert np.array_equal(batch.images[0].numpy(), np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))
    unknown = load_all(made, "test_unknown", device=CPU)
    assert (unknown.labels == -1).all() and len(unknown.labels) == 4


@pytest.mark.parametrize("mode", ["jpg", "smart"])
def test_compression_is_in_the_name_and_close_to_the_pixels(mode, tmp_path):
    plain = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    packed = build(BuildConfig(protocol="digits", out=tmp_path, write_mode=mode, quality=95), QUIET)
    assert packed.folder.name == f"digits-0-16px-{mode}95"
    raw, lossy = (load_all(made, "train", device=CPU).images.float() for made in (plain, packed))
    # Images of 768 bytes stay raw in smart mode.
    assert (raw - lossy).abs().mean() < (3 if mode == "jpg" else 1e-9)
    with pytest.raises(InputError, match="2 folders hold"):
        find_split(tmp_path, Protocol("digits", 0))
    assert find_split(packed.folder, Protocol("digits", 0)) == packed


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_names_are_those_of_the_images(folder_of_images, tmp_path):
    # One of them left out, after which places and names would part.
    (folder_of_images / "train" / "cat" / "3.png").write_bytes(b"junk")
    made = build(custom(folder_of_images, tmp_path / "data", skip_corrupt=True), QUIET)
    for name in made.manifest.files:
        stored, names = load_all(made, name, device=CPU).images, made.names(name)
        assert len(names) == len(stored) == len(set(names))
        for image, path in zip(stored.numpy(), names):
            np.testing.assert_array_equal(image, decode(Path(path).read_bytes(), 3, 16))
    # A build of an earlier version noted none.
    (made.folder / "train.names.json").unlink()
    assert made.names("train")[:2] == ["train[0]", "train[1]"]
    assert len(made.names("train")) == made.record("train").count


def test_a_second_build_writes_nothing(digits, tmp_path, capsys):
    console = Console(soft_wrap=True)
    made = build(BuildConfig(protocol="digits", out=tmp_path), console)
    before = inodes(made.folder)
    assert build(BuildConfig(protocol="digits", out=tmp_path), console) == made
    assert inodes(made.folder) == before
    assert capsys.readouterr().out.count("already there") == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "test_known.beton").write_bytes(b"cut"),
        lambda folder: (folder / "calibration.beton").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace("bundled", "elsewhere")
        ),
    ],
)
def test_a_build_that_is_not_the_one_wanted_is_made_again_whole(change, digits, tmp_path):
    folder = tmp_path / digits.folder.name
    shutil.copytree(digits.folder, folder)
    change(folder)
    made = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    assert made.manifest == digits.manifest
    for name in made.manifest.files:
        assert (folder / f"{name}.beton").read_bytes() == digits.file(name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


def test_changed_images_are_built_again(folder_of_images, tmp_path):
    request = custom(folder_of_images, tmp_path / "data")
    first = build(request, QUIET)
    path = folder_of_images / "train" / "cat" / "0.png"
    Image.fromarray(np.zeros((20, 31, 3), np.uint8)).save(path)
    second = build(request, QUIET)
    assert second.record("train").sha256 != first.record("train").sha256
    assert second.manifest.sources["test_known"] == first.manifest.sources["test_known"]
    path.rename(folder_of_images / "train" / "fox" / "from_cat.png")
    third = build(request, QUIET)
    assert third.record("train").class_counts != second.record("train").class_counts


@pytest.mark.parametrize("existing", [True, False])
def test_a_kill_while_building_leaves_the_old_build_or_none(existing, tmp_path):
    """The real thing: SIGKILL in the middle of the third file."""
    if existing:
        made = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
        before, old = inodes(made.folder), made.manifest
        (made.folder / "manifest.json").write_text(
            (made.folder / "manifest.json").read_text().replace("bundled", "elsewhere")
        )
    script = f"""
import os, signal
from pathlib import Path
from rich.console import Console
from data_pipeline import beton
from data_pipeline.build import BuildConfig, build
write = beton.write_ffcv
def write_and_die(path, *args):
    write(path, *args)
    if path.name == "test_known.beton":
        os.kill(os.getpid(), signal.SIGKILL)
beton.write_ffcv = write_and_die
build(BuildConfig(protocol="digits", out=Path({str(tmp_path)!r})), Console(quiet=True))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    if existing:
        after = inodes(made.folder)
        assert {name: after[name] for name in before if name != "manifest.json"} == {
            name: before[name] for name in before if name != "manifest.json"
        }
    else:
        with pytest.raises(InputError, match="no files of protocol digits"):
            find_build(tmp_path, "digits", 0)
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    again = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    again.check_complete()
    assert not existing or again.manifest == old
    assert not list(tmp_path.glob(".*.partial"))


def test_an_interrupted_build_leaves_no_rubbish_and_no_thread(tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    before = threading.active_count()
    monkeypatch.setattr(beton, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == [".digits-0-16px-raw.lock"]
    assert threading.active_count() == before


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    """The real thing: a 3 MiB file system; the files need 4 MiB each."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(InputError, match="the disk is full"):
            build(BuildConfig(protocol="digits", out=disk), QUIET)
        assert [path.name for path in disk.iterdir()] == [".digits-0-16px-raw.lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_replacing_turns_enospc_into_one_line(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(InputError, match="the disk is full"), replacing(path) as partial:
        partial.write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_corrupt_image_is_named_and_can_be_left_out(folder_of_images, tmp_path):
    bad = folder_of_images / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cat/3\.png is corrupt.*--skip-corrupt"):
        build(custom(folder_of_images, tmp_path / "data"), QUIET)
    made = build(custom(folder_of_images, tmp_path / "data", skip_corrupt=True), QUIET)
    skipped = [name for record in made.manifest.files.values() for name in record.skipped]
    assert len(skipped) == 1 and skipped[0].endswith("cat/3.png")
    for name, record in made.manifest.files.items():
        assert len(load_all(made, name, device=CPU).labels) == record.count
    before = inodes(made.folder)
    build(custom(folder_of_images, tmp_path / "data", skip_corrupt=True), QUIET)
    assert inodes(made.folder) == before
    # Without the switch, images that were left out are not passed over in silence.
    with pytest.raises(InputError, match="is corrupt"):
        build(custom(folder_of_images, tmp_path / "data"), QUIET)
    assert inodes(made.folder) == before


def test_truncated_damaged_and_foreign_files_are_refused(digits, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(digits.folder, folder)
    path, made = folder / "train.beton", read_build(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="truncated; build it again"):
        made.file("train")
    with pytest.raises(InputError, match=r"not the file that manifest\.json describes"):
        find_build(folder, "digits", 0)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="checksum"):
        load_all(made, "train", device=CPU)
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        made.file("train")
    path.write_bytes(whole)
    (folder / "test_unknown.beton").unlink()
    for find in (lambda: find_build(folder, "digits", 0), lambda: find_split(folder, Protocol("digits", 0))):
        with pytest.raises(InputError, match=r"test_unknown\.beton is missing: build the folder again"):
            find()
    for text, message in (('{"hello": 1}', "not a manifest"), ("{", "not a readable manifest"), ("[]", "not a manif")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_build(folder)


def test_files_of_another_protocol_are_refused(digits):
    data = digits.folder.parent
    with pytest.raises(InputError, match="holds protocol digits, split 0, not digits, split 1"):
        find_build(digits.folder, "digits", 1)
    with pytest.raises(InputError, match=r"run python -m data_pipeline.build --protocol mnist --split 2"):
        find_build(data, "mnist", 2)
    with pytest.raises(InputError, match=r"--protocol mnist --pseudo-open 3 --split 2"):
        find_build(data, "mnist-pseudo3", 2)
    with pytest.raises(InputError, match="of the split the model was trained on"):
        find_split(data, Protocol("digits", 1))
    assert find_build(data, "digits", 0) == digits


def test_a_subset_and_a_pseudo_open_split_are_builds_of_their_own(tmp_path):
    whole = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    subset = build(BuildConfig(protocol="digits", out=tmp_path, train_images=60), QUIET)
    assert subset.folder.name == "digits-0-16px-raw-60images"
    assert subset.record("train").class_counts == (10,) * 6
    assert subset.record("test_known").count == whole.record("test_known").count
    assert find_build(subset.folder, "digits", 0) == subset
    assert subset.protocol.split_hash != Protocol("digits", 0).split_hash
    with pytest.raises(InputError, match="2 folders hold protocol digits, split 0: choose with --data"):
        find_build(tmp_path, "digits", 0)
    build(BuildConfig(protocol="digits", out=tmp_path, pseudo_open=3), QUIET)
    assert find_build(tmp_path, "digits-pseudo3", 0).protocol == Protocol("digits", 0).pseudo_open(3)


def test_custom_builds_of_other_classes_lie_side_by_side(folder_of_images, tmp_path):
    first = build(custom(folder_of_images, tmp_path / "data"), QUIET)
    second = build(dataclasses.replace(custom(folder_of_images, tmp_path / "data"), known=("cat", "dog")), QUIET)
    assert first.folder != second.folder
    with pytest.raises(InputError, match="2 folders hold protocol custom"):
        find_build(tmp_path / "data", "custom", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "nothing"}, "unknown protocol 'nothing'; known: digits"),
        ({"protocol": "mnist"}, "needs --root"),
        ({"protocol": "cifar10", "source": "parquet", "root": Path("/nowhere")}, "/nowhere"),
        ({"protocol": "digits", "image_size": 4}, "image size is 4; set it within 8 to 1024"),
        ({"protocol": "digits", "quality": 0, "write_mode": "jpg"}, "quality is 0"),
        ({"protocol": "digits", "known": ("a", "b")}, "--known names classes of a custom protocol"),
        ({"protocol": "custom", "root": Path(".")}, "needs the names of its known classes"),
        ({"protocol": "digits", "image_size": 0}, "image size is 0"),
        ({"protocol": "digits", "pseudo_open": -1}, "set --pseudo-open to 0 or more"),
    ],
)
def test_bad_requests_are_one_line(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build(BuildConfig(out=tmp_path, **options), QUIET)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_line():
    with pytest.raises(InputError, match="/proc/x cannot be written to"):
        build(BuildConfig(protocol="digits", out=Path("/proc/x")), QUIET)


def test_classes_with_too_few_images_are_named_before_anything_is_written(folder_of_images, tmp_path):
    for number in range(5, 40):
        (folder_of_images / "train" / "fox" / f"{number}.png").unlink()
    with pytest.raises(InputError, match=r"class 'fox' has 5 train images, too few .*: give it \d+ or more"):
        build(custom(folder_of_images, tmp_path / "data"), QUIET)
    assert not (tmp_path / "data").exists()


def test_files_of_another_dataset_are_not_taken_for_the_one_asked_for(folder_of_images, tmp_path):
    request = BuildConfig(protocol="cifar10", source="imagefolder", root=folder_of_images, out=tmp_path / "data")
    with pytest.raises(InputError, match=r"has 3 classes \(cat, dog, fox\), but cifar10 has the classes airplane"):
        build(request, QUIET)


def test_a_class_may_not_be_called_unknown(folder_of_images, tmp_path):
    (folder_of_images / "train" / "cat").rename(folder_of_images / "train" / "unknown")
    (folder_of_images / "test" / "cat").rename(folder_of_images / "test" / "unknown")
    with pytest.raises(InputError, match=r"called 'unknown'.*rename it"):
        build(dataclasses.replace(custom(folder_of_images, tmp_path / "data"), known=("unknown", "fox")), QUIET)


def test_unknown_and_single_classes_of_a_folder(folder_of_images, tmp_path):
    for known, message in ((("cat", "cow"), "'cow' is not in the data; its classes: cat, dog, fox"), (("cat",), "two")):
        config = BuildConfig(protocol="custom", known=known, root=folder_of_images, out=tmp_path / "data")
        with pytest.raises(InputError, match=message):
            build(config, QUIET)
    assert not (tmp_path / "data").exists()


def test_an_empty_class_folder_is_left_out_unless_it_is_asked_for(folder_of_images, tmp_path):
    for subset in ("train", "test"):
        (folder_of_images / subset / "emu").mkdir()
    said = Console(file=io.StringIO())
    made = build(custom(folder_of_images, tmp_path / "data"), said)
    assert "class folder emu is left out: it holds no image" in said.file.getvalue()
    assert Protocol.from_dict(made.manifest.protocol).unknown == ("dog",)
    with pytest.raises(InputError, match="no images found in class folder 'emu': add some"):
        build(dataclasses.replace(custom(folder_of_images, tmp_path / "data"), known=("cat", "emu")), QUIET)
    # Where the classes are known beforehand, none may lack.
    request = BuildConfig(protocol="cifar10", source="imagefolder", root=folder_of_images, out=tmp_path / "data")
    with pytest.raises(InputError, match="no images found in class folder 'emu': add some"):
        build(request, QUIET)


def test_encodings_have_names():
    assert Encoding(image_size=32).name == "raw" and Encoding(image_size=32, write_mode="smart").name == "smart90"
