"""Attribution maps against one image's own gradients, and the pages that show them."""

from __future__ import annotations

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.files import write_json
from data_pipeline.loader import load_all
from tests.models import write_images
from trainer.explain import (
    ExplainConfig,
    attribution_maps,
    data_uri,
    explain,
    overlay,
    render_html,
    run,
    training_images,
)
from trainer.registry import OpenSetModel

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def pictures(digits) -> torch.Tensor:
    return load_all(digits, "test_known", device=torch.device("cpu")).images[:3]


def naive_layercam(model, image: torch.Tensor, layer: str) -> torch.Tensor:
    """Equations 6-7 for one image, channel by channel, with the gradient of its score."""
    encoded = model.encoder(model.render(image.unsqueeze(0)), (layer,))
    feature_map = encoded.maps[layer]
    feature_map.retain_grad()
    best = None
    for label in range(len(model.card.class_names)):
        cosines = [torch.dot(encoded.embeddings[0], g) / g.norm() for g in model.gallery[model.gallery_labels == label]]
        total = sum(sorted(cosines, key=lambda cosine: cosine.item(), reverse=True)[: model.card.k])
        best = total if best is None or total > best else best
    best.backward()
    model.encoder.zero_grad(set_to_none=True)
    activation = torch.zeros(feature_map.shape[2:])
    for channel in range(feature_map.shape[1]):
        activation += feature_map.grad[0, channel].clamp(min=0) * feature_map[0, channel].detach()
    activation = F.interpolate(activation.clamp(min=0)[None, None], (16, 16), mode="bilinear", align_corners=False)[
        0, 0
    ]
    return activation / activation.max() if activation.max() > 0 else activation


@pytest.mark.parametrize("layer", ["conv3_2", "conv5_2"])
def test_the_map_is_layercam_of_the_images_own_score(model, pictures, layer):
    found = attribution_maps(model, pictures, (layer,))
    assert found.shape == (3, 16, 16) and found.min() >= 0 and found.max() <= 1
    for image, one in zip(pictures, found):
        torch.testing.assert_close(one, naive_layercam(model, image, layer), rtol=1e-3, atol=1e-3)


def test_attribution_leaves_the_model_as_it_was(model, pictures):
    before = model.fingerprint
    with torch.no_grad():  # as a server may have it
        attribution_maps(model, pictures)
    assert model.fingerprint == before and all(p.grad is None for p in model.encoder.parameters())


def test_what_an_explanation_holds(model, digits, pictures):
    training = training_images(model, digits.folder)
    found = explain(model, list("abc"), pictures.numpy(), training, num_neighbours=3)
    expected = model.recognise(pictures, 3)
    for row, each in enumerate(found):
        assert (each.label, each.score) == (expected.labels[row], pytest.approx(float(expected.scores[row])))
        assert each.known == (each.score >= each.threshold) and each.label in each.verdict
        assert each.best_classes[0] == (each.nearest_class, pytest.approx(each.score))
        # The picture shown is the image whose similarity is given.
        for near, picture in zip(each.neighbours, each.pictures):
            both = model.embed(torch.stack([pictures[row], torch.from_numpy(picture)]))
            assert float(both[0] @ both[1]) == pytest.approx(near.similarity, abs=1e-5)
    page = render_html([dataclasses.replace(found[0], name="<script>alert(1)</script>")], "T", 5)
    assert "<script>" not in page and page.count("<img") == 2 + 3


def test_a_folder_built_again_with_as_many_other_images_lends_no_pictures(model, digits, tmp_path):
    rebuilt = shutil.copytree(digits.folder, tmp_path / digits.folder.name)
    assert training_images(model, rebuilt) is not None
    names = digits.names("train")
    write_json(rebuilt / "train.names.json", [*names[1:], "a new image"])
    assert training_images(model, rebuilt) is None
    # A build that noted no names says nothing about a model that did, and the other way round.
    (rebuilt / "train.names.json").unlink()
    assert training_images(model, rebuilt) is None
    unnamed = OpenSetModel(model.card, model.encoder, model.gallery, model.gallery_labels)
    assert training_images(unnamed, rebuilt) is not None and training_images(unnamed, digits.folder) is None


def test_overlay_colours_what_is_high():
    image, attribution = np.full((4, 4, 1), 128, np.uint8), np.zeros((4, 4), np.float32)
    attribution[1, 2] = 1
    found = overlay(image, attribution).astype(int)
    assert found.shape == (4, 4, 3) and len(np.unique(found.reshape(-1, 3), axis=0)) == 2
    assert found[1, 2].max() - found[1, 2].min() > 50 > found[0, 0].max() - found[0, 0].min()


@pytest.fixture
def config(model, digits, pictures, tmp_path) -> ExplainConfig:
    model.save(tmp_path / "model")
    write_images(tmp_path / "pictures", pictures)
    return ExplainConfig(
        model=str(tmp_path / "model"), paths=(str(tmp_path / "pictures"),), data=digits.folder, out=tmp_path / "e.png"
    )


def test_the_files(config, tmp_path, capsys):
    (tmp_path / "pictures" / "broken.png").touch()
    assert len(run(config, Console())) == 3
    with Image.open(config.out) as image:
        assert image.width > 1000 and image.height > 700 and len(image.getcolors(10**7)) > 200
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "broken.png is left out: the image is not an image file" in printed
    html = dataclasses.replace(config, out=tmp_path / "e.html", data=tmp_path, limit=2, neighbours=1)
    run(html, Console())
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "neighbours are named, not shown" in printed and "2 more were left out" in printed
    page = html.out.read_text()
    assert "digits train image" in page and "http" not in page.replace("data:", "")
    assert page.count("<section>") == 1  # of the two files looked at, one is broken


def test_grey_and_colour_become_something_to_look_at():
    for channels in (1, 3):
        assert data_uri(np.zeros((3, 3, channels), np.uint8)).startswith("data:image/png;base64,")


def test_bad_input(config, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match="none of the files is a readable image"):
        run(dataclasses.replace(config, paths=(str(tmp_path / "text.png"),)), QUIET)
    for change, message in (
        ({"out": tmp_path / "e.pdf"}, "end with .png or .html"),
        ({"neighbours": 21}, "within 0 to 20"),
        ({"layers": ()}, "no layer"),
        ({"limit": 0}, "1 or more"),
        ({"paths": ()}, "no image is named"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **change)
