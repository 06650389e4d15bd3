"""The ONNX file answers as the model does, and the example reads it without PyTorch and MLflow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import images
from data_pipeline.loader import load_all
from tests.models import write_images
from trainer.export import TOLERANCE, export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export(model, path) <= TOLERANCE
    return path


@pytest.fixture(scope="module")
def pictures(digits) -> torch.Tensor:
    return load_all(digits, "test_unknown", device=torch.device("cpu")).images


@pytest.mark.parametrize("count", [1, 2, 33])
def test_the_answers_are_those_of_the_model(exported, model, pictures, count):
    session = onnxruntime.InferenceSession(str(exported))
    embeddings, class_scores, similarities = session.run(None, {"images": pictures[:count].numpy()})
    expected = model.recognise(pictures[:count], num_neighbours=4)
    np.testing.assert_allclose(embeddings, model.embed(pictures[:count]), atol=1e-4)
    np.testing.assert_allclose(class_scores, expected.class_scores, atol=1e-4)
    nearest = np.sort(similarities, axis=1)[:, ::-1][:, :4]
    np.testing.assert_allclose(nearest, expected.similarities, atol=1e-4)


def test_the_file_is_valid_and_tells_what_it_takes_to_answer(exported, model):
    proto = onnx.load(str(exported))
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == 25
    facts = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert facts["class_names"] == list(model.card.class_names) and facts["threshold"] == model.card.threshold
    assert facts["gallery_ids"] == list(model.gallery_ids) and facts["image_size"] == 16
    assert [path.name for path in exported.parent.iterdir()] == ["model.onnx"]  # the weights are within


def test_the_example_needs_neither_pytorch_nor_mlflow(exported, model, pictures, tmp_path):
    paths = write_images(tmp_path, pictures[:5])
    # What a build puts on white and divides by 256, the example does.
    shown = pictures[5:8, ..., 0].numpy()
    for name, image in (
        ("transparent", Image.fromarray(np.stack([shown[0] * 0, 255 - shown[0]], axis=2), "LA")),
        ("colours", Image.fromarray(np.dstack([*[shown[1] // 2] * 3, shown[1]]), "RGBA")),
        ("deep", Image.fromarray(shown[2].astype(np.uint16) << 8 | 200)),
    ):
        paths.append(tmp_path / f"{name}.png")
        image.save(paths[-1])
    squares = [images.decode(path.read_bytes(), 1, 16) for path in paths]
    program = (
        "import sys, runpy\n"
        "for name in ('torch', 'mlflow', 'data_pipeline', 'trainer'):\n    sys.modules[name] = None\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'recognise_onnx.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported), *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = model.recognise(torch.from_numpy(np.stack(squares)), 1)
    lines = done.stdout.splitlines()
    for row, line in enumerate(lines):
        found = re.fullmatch(r"(.*): (\w+) \(score (\S+), threshold \S+, nearest training image (.*)\)", line)
        assert found and found[1] == str(paths[row]) and found[2] == expected.labels[row]
        assert float(found[3]) == pytest.approx(expected.scores[row], abs=1e-3)
        assert found[4] == model.gallery_ids[expected.neighbours[row, 0]]
    assert len(lines) == len(paths) and len((ROOT / "examples" / "recognise_onnx.py").read_text().splitlines()) <= 35
