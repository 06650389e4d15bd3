"""Differences between two models against a naive bootstrap, and aliases that move, stay and come back."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.files import write_json
from tests.models import NAME, finished_run
from trainer.promotion import Measurement, compare, comparison_table, demote, difference, history_tables, promote
from trainer.promotion import TestScores as Scores
from trainer.registry import OpenSetModel, log_version, moves, register
from trainer.registry_commands import app
from trainer.tracking import Link


def two_models(seed: int, known: int = 60, unknown: int = 40, gain: float = 0.0) -> tuple[Scores, Scores]:
    """Scores of two models that agree on most images, the second better by `gain`."""
    generator = np.random.default_rng(seed)
    easy_known, easy_unknown = generator.normal(1, 1, known), generator.normal(0, 1, unknown)
    models = []
    for better in (0.0, gain):
        noise = generator.normal(0, 0.3, known), generator.normal(0, 0.3, unknown)
        correct = generator.uniform(size=known) < 0.9
        models.append(Scores(easy_known + noise[0] + better, correct, easy_unknown + noise[1], 0.5))
    return models[0], models[1]


def naive_auroc(scores: Scores, known, unknown) -> float:
    return float((scores.known[known][:, None] > scores.unknown[unknown]).mean())  # no scores are equal


def test_the_interval_is_that_of_a_naive_paired_bootstrap():
    first, second = two_models(0, gain=0.2)
    found = difference(first, second, "auroc", resamples=2000)
    generator, differences = np.random.default_rng(1), []
    for _ in range(2000):
        known = generator.integers(0, len(first.known), len(first.known))
        unknown = generator.integers(0, len(first.unknown), len(first.unknown))
        differences.append(naive_auroc(second, known, unknown) - naive_auroc(first, known, unknown))
    low, high = np.quantile(differences, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    every = np.arange(60), np.arange(40)
    assert found.value == pytest.approx(naive_auroc(second, *every) - naive_auroc(first, *every))
    # Drawn apart, the images' own luck would count twice.
    apart = [
        naive_auroc(second, generator.integers(0, 60, 60), every[1])
        - naive_auroc(first, generator.integers(0, 60, 60), every[1])
        for _ in range(1000)
    ]
    assert found.high - found.low < 0.8 * np.subtract(*np.quantile(apart, [0.975, 0.025]))


def test_the_memory_of_an_interval_does_not_grow_with_the_resamples():
    first, second = two_models(0, known=20_000, unknown=20_000)
    difference(first, second, "accuracy", resamples=100)  # what SciPy keeps once it is imported
    tracemalloc.start()
    found = difference(first, second, "accuracy", resamples=600)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6 and found.low < found.value < found.high  # all indices at once are 96 MB


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # Without a gain, the two are alike but for luck: the difference is 0.
    inside = [difference(*two_models(seed), "auroc", confidence=0.8, resamples=100) for seed in range(40)]
    assert 0.62 <= np.mean([found.low <= 0 <= found.high for found in inside]) <= 0.95


METRICS = ["auroc", "oscr", "accuracy", "accepted", "rejected"]


@pytest.mark.parametrize("metric", METRICS)
def test_equal_models_differ_by_nothing_and_swapped_ones_by_the_opposite(metric):
    first, second = two_models(3, gain=0.5)
    same = difference(first, first, metric)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    one, other = difference(first, second, metric), difference(second, first, metric)
    assert one.value == -other.value and (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.02)
    assert one.low <= one.value <= one.high


def test_rates_are_taken_at_each_models_own_threshold():
    first, _ = two_models(4)
    second = dataclasses.replace(first, threshold=1.0)
    assert first.same_scores(second) and first.threshold == 0.5
    for metric in ("auroc", "oscr", "accuracy"):
        assert difference(first, second, metric, resamples=100).value == 0
    accepted, rejected = (difference(first, second, metric) for metric in ("accepted", "rejected"))
    assert accepted.first == np.mean(first.known >= 0.5) and accepted.second == np.mean(first.known >= 1.0)
    assert rejected.first == np.mean(first.unknown < 0.5) and rejected.second == np.mean(first.unknown < 1.0)
    # An image either changes sides or it does not: the interval is that of a share of all.
    for found, count in ((accepted, 60), (rejected, 40)):
        share = abs(found.value)
        wide = 2 * 1.96 * np.sqrt(share * (1 - share) / count)
        assert found.high - found.low == pytest.approx(wide, rel=0.25) and found.low <= found.value <= found.high


def test_models_that_classify_otherwise_are_not_taken_for_equal():
    first, _ = two_models(5)
    second = dataclasses.replace(first, correct=~first.correct)
    found = difference(first, second, "accuracy")
    assert found.low < found.value < found.high < 0


@pytest.fixture(scope="module")
def worse(model) -> OpenSetModel:
    """The model with its gallery's labels mixed up."""
    return OpenSetModel(model.card, model.encoder, model.gallery.flip(0), model.gallery_labels, model.gallery_ids)


@pytest.fixture(scope="module")
def three_versions(model, worse, tmp_path_factory) -> Path:
    """A store in which version 1 is the champion, version 2 equals it and version 3 is worse."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/store.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert [finished_run(folder / "1", model, uri), finished_run(folder / "2", model, uri, "")] == ["1", "2"]
        assert finished_run(folder / "3", worse, uri, "challenger") == "3"
    return folder / "store.db"


@pytest.fixture
def registry(three_versions, tmp_path) -> str:
    """A copy of it to change; the models themselves stay where they are."""
    shutil.copy(three_versions, tmp_path)
    return f"sqlite:///{tmp_path}/store.db"


CHAMPION = f"models:/{NAME}@champion"


def champion(uri: str) -> str:
    return str(MlflowClient(uri).get_model_version_by_alias(NAME, "champion").version)


def test_the_alias_goes_only_to_one_that_is_not_worse(registry, digits, capsys):
    options = {
        "measurement": Measurement(data=digits.folder, tracking_uri=registry, resamples=100),
        "margin": 0.0, "metric": "accuracy", "console": Console(width=200),
    }  # fmt: skip
    assert not promote(CHAMPION, f"models:/{NAME}@challenger", **options) and champion(registry) == "1"
    assert "version 1 stays @champion: version 3 may be worse by" in capsys.readouterr().out
    assert "accuracy -" in MlflowClient(registry).get_model_version(NAME, "3").tags["champion.refused"]
    # One that is the same in everything is not surely better, but surely not worse by any margin.
    assert not promote(CHAMPION, f"models:/{NAME}/2", **options) and champion(registry) == "1"
    assert "may be worse by 0.0000 in accuracy, and has to be surely better" in capsys.readouterr().out
    options["margin"] = 1e-6
    assert promote(CHAMPION, f"models:/{NAME}/2", **options) and champion(registry) == "2"
    # A margin that wide lets anything through.
    assert promote(CHAMPION, f"models:/{NAME}/3", **{**options, "margin": 0.99}) and champion(registry) == "3"

    client = MlflowClient(registry)
    assert [(m.old, m.new) for m in moves(client, NAME) if m.alias == "champion"] == [
        (None, "1"), ("1", "2"), ("2", "3")
    ]  # fmt: skip
    assert "accuracy" in client.get_model_version(NAME, "2").tags["champion.since"]
    assert "champion.until" in client.get_model_version(NAME, "1").tags
    # Back, one by one, and no further than the first.
    assert demote(CHAMPION, "it was a mistake", registry) == "2" == champion(registry)
    assert demote(CHAMPION, "", registry) == "1" == champion(registry)
    with pytest.raises(InputError, match="no version of gradmix-digits is known to have been @champion before 1"):
        demote(CHAMPION, "", registry)
    # Somebody else's move leaves no note; the way back is known all the same.
    client.set_registered_model_alias(NAME, "champion", "3")
    assert demote(CHAMPION, "", registry) == "1"
    # Neither does it hide who was there before.
    client.set_registered_model_alias(NAME, "champion", "3")
    assert promote(CHAMPION, f"models:/{NAME}/2", **options) and champion(registry) == "2"
    assert demote(CHAMPION, "", registry) == "3" and demote(CHAMPION, "", registry) == "1"
    for table in history_tables(NAME, registry):
        options["console"].print(table)
    printed = capsys.readouterr().out
    assert "version 3 demoted: it was a mistake" in printed and "registered after training" in printed
    assert "champion refused against version 1" in printed


def test_an_alias_that_nobody_carries_goes_to_the_first(registry, tmp_path):
    measurement = Measurement(data=tmp_path, tracking_uri=registry)
    options = {"margin": 0.0, "metric": "auroc", "console": Console(quiet=True)}
    assert promote(f"models:/{NAME}@live", f"models:/{NAME}/3", measurement, **options)
    assert str(MlflowClient(registry).get_model_version_by_alias(NAME, "live").version) == "3"


def test_comparing_measures_both_on_the_same_images(registry, digits, model, worse):
    measurement = Measurement(data=digits.folder, tracking_uri=registry, resamples=100)
    result = compare(CHAMPION, f"models:/{NAME}/3", measurement)
    assert (result.known, result.unknown) == (268, 182)
    assert list(result.differences) == METRICS
    found = result.differences["accuracy"]
    assert found.second < found.first and found.low <= found.value <= found.high < 0
    told = printed(comparison_table(result, "a", "b", 0.95))
    assert "known accepted" in told and "unknown rejected" in told and "only" not in told


def test_a_model_that_differs_by_its_threshold_alone_is_said_to(registry, digits, model, tmp_path):
    card = dataclasses.replace(model.card, threshold=0.5)
    OpenSetModel(card, model.encoder, model.gallery, model.gallery_labels).save(tmp_path / "other")
    measurement = Measurement(data=digits.folder, tracking_uri=registry, resamples=100)
    result = compare(CHAMPION, str(tmp_path / "other"), measurement)
    assert result.differences["auroc"].value == 0 and result.differences["accepted"].value > 0
    told = printed(comparison_table(result, "a", "b", 0.95))
    assert f"only the thresholds {model.card.threshold:.4f} and 0.5000 differ" in told
    alike = compare(CHAMPION, f"models:/{NAME}/2", measurement)
    assert "the models answer alike" in printed(comparison_table(alike, "a", "b", 0.95))


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_what_cannot_be_compared(registry, digits, tmp_path):
    def refused(message, first=CHAMPION, second=f"models:/{NAME}/2", **options):
        with pytest.raises(InputError, match=message):
            compare(first, second, Measurement(**{"data": digits.folder, "tracking_uri": registry, **options}))

    refused("confidence is 1", confidence=1)
    refused("resamples is 5", resamples=5)
    refused("models:/gradmix-digits/9 is not in the MLflow store", second=f"models:/{NAME}/9")
    refused("build them, or correct --data", data=tmp_path)

    def not_promoted(message, champion=CHAMPION, challenger=f"models:/{NAME}/2", margin=0.0):
        with pytest.raises(InputError, match=message):
            promote(
                champion, challenger, Measurement(data=digits.folder, tracking_uri=registry), margin=margin,
                metric="auroc", console=Console(quiet=True),
            )  # fmt: skip

    not_promoted("margin is -1", margin=-1)
    not_promoted("names no alias to move", champion=f"models:/{NAME}/1")
    not_promoted("which is @champion already", challenger=f"models:/{NAME}/1")
    not_promoted("names no registered model", challenger=str(tmp_path))
    not_promoted("no version of other", champion="models:/other@champion")


def test_a_reason_that_no_database_holds_moves_nothing(registry):
    assert promote(f"models:/{NAME}@live", f"models:/{NAME}/1", Measurement(tracking_uri=registry), margin=0.0,
                   metric="auroc", console=Console(quiet=True))  # fmt: skip
    MlflowClient(registry).set_registered_model_alias(NAME, "live", "2")
    with pytest.raises(InputError, match="the reason has 6,000 characters; say it in at most 1,000"):
        demote(f"models:/{NAME}@live", "x" * 6000, registry)
    assert str(MlflowClient(registry).get_model_version_by_alias(NAME, "live").version) == "2"


def test_a_run_is_not_registered_in_the_store_of_another_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run", model, "sqlite:///mlruns.db")
    Link.read(tmp_path / "run").replaced(run_id="0" * 32).save(tmp_path / "run")
    with pytest.raises(InputError, match=r"store sqlite:///mlruns\.db has no run 0+ of .*: call this from the folder"):
        register(tmp_path / "run", NAME, "champion")
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    with pytest.raises(InputError, match="there is no MLflow store"):
        register(tmp_path / "run", NAME, "champion")
    assert not list((tmp_path / "third").iterdir())


def test_a_version_is_noted_with_the_name_of_its_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, other, uri = tmp_path / "run", tmp_path / "other", f"sqlite:///{tmp_path}/store.db"
    finished_run(run, model, uri)
    finished_run(other, OpenSetModel(dataclasses.replace(model.card, split_hash="0" * 16), model.encoder, model.gallery,
                                     model.gallery_labels), uri, "")  # fmt: skip
    client = MlflowClient(uri)
    # Of a name that has no version yet, and of one whose version 1 is another run's model.
    assert register(run, "first", "champion") == "1" and register(other, "prod", "champion") == "1"
    assert register(run, "prod", "champion") == "2"
    assert client.get_model_version_by_alias("prod", "champion").run_id == Link.read(run).run_id
    assert client.get_model_version("prod", "1").tags["split_hash"] == "0" * 16
    # Again, from a link to either name or of before the name was kept, is the same version.
    link = Link.read(run)
    assert (link.model_name, link.version) == ("prod", "2")
    assert (register(run, "prod", ""), register(run, NAME, ""), register(run, "prod", "")) == ("2", "1", "2")
    record = {key: value for key, value in link.__dict__.items() if key != "model_name"}
    write_json(run / "mlflow.json", {**record, "version": "7"})
    assert (Link.read(run).model_name, register(run, "prod", "")) == (None, "2")
    # A version with another threshold belongs to the run too, but is not what training made.
    write_json(run / "mlflow.json", record)
    recalibrated = log_version(run / "model", "prod", link.run_id, model.card)
    client.set_model_version_tag("prod", recalibrated, "recalibrated_from", "2")
    assert recalibrated == "3" and register(run, "prod", "") == "2"


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    measurement = Measurement(tracking_uri=f"sqlite:///{tmp_path}/typo.db")
    with pytest.raises(InputError, match="there is no MLflow store"):
        promote(CHAMPION, f"models:/{NAME}/1", measurement, margin=0, metric="auroc", console=Console(quiet=True))
    assert not (tmp_path / "typo.db").exists()


def test_the_command_line(registry, digits, capsys):
    options = ["--data", str(digits.folder), "--tracking-uri", registry, "--resamples", "100"]
    with pytest.raises(SystemExit) as ended:
        app.cli(args=["promote", CHAMPION, f"models:/{NAME}/3", *options, "--margin", "0", "--metric", "accuracy"])
    assert ended.value.code == 1 and "stays @champion" in capsys.readouterr().out
    app.cli(args=["promote", CHAMPION, f"models:/{NAME}/2", *options])
    app.cli(args=["history", NAME, "--tracking-uri", registry])
    assert "moves of aliases" in capsys.readouterr().out
    with pytest.raises(InputError, match="there is no model 'nobody'; known: gradmix-digits"):
        app.cli(args=["history", "nobody", "--tracking-uri", registry])
