"""An export has the images of the build it was made from, and trains alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data_pipeline.beton import MANIFEST, find_build, read_build
from data_pipeline.errors import InputError
from data_pipeline.export import export
from data_pipeline.files import write_json
from data_pipeline.loader import Partitions, ResidentLoader, load_all, open_loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory):
    return export(digits, tmp_path_factory.mktemp("exports"))


def test_the_same_images_in_the_same_order_under_the_same_names(digits, exported):
    found = find_build(exported.folder.parent, "digits", 0)
    assert found.manifest.storage == "safetensors" and found.manifest.split_hash == digits.manifest.split_hash
    for name in digits.manifest.files:
        ours, theirs = load_all(found, name, device=CPU), load_all(digits, name, device=CPU)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs))
        assert found.names(name) == digits.names(name)
        assert found.record(name).class_counts == digits.record(name).class_counts


def test_an_export_is_always_resident(exported, monkeypatch):
    monkeypatch.setattr("data_pipeline.loader._free_memory", lambda device: 0)
    assert isinstance(open_loader(Partitions(exported, CPU), 32), ResidentLoader)
    with pytest.raises(InputError, match="leave out --cache stream"):
        open_loader(Partitions(exported, CPU), 32, cache="stream")


def test_a_damaged_export_is_refused(digits, tmp_path):
    made = export(digits, tmp_path)
    path = made.folder / "train.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(InputError, match="damaged or foreign"):
        load_all(made, "train", device=CPU)


def test_what_cannot_be_exported(digits, exported, tmp_path):
    with pytest.raises(InputError, match="is an export already"):
        export(exported, tmp_path)
    with pytest.raises(InputError, match="name another --out"):
        export(digits, digits.folder.parent)
    assert digits.file("train").is_file()


def test_a_manifest_from_before_there_were_exports_is_of_ffcv_files(digits, tmp_path):

    record = dataclasses.asdict(digits.manifest)
    del record["storage"]
    write_json(tmp_path / MANIFEST, record)
    assert read_build(tmp_path).manifest.storage == "ffcv"
