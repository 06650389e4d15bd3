"""FFCV files: what was written is what is read, and nothing half-written, damaged or foreign passes for whole."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from data_pipeline import beton, cli
from data_pipeline.beton import Encoding, find_build, find_folder, read_manifest, verify
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError
from data_pipeline.files import replacing
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
        batch = load_all(digits / f"{name}.beton", device=CPU)
        assert batch.images.shape == (len(indices), 16, 16, 1)
        assert torch.equal(batch.labels, torch.from_numpy(labels))
        assert torch.equal(batch.indices, torch.arange(len(indices)))
        for place in (0, 7, len(indices) - 1):
            image = Image.fromarray(source[int(indices[place])][0].squeeze())
            expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
            assert np.array_equal(batch.images[place].squeeze().numpy(), expected)


def test_the_manifest_says_what_is_in_the_file(digits):
    manifest = verify(digits / "train.beton")
    protocol = Protocol("digits", 0)
    assert manifest.split_hash == protocol.split_hash and Protocol.from_dict(manifest.protocol) == protocol
    assert manifest.class_names == tuple(map(str, protocol.known))
    assert (manifest.source, manifest.image_size, manifest.channels, manifest.write_mode) == ("bundled", 16, 1, "raw")
    assert manifest.count == len(load_all(digits / "train.beton", device=CPU).labels)


def test_colour_images_are_cropped_to_the_centre_square(folder_of_images, tmp_path):
    folder = build(custom(folder_of_images, tmp_path / "data"), QUIET)
    manifest = read_manifest(folder / "test_known.beton")
    batch = load_all(folder / "test_known.beton", device=CPU)
    assert manifest.class_names == ("cat", "fox") and batch.images.shape == (8, 16, 16, 3)
    image = Image.open(folder_of_images / "test" / "cat" / "0.png").crop((5, 0, 25, 20))
    assert np.array_equal(batch.images[0].numpy(), np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))
    unknown = load_all(folder / "test_unknown.beton", device=CPU)
    assert (unknown.labels == -1).all() and len(unknown.labels) == 4


@pytest.mark.parametrize("mode", ["jpg", "smart"])
def test_compression_is_in_the_name_and_close_to_the_pixels(mode, tmp_path):
    build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    folder = build(BuildConfig(protocol="digits", out=tmp_path, write_mode=mode, quality=95), QUIET)
    assert folder.name == f"digits-0-16px-{mode}95"
    raw = load_all(tmp_path / "digits-0-16px-raw" / "train.beton", device=CPU).images.float()
    packed = load_all(folder / "train.beton", device=CPU).images.float()
    # Images of 768 bytes stay raw in smart mode.
    assert (raw - packed).abs().mean() < (3 if mode == "jpg" else 1e-9)
    with pytest.raises(InputError, match="2 folders hold"):
        find_folder(tmp_path, Protocol("digits", 0))
    assert find_folder(folder, Protocol("digits", 0)) == folder


def test_a_second_build_writes_nothing_and_a_changed_one_does(tmp_path, capsys):
    console = Console(soft_wrap=True)
    folder = build(BuildConfig(protocol="digits", out=tmp_path), console)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.beton")}
    build(BuildConfig(protocol="digits", out=tmp_path), console)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.beton")}
    assert capsys.readouterr().out.count("already there") == 4
    manifest = json.loads((folder / "train.beton.json").read_text())
    (folder / "train.beton.json").write_text(json.dumps({**manifest, "source": "elsewhere"}))
    (folder / "test_known.beton").write_bytes(b"cut")
    build(BuildConfig(protocol="digits", out=tmp_path), console)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.beton")}
    assert {name for name in before if before[name] != after[name]} == {"train.beton", "test_known.beton"}


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    folder = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    old = (folder / "train.beton").read_bytes()
    (folder / "train.beton.json").unlink()

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(beton, "_sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    assert (folder / "train.beton").read_bytes() == old
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".*"))
    with pytest.raises(InputError, match="no manifest"):
        verify(folder / "train.beton")
    monkeypatch.undo()
    build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    verify(folder / "train.beton")


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    """The real thing: a 3 MiB file system; the files need 4 MiB each."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(InputError, match="the disk is full"):
            build(BuildConfig(protocol="digits", out=disk), QUIET)
        assert not [path for path in disk.rglob("*") if path.is_file()]
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
    folder = build(custom(folder_of_images, tmp_path / "data", skip_corrupt=True), QUIET)
    manifests = [read_manifest(path) for path in folder.glob("*.beton")]
    skipped = [name for manifest in manifests for name in manifest.skipped]
    assert len(skipped) == 1 and skipped[0].endswith("cat/3.png")
    for manifest in manifests:
        assert len(load_all(folder / f"{manifest.partition}.beton", device=CPU).labels) == manifest.count


def test_truncated_damaged_and_foreign_files_are_refused(digits, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(digits, folder)
    path = folder / "train.beton"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="truncated; build it again"):
        verify(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="checksum"):
        verify(path)
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        verify(path)
    (folder / "train.beton.json").write_text('{"hello": 1}')
    with pytest.raises(InputError, match="not a manifest"):
        verify(path)
    (folder / "train.beton.json").write_text("{")
    with pytest.raises(InputError, match="not a readable manifest"):
        verify(path)


def test_files_of_another_protocol_are_refused(digits):
    with pytest.raises(InputError, match="holds protocol digits, split 0, not digits, split 1"):
        find_build(digits, "digits", 1)
    with pytest.raises(InputError, match=r"run python -m data_pipeline.build --protocol mnist --split 2"):
        find_build(digits.parent, "mnist", 2)
    with pytest.raises(InputError, match="of the split the model was trained on"):
        find_folder(digits.parent, Protocol("digits", 1))
    assert find_build(digits.parent, "digits", 0) == (Protocol("digits", 0), digits)


def test_a_subset_and_a_pseudo_open_split_are_builds_of_their_own(tmp_path):
    whole = build(BuildConfig(protocol="digits", out=tmp_path), QUIET)
    subset = build(BuildConfig(protocol="digits", out=tmp_path, train_images=60), QUIET)
    assert subset.name == "digits-0-16px-raw-60images"
    assert read_manifest(subset / "train.beton").class_counts == (10,) * 6
    assert read_manifest(subset / "test_known.beton").count == read_manifest(whole / "test_known.beton").count
    protocol, folder = find_build(subset, "digits", 0)
    assert folder == subset and protocol.split_hash != Protocol("digits", 0).split_hash
    with pytest.raises(InputError, match="2 folders hold protocol digits, split 0: choose with --data"):
        find_build(tmp_path, "digits", 0)
    build(BuildConfig(protocol="digits", out=tmp_path, pseudo_open=3), QUIET)
    protocol, _ = find_build(tmp_path, "digits-pseudo3", 0)
    assert protocol == Protocol("digits", 0).pseudo_open(3)


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
    ],
)
def test_bad_requests_are_one_line(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build(BuildConfig(out=tmp_path, **options), QUIET)
    assert not list(tmp_path.iterdir())


def test_unknown_and_single_classes_of_a_folder(folder_of_images, tmp_path):
    for known, message in ((("cat", "cow"), "'cow' is not in the data; its classes: cat, dog, fox"), (("cat",), "two")):
        config = BuildConfig(protocol="custom", known=known, root=folder_of_images, out=tmp_path / "data")
        with pytest.raises(InputError, match=message):
            build(config, QUIET)
    assert not (tmp_path / "data").exists()


def test_the_command_line_answers_bad_input_with_one_line(capsys):
    def fail() -> None:
        raise InputError("no such thing: do something else")

    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no such thing: do something else\n"


def test_encodings_have_names():
    assert Encoding(image_size=32).name == "raw" and Encoding(image_size=32, write_mode="smart").name == "smart90"
