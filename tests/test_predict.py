"""Predictions over files: the scores of a test set, a row for whatever is there, and going on after a kill."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.loader import load_all
from tests.models import small_model, write_images
from trainer import predict as predict_module
from trainer.predict import PredictConfig, find_images, predict, read_square
from trainer.registry import OpenSetModel

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory) -> Path:
    """known/ and unknown/ with 15 test images each."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("known", "unknown"):
        write_images(folder / name, load_all(digits, f"test_{name}", device=torch.device("cpu")).images[:15])
    return folder


@pytest.fixture
def config(saved, pictures, tmp_path) -> PredictConfig:
    return PredictConfig(paths=(str(pictures),), model=str(saved), out=tmp_path / "out.csv", batch_size=7)


def test_a_file_has_the_score_that_it_has_in_the_test_set(config, model, digits):
    rows = predict(config, QUIET)
    images = [load_all(digits, f"test_{name}", device=torch.device("cpu")).images[:15] for name in ("known", "unknown")]
    expected = model.predict(torch.cat(images))
    np.testing.assert_allclose([row["score"] for row in rows], expected["score"], atol=1e-5)
    assert [row["label"] for row in rows] == expected["label"].tolist()
    assert [row["class"] for row in rows] == expected["class"].tolist()
    assert {"unknown", "3"} < {row["label"] for row in rows} | {"3"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_kind_of_table_holds_the_same(config, tmp_path, suffix):
    out = tmp_path / f"table{suffix}"
    rows = predict(dataclasses.replace(config, out=out, neighbours=2, class_scores=True), QUIET)
    if suffix == ".csv":
        with out.open(newline="") as file:
            table = list(csv.DictReader(file))
    elif suffix == ".jsonl":
        table = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        table = pd.read_parquet(out).to_dict("records")
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    for stored, row in zip(table, rows):
        assert stored.keys() == row.keys() and "score_3" in row and "neighbour_2" in row
        assert float(stored["score"]) == row["score"] and stored["label"] == row["label"]
        assert float(stored["similarity_1"]) == row["similarity_1"] >= row["similarity_2"]
        assert row["score"] == max(value for name, value in row.items() if name.startswith("score_"))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_broken_files_are_rows_and_stop_nothing(config, pictures, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "text.png").write_text("hello")
    (broken / "cut.png").write_bytes((pictures / "known" / "image000.png").read_bytes()[:60])
    (broken / "empty.jpg").touch()
    (broken / "notes.txt").write_text("no image by its name either")
    (broken / "gone.png").symlink_to("nowhere")
    rows = predict(dataclasses.replace(config, paths=(str(broken), str(pictures / "known"))), QUIET)
    errors = {Path(row["path"]).name: row["error"] for row in rows if row["error"]}
    assert errors.keys() == {"text.png", "cut.png", "empty.jpg", "gone.png"} and len(rows) == 19
    assert "is not an image file" in errors["text.png"] and "No such file" in errors["gone.png"]
    assert all(row["label"] is None and row["score"] is None for row in rows if row["error"])
    # Nothing but broken files is a table too, and a file that is named is tried whatever its name is.
    for suffix in (".csv", ".parquet"):
        only = dataclasses.replace(config, paths=(str(broken / "notes.txt"),), out=tmp_path / f"only{suffix}")
        assert "not an image" in predict(only, QUIET)[0]["error"]


def kill_after(monkeypatch, batches: int) -> list[int]:
    """Let the next prediction die after so many batches; returns the sizes of those it computes."""
    sizes: list[int] = []
    original = predict_module.answer_rows

    def watched(model, paths, config):
        if len(sizes) == batches:
            raise KeyboardInterrupt
        sizes.append(len(paths))
        return original(model, paths, config)

    monkeypatch.setattr(predict_module, "answer_rows", watched)
    return sizes


def test_it_goes_on_where_it_was_killed(config, tmp_path):
    whole = predict(dataclasses.replace(config, out=tmp_path / "whole.csv"), QUIET)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 2)
        predict(config, QUIET)
    journal = tmp_path / ".out.csv.partial"
    assert not config.out.exists() and len(journal.read_text().splitlines()) == 15
    with journal.open("a") as file:
        file.write('{"path": "cut sho')  # by the kill
    with pytest.MonkeyPatch.context() as patch:
        sizes = kill_after(patch, 99)
        assert predict(config, QUIET) == whole
    assert sum(sizes) == 30 - 14
    assert config.out.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not journal.exists()


def test_a_file_that_changed_since_the_kill_is_done_again(config, pictures, tmp_path):
    folder = tmp_path / "copies"
    shutil.copytree(pictures / "known", folder)
    config = dataclasses.replace(config, paths=(str(folder),))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 1)
        predict(config, QUIET)
    shutil.copy(pictures / "unknown" / "image000.png", folder / "image002.png")
    with pytest.MonkeyPatch.context() as patch:
        sizes = kill_after(patch, 99)
        rows = predict(config, QUIET)
    assert sum(sizes) == 15 - 7 + 1
    fresh = predict(dataclasses.replace(config, out=tmp_path / "fresh.csv"), QUIET)
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in fresh], abs=1e-5)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\n", b"{}\n[]\n", b"no JSON\n", b'\0\0\0\n{"path": 3}\n'])
def test_a_damaged_journal_is_begun_anew(config, tmp_path, damage):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 2)
        predict(config, QUIET)
    journal = tmp_path / ".out.csv.partial"
    request = journal.read_bytes().split(b"\n")[0]
    journal.write_bytes(damage.replace(b"{}", request))
    said = Console(file=io.StringIO(), width=300)
    with pytest.MonkeyPatch.context() as patch:
        sizes = kill_after(patch, 99)
        predict(config, said)
    assert sum(sizes) == 30
    assert said.file.getvalue().splitlines()[0] == f"{journal} is damaged: all images are done anew"


def test_odd_file_names_are_one_line_each(config, pictures, tmp_path):
    odd = [tmp_path / "odd" / name for name in ("two\nlines.png", os.fsdecode(b"\xff.png"), os.fsdecode(b"\xfe.png"))]
    odd[0].parent.mkdir()
    for number, path in enumerate(odd):
        shutil.copy(pictures / "known" / f"image00{number}.png", path)
    rows = predict(dataclasses.replace(config, paths=tuple(map(str, odd))), QUIET)
    assert len(config.out.read_text().splitlines()) == 4
    assert len({row["path"] for row in rows}) == len({row["score"] for row in rows}) == 3


def test_the_status_tells_that_no_file_could_be_read(saved, pictures, tmp_path, monkeypatch):
    text = tmp_path / "text.png"
    text.write_text("hello")

    def status(*paths: Path) -> int:
        out = str(tmp_path / "out.csv")
        arguments = ["predict", "--model", str(saved), "--out", out, "--overwrite", *map(str, paths)]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            predict_module.main()
        except SystemExit as ended:
            return ended.code
        return 0

    assert status(text) == 1 and "is not an image file" in (tmp_path / "out.csv").read_text()
    assert status(text, pictures / "known" / "image000.png") == 0


def test_a_journal_of_another_model_or_question_is_not_gone_on_with(config, digits, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 2)
        predict(config, QUIET)
    small_model(digits, seed=1).save(tmp_path / "other")
    for change in ({"model": str(tmp_path / "other")}, {"neighbours": 1}):
        with pytest.MonkeyPatch.context() as patch:
            sizes = kill_after(patch, 99)
            predict(dataclasses.replace(config, overwrite=True, **change), QUIET)
        assert sum(sizes) == 30


def test_what_a_path_stands_for(pictures, tmp_path):
    known = sorted((pictures / "known").iterdir())
    assert find_images([str(pictures / "known")]) == known
    assert find_images([str(pictures / "*" / "image00[0-4].png")])[:5] == known[:5]
    assert find_images([str(pictures / "**" / "*.png")]) == sorted(pictures.glob("*/*.png"))
    assert find_images([str(known[3]), str(pictures / "known"), str(known[3])])[:2] == [known[3], known[0]]
    odd = tmp_path / "a[1].png"
    odd.touch()
    assert find_images([str(odd)]) == [odd]
    # Links may lead in a circle, or to nothing, and a pipe is nothing that one can wait for.
    tangle = tmp_path / "tangle"
    (tangle / "below").mkdir(parents=True)
    (tangle / "below" / "back").symlink_to(tangle)
    (tangle / "self.png").symlink_to("self.png")
    (tangle / "below" / "known").symlink_to(pictures / "known")
    os.mkfifo(tangle / "pipe.png")
    found = find_images([str(tangle)])
    assert found == [tangle / "below" / "known" / path.name for path in known] + [tangle / "self.png"]
    assert "not readable" in str(read_square(found[-1], 16, 1))
    for path, message in (
        ("nowhere", "no file, folder or match"),
        (str(tmp_path / "*.gif"), "no file, folder or match"),
    ):
        with pytest.raises(InputError, match=message):
            find_images([path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in"):
        find_images([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ()}, "no image is named"),
        ({"out": Path("table.xls")}, "end with .csv, .jsonl or .parquet"),
        ({"neighbours": -1}, "0 or more"),
        ({"batch_size": 0}, "1 or more"),
    ],
)
def test_bad_options(config, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **change)


def test_a_table_that_is_there_stays(config):
    config.out.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        predict(config, QUIET)
    assert config.out.read_text() == "mine"
    predict(dataclasses.replace(config, overwrite=True), QUIET)
    assert config.out.read_text().startswith("path,label,class,score,threshold,error\n")


def test_where_no_table_can_be_written(config, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "table.csv", Path("/proc/table.csv")):
        with pytest.raises(InputError, match=f"{out.parent}.* cannot be written .*: name another place"):
            predict(dataclasses.replace(config, out=out), QUIET)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.json", "{}", "describes no model of this version"),
        ("model.json", "[]", "describes no model of this version"),
        ("gallery.safetensors", "cut", "is damaged"),
        ("gallery.safetensors", None, "is damaged"),
        ("calibration.safetensors", "cut", "is damaged"),
    ],
)
def test_damaged_models(config, saved, tmp_path, name, content, message):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        predict(dataclasses.replace(config, model=str(folder)), QUIET)


def test_a_registered_model(config, store, model):
    rows = predict(dataclasses.replace(config, model="models:/gradmix-digits@champion", tracking_uri=store), QUIET)
    assert len(rows) == 30 and rows[0]["threshold"] == model.card.threshold


def test_a_model_of_an_earlier_version_has_places_for_names(saved, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("model.json", "encoder.safetensors", "gallery.safetensors"):
        (old / name).write_bytes((saved / name).read_bytes())
    loaded, new = OpenSetModel.load(old), OpenSetModel.load(saved)
    assert loaded.gallery_ids[:2] == ["train[0]", "train[1]"] and loaded.calibration_scores is None
    assert len(new.calibration_scores) > 100 and new.gallery_ids[0].startswith("digits train image")
    assert loaded.fingerprint == new.fingerprint
    new.gallery[0, 0] += 1e-3
    assert loaded.fingerprint != new.fingerprint
