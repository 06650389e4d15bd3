"""What the score compares: the embedding, or the features below the projection head."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data_pipeline.loader import Partitions
from tests.models import finished_run
from trainer.config import EncoderConfig
from trainer.encoder import Encoder
from trainer.evaluation.evaluators import FeatureModel
from trainer.open_set import score
from trainer.recipes import recipe
from trainer.recognition import build_model, evaluate_open_set
from trainer.registry import OpenSetModel, load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def partitions(digits):
    return Partitions(digits, CPU)


@pytest.fixture(scope="module")
def config():
    encoder = EncoderConfig(width=4, hidden_dim=16, embedding_dim=8)
    return dataclasses.replace(recipe("digits"), encoder=encoder, score_on="backbone", k=5)


@pytest.fixture(scope="module")
def headless(config, partitions) -> OpenSetModel:
    torch.manual_seed(0)
    return build_model(Encoder(config.encoder, 1), partitions, config)


def test_scores_on_the_backbone_are_of_its_pooled_features(headless, config, partitions):
    torch.manual_seed(0)
    whole = build_model(Encoder(config.encoder, 1), partitions, dataclasses.replace(config, score_on="embedding"))
    images, train = partitions["test_known"].images[:40], partitions["train"]
    features = [FeatureModel.of(whole, "backbone")(part).features for part in (images, train.images)]
    features = [torch.nn.functional.normalize(part, dim=1) for part in features]
    assert headless.gallery.shape == (690, 32) and whole.gallery.shape == (690, 8)
    expected = score(*features, train.labels, [1, 5])
    torch.testing.assert_close(headless.score(images, [1, 5]).scores, expected.scores)
    assert not torch.allclose(whole.score(images, [5]).scores, expected.scores[:, 1:])


def test_it_is_saved_loaded_and_registered_without_a_head(headless, partitions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    headless.save(tmp_path / "model")
    loaded = OpenSetModel.load(tmp_path / "model")
    assert loaded.card.features == "backbone" and loaded.encoder.head is None
    assert not any(name.startswith("head.") for name in loaded.encoder.state_dict())
    uri = f"sqlite:///{tmp_path}/store.db"
    finished_run(tmp_path / "run", headless, uri)
    registered = load_model("models:/gradmix-digits@champion", uri)
    expected = evaluate_open_set(headless, partitions, [5])
    assert evaluate_open_set(loaded, partitions, [5]) == expected
    assert evaluate_open_set(registered, partitions, [5]) == expected


def test_a_classifier_has_no_head_to_drop(config, partitions):
    config = dataclasses.replace(recipe("digits", "cross_entropy"), encoder=config.encoder, score_on="backbone")
    torch.manual_seed(0)
    model = build_model(Encoder(config.encoder, 1, "linear", 6), partitions, config)
    assert model.gallery.shape == (690, 32) and model.logits(partitions["test_known"].images[:3]).shape == (3, 6)
