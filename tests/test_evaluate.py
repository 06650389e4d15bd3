"""The command: every task from a saved model to numbers, pictures and a report."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from trainer.config import EncoderConfig
from trainer.encoder import Encoder
from trainer.evaluate import EvaluateConfig, evaluate, measure
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.evaluators import BootstrapConfig, FeatureModel, OpenSet, Subject
from trainer.evaluation.linear_probe import LinearProbe
from trainer.evaluation.robustness import AdversarialAttacks, CommonCorruptions
from trainer.metrics import auroc
from trainer.recipes import recipe
from trainer.recognition import build_model
from trainer.registry import OpenSetModel

FEW = BootstrapConfig(resamples=20)
# What makes each task quick, and numbers and figures that it has to leave.
TASKS = {
    "osr": ({}, {"auroc", "oscr", "closed_set_accuracy", "unknown_rejected"}, {"scores", "roc", "oscr"}),
    "closed-set": ({}, {"closed_set_accuracy", "test_known"}, set()),
    "ood": ({}, {"tnr_at_95_tpr", "auroc", "dtacc", "auin", "auout"}, {"scores", "roc"}),
    "detectors": ({"detectors": ("energy", "mahalanobis")}, {"energy/auroc", "mahalanobis/oscr"}, {"detectors"}),
    "corruptions": (
        {"corruptions": CommonCorruptions(corruptions=("fog", "pixelate"), severities=(2,), max_images=30)},
        {"accuracy_drop", "drop/fog", "accuracy/pixelate/2"},
        {"corruptions", "examples"},
    ),
    "linear-probe": ({"probe": LinearProbe(epochs=3)}, {"top1_accuracy", "top5_accuracy"}, {"top1", "top5"}),
    "intrinsic-dimension": ({}, {"intrinsic_dimension", "images"}, {"fit"}),
    "attribution": (
        {"attribution": Coverage(max_images=24, examples=3)},
        {"activated_share", "activated_share/1e-04"},
        {"activated_share", "maps"},
    ),
    "robustness": (
        {"attacks": AdversarialAttacks(epsilons=(4.0,), steps=2, max_images=10)},
        {"clean/auroc", "pgd/4/auroc_unknown_attacked"},
        {"accuracy", "auroc"},
    ),
}


@pytest.fixture(scope="module")
def partitions(digits):
    return Partitions(digits, torch.device("cpu"))


@pytest.fixture(scope="module")
def models(partitions, tmp_path_factory):
    """Two folders of models with random weights, one with a projection head and one with a classifier."""
    folder = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(
        recipe("digits"), encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=8), k=5
    )  # fmt: skip
    torch.manual_seed(0)
    build_model(Encoder(config.encoder, 1), partitions, config).save(folder / "ours" / "model")
    classifier = recipe("digits", "cross_entropy")
    classifier = dataclasses.replace(classifier, encoder=config.encoder, k=5)
    encoder = Encoder(config.encoder, 1, classifier.objective.classifier, 6)
    build_model(encoder, partitions, classifier).save(folder / "theirs" / "model")
    return folder


def config_of(models, digits, tmp_path, **options) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(models / "ours" / "model"), data=digits.folder, run_dir=tmp_path / "run", bootstrap=FEW, **options
    )


def load(config: EvaluateConfig) -> list[OpenSetModel]:
    return [OpenSetModel.load(Path(folder)) for folder in config.models]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_leaves_numbers_pictures_and_a_report(task, models, partitions, digits, tmp_path):
    options, numbers, figures = TASKS[task]
    config = config_of(models, digits, tmp_path, task=task, compare=(str(models / "theirs" / "model"),), **options)
    out = io.StringIO()
    result = measure(config, load(config), partitions, Console(file=out, width=150))
    assert numbers <= result.keys() and result["compared"].keys() == {"theirs"}
    assert json.loads((config.folder / "metrics.json").read_text()) == json.loads(json.dumps(result))
    page = (config.folder / "report.html").read_text("utf-8")
    for text in ("ours", "theirs", "digits, split 0", "Measured on"):
        assert text in page and text in out.getvalue()
    found = {path.stem for path in (config.folder / "figures").glob("*.png")} if figures else set()
    both = {f"{name}_{number}" for name in figures & {"fit"} for number in (1, 2)}
    assert found == (figures - {"fit"}) | both
    record = json.loads((config.folder / "config.json").read_text())
    assert record["config"]["task"] == task and record["split_hash"] == digits.protocol.split_hash
    assert not (config.folder / "mlflow.json").exists()


def test_the_record_holds_no_password(models, partitions, digits, tmp_path, monkeypatch):
    uri = "http://alice:SECRET@host:5000"
    config = config_of(models, digits, tmp_path, task="closed-set", tracking_uri=uri)
    monkeypatch.setattr("trainer.evaluate._record", lambda *args: None)  # nobody answers there
    measure(config, load(config), partitions, Console(quiet=True))
    for path in config.folder.glob("*.*"):
        assert "SECRET" not in path.read_text("utf-8")
    assert json.loads((config.folder / "config.json").read_text())["config"]["tracking_uri"] == "http://host:5000"


def test_numbers_are_those_of_the_evaluator(models, partitions, digits, tmp_path):
    config = config_of(models, digits, tmp_path, detector="knn", labels=("mine",))
    (model,) = load(config)
    result = measure(config, [model], partitions, Console(quiet=True))
    expected = OpenSet(detector="knn", bootstrap=FEW)(Subject(FeatureModel.of(model), partitions))
    assert result["score"] == expected.numbers
    assert result["intervals"]["oscr"] == expected.intervals["oscr"]._asdict()
    known, unknown = (model.score(partitions[name].images, [5]).scores[:, 0] for name in ("test_known", "test_unknown"))
    assert result["auroc"][5] == auroc(known, unknown)
    assert "compared" not in result and ">mine<" in (config.folder / "report.html").read_text("utf-8")
    # Without another detector, the score is that of algorithm 1.
    score = OpenSet(bootstrap=FEW)(Subject(FeatureModel.of(model), partitions)).numbers
    assert score["auroc"] == pytest.approx(result["auroc"][5], abs=1e-4)


def test_an_evaluation_becomes_a_run_with_its_report(models, partitions, digits, tmp_path):
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tmp_path / 'runs.db'}"
    config = config_of(models, digits, tmp_path, task="intrinsic-dimension", tracking_uri=store, experiment="measured")
    result = evaluate(config, Console(quiet=True))
    measure(config, load(config), partitions, Console(quiet=True))
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("measured").experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.info.status == "FINISHED"
        key = "intrinsic-dimension/intrinsic_dimension"
        assert run.data.metrics[key] == pytest.approx(result["intrinsic_dimension"])
        assert run.data.params["dimension.max_images"] == "20000"
        assert {each.path for each in client.list_artifacts(run.info.run_id)} >= {
            "report.html",
            "table.json",
            "figures",
        }
        figures = client.list_artifacts(run.info.run_id, "figures")
        assert [each.path for each in figures] == ["figures/fit.png", "figures/fit.svg"]


class TestBadInput:
    def test_models_of_other_classes(self, models, digits, tmp_path):
        card = json.loads((models / "theirs" / "model" / "model.json").read_text())
        other = tmp_path / "other" / "model"
        other.mkdir(parents=True)
        for file in (models / "theirs" / "model").iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "model.json").write_text(json.dumps(card | {"split_hash": "0" * 16}))
        with pytest.raises(InputError, match="compare models of the same split"):
            evaluate(config_of(models, digits, tmp_path, compare=(str(other),)), Console(quiet=True))

    def test_labels(self):
        with pytest.raises(InputError, match="2 labels for 1 models"):
            EvaluateConfig(model="a", labels=("x", "y"))
        with pytest.raises(InputError, match="called alike"):
            EvaluateConfig(model="runs/a/model", compare=("models/a/model",))
        assert EvaluateConfig(model="models:/a@champion", compare=("runs/b/model",)).named == ("a@champion", "b")

    def test_official_files_that_are_not_there(self, models, partitions, digits, tmp_path):
        corruptions = CommonCorruptions(corrupted_root=tmp_path)
        config = config_of(models, digits, tmp_path, task="corruptions", corruptions=corruptions)
        with pytest.raises(InputError, match="leave --corrupted-root out"):
            measure(config, load(config), partitions, Console(quiet=True))


def test_the_command_line(tmp_path):
    config = cli.parse(
        EvaluateConfig,
        prog="evaluate",
        description="",
        args=["--model", "m", "--task", "corruptions", "--corrupted-root", str(tmp_path), "--bootstrap.resamples", "0"],
    )
    assert config.corruptions.corrupted_root == tmp_path and config.bootstrap.resamples == 0
