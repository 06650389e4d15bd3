"""Tables of the paper from images to numbers, on digits."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console

from data_pipeline.beton import read_build
from data_pipeline.cli import Preempted
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from trainer.config import TrackingConfig
from trainer.evaluation.evaluators import BootstrapConfig, ClosedSet, Evaluation
from trainer.recipes import recipe
from trainer.registry import OpenSetModel
from trainer.reproduce import measure, runner
from trainer.reproduce.experiments import EXPERIMENTS, Measure, Variant, experiment
from trainer.reproduce.plan import ReproduceConfig, plan
from trainer.reproduce.runner import reproduce
from trainer.step import Trainer

DIGITS = "digits-0-16px-raw-600images"


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def output() -> Console:
    return Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))


def test_a_table_from_images_to_numbers_that_goes_on_where_it_stopped(monkeypatch, tmp_path):
    config = ReproduceConfig(
        experiment="table2",
        protocols=("digits",),
        splits=(0, 1),
        variants=("gradmix", "cross_entropy"),
        budget="smoke",
        source="parquet",  # not of digits, which are bundled
    )
    console = output()
    assert reproduce(dataclasses.replace(config, dry_run=True), console) is None
    said = console.export_text()
    assert "4 of 4 cells to compute" in said and not config.path.exists()

    # One cell fails as a bug would, and the rest goes on.
    def fail_once(config, *others, train=measure.train):
        if config.method == "cross_entropy" and config.split == 0:
            raise ZeroDivisionError("a bug")
        train(config, *others)

    monkeypatch.setattr(measure, "train", fail_once)
    console = output()
    with pytest.raises(InputError, match=r"1 of 4 cells failed.*cross_entropy-digits-0-seed0: ZeroDivisionError"):
        reproduce(config, console)
    assert "Traceback" in (config.path / "cross_entropy-digits-0-seed0.error.txt").read_text()
    said = console.export_text()
    assert (
        re.search(r"cross entropy +│ +digits │ +[0-9.]+ │.*│ +1 of 2 │", said) and "3 of 4 finished, 1 failed" in said
    )

    trained = []
    monkeypatch.undo()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "train", lambda c, *rest, train=measure.train: (trained.append(c), train(c, *rest)))
    result = reproduce(config, console := output())
    assert [(c.method, c.split) for c in trained] == [("cross_entropy", 0)]
    said = console.export_text()
    assert "Budget smoke: at most 2 epochs, 600 training images" in said and "4 of 4 finished" in said
    assert not list(config.path.glob("*.error.txt"))
    table = (config.path / "table.txt").read_text()
    assert all(line in said for line in table.splitlines()) and "│ GradMix" in table
    page = (config.path / "report.html").read_text()
    assert "<svg" in page and "cross entropy, algorithm 1" in page

    rows = {row[0]: row[2:] for row in result.rows}
    records = [json.loads(path.read_text()) for path in sorted(config.path.glob("gradmix-*/evaluation.json"))]
    values = [100 * record["numbers"]["osr/auroc"] for record in records]
    found = rows["GradMix"][0]
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    # The run's own metrics, at k = 10, are the same number found another way.
    runs = {cell.name: cell.config.folder for cell in plan(config)}
    own = json.loads((runs["gradmix-digits-0-seed0"] / "metrics.json").read_text())
    assert 100 * own["auroc"]["10"] == pytest.approx(values[0], abs=1e-2)
    classifier = json.loads((runs["cross_entropy-digits-0-seed0"] / "metrics.json").read_text())
    by_gallery = json.loads((config.path / "cross_entropy-digits-0-seed0" / "evaluation.json").read_text())["numbers"]
    assert classifier["auroc"]["10"] == pytest.approx(by_gallery["osr/auroc"], abs=1e-4)
    assert by_gallery["max_logit/auroc"] != by_gallery["osr/auroc"]
    assert all(number.published is None for row in rows.values() for number in row[:3]) and "SimCLR" not in rows
    assert rows["GradMix"][3:6] == ("2", "600", "2")
    assert records[0]["test_images"] == {"osr": sum(map(len, by_split_0(tmp_path)))}
    # Wherever the numbers stand, it says that they are a smoke test's.
    for name in ("table.csv", "table.txt", "table.json", "report.html"):
        assert "smoke" in (config.path / name).read_text(), name
    assert all(line.endswith(("budget", "smoke")) for line in result.to_csv().splitlines())
    log = (config.path / "log.txt").read_text().splitlines()
    assert all("smoke" in line for line in log if "AUROC" in line) and any("AUROC" in line for line in log)
    for name, figure in result.figures.items():
        mean = name.endswith("numbers")
        assert (
            figure.get_supxlabel() == ("Mean and standard deviation over all runs. " if mean else "") + "Budget smoke."
        )
        assert mean or figure.get_suptitle().endswith("digits, split 0, seed 0")

    assert {
        "digits_numbers",
        "digits_OpenSet_scores",
        "digits_OpenSet_roc",
        "digits_OpenSet_oscr",
    } <= result.figures.keys()

    # The states on the way have served.
    assert not list(config.folder.rglob("step-*"))
    cell, part = plan(config)[0], Partitions(read_build(tmp_path / "data" / DIGITS), torch.device("cpu"))
    model = OpenSetModel.load(cell.config.folder / "model")
    accuracy = Measure(evaluator=ClosedSet(bootstrap=BootstrapConfig(resamples=0)), course=8)
    with pytest.raises(InputError, match="checkpoints are gone: remove it to have it trained anew"):
        measure.course_of(accuracy, cell, model, part)

    trained.clear()
    reproduce(config, output())
    assert not trained

    # What is not whole is measured again, and the others are not.
    damaged = config.path / "gradmix-digits-0-seed0" / "evaluation.json"
    text = damaged.read_text()
    damaged.write_text(text[: len(text) // 2])
    (config.path / "cross_entropy-digits-1-seed0" / "arrays.npz").unlink()
    lacking = config.path / "cross_entropy-digits-0-seed0" / "evaluation.json"
    record = json.loads(lacking.read_text())
    del record["numbers"]["openmax/oscr"]
    lacking.write_text(json.dumps(record))
    arrays = config.path / "gradmix-digits-1-seed0" / "arrays.npz"
    content = arrays.read_bytes()
    arrays.write_bytes(content[:300] + bytes(8) + content[308:])  # its directory, at the end, is whole
    again = reproduce(config, output())
    assert sorted((c.method, c.split) for c in trained) == [
        ("cross_entropy", 0),
        ("cross_entropy", 1),
        ("gradmix", 0),
        ("gradmix", 1),
    ]
    assert again.rows == result.rows and json.loads(damaged.read_text())["numbers"] == json.loads(text)["numbers"]

    # A request to end in the middle of a cell is said.
    def preempted(*args):
        raise Preempted

    with monkeypatch.context() as patch:
        patch.setattr(measure, "train", preempted)
        damaged.unlink()
        with pytest.raises(Preempted):
            reproduce(config, console := output())
        said = console.export_text()
        assert "stopped in gradmix-digits-0-seed0: the same command goes on there" in said

        # With --restart nothing is left of what was, also of the cells that were not reached.
        with pytest.raises(Preempted):
            reproduce(dataclasses.replace(config, restart=True), console := output())
        assert "the same command without --restart goes on there" in console.export_text()
    assert not any(cell.record() or cell.is_trained for cell in plan(config))

    # A model that is gone from a run that says it is finished.
    only = dataclasses.replace(config, variants=("gradmix",), splits=(0,))
    reproduce(only, output())
    damaged.unlink()
    (runs["gradmix-digits-0-seed0"] / "model" / "model.json").unlink()
    with pytest.raises(InputError, match=r"is finished, but has lost its model: remove it to have it trained anew"):
        reproduce(only, output())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_request_to_stop_outside_of_training_ends_in_good_order(monkeypatch, request, number, status):
    config = ReproduceConfig(
        experiment="table1", protocols=("digits",), splits=(0,), variants=("supcon",), budget="smoke", restart=True
    )
    # A process that was started in the background of a shell ignores Ctrl-C, and its tests would, too.
    at_start = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, at_start))
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(each) for each in signals]
    monkeypatch.setattr(runner, "compute", lambda *args: os.kill(os.getpid(), number))
    with pytest.raises(Preempted) as stopped, runner.ended_in_good_order():
        reproduce(config, console := output())
    assert stopped.value.status == status
    # After Ctrl-C, too, another --restart would throw away what is there.
    said = console.export_text()
    assert "stopped in supcon-digits-0-seed0: the same command without --restart goes on there" in said
    assert [signal.getsignal(each) for each in signals] == handlers


def by_split_0(folder):
    """The test images of known and of unknown classes."""
    part = Partitions(read_build(folder / "data" / DIGITS), torch.device("cpu"))
    return part["test_known"].labels, part["test_unknown"].labels


def test_the_course_of_training_is_measured_and_its_checkpoints_go(monkeypatch):
    """A small figure 5: the states after each stretch are there, though many checkpoints were written between them."""
    accuracy = Measure(evaluator=ClosedSet(bootstrap=BootstrapConfig(resamples=0)), course=2)
    small = dataclasses.replace(
        experiment("table2"), variants=(Variant(name="x", config=of_digits, measures={"osr": accuracy}),), rows=()
    )
    monkeypatch.setitem(EXPERIMENTS, "figure5", lambda: small)
    config = ReproduceConfig(experiment="figure5", protocols=("digits",), splits=(0,), budget="smoke")
    (cell,) = plan(config)
    assert (cell.config.checkpoint_every, cell.config.keep_checkpoints) == (1, 2)
    reproduce(config, output())
    with np.load(cell.folder / "arrays.npz") as arrays:
        assert arrays["osr/course/epoch"].tolist() == [1, 2], "and none between the stretches"
        last = arrays["osr/course/closed_set_accuracy"][1]
    assert last == cell.record()["numbers"]["osr/closed_set_accuracy"]
    assert not (cell.config.folder / "checkpoints").exists()


def test_a_course_has_the_ends_of_its_stretches_only(monkeypatch):
    """A request to stop leaves checkpoints in between."""
    loaded = []
    monkeypatch.setattr(measure.checkpoint, "encoders", lambda folder: {epoch: f"{epoch}" for epoch in range(1, 8)})
    monkeypatch.setattr(measure, "load_encoder", lambda encoder, path: loaded.append(path))
    monkeypatch.setattr(measure, "Subject", lambda *args: None)
    (cell,) = plan(ReproduceConfig(experiment="table2", protocols=("digits",), splits=(0,), variants=("gradmix",)))
    cell = dataclasses.replace(cell, config=dataclasses.replace(cell.config, checkpoint_every=2, epochs=7))
    wanted = Measure(evaluator=lambda subject: Evaluation({"x": len(loaded)}), course=3)
    model = SimpleNamespace(encoder=None, of=lambda *args: None)
    monkeypatch.setattr(measure, "FeatureModel", model)
    found = measure.course_of(wanted, cell, model, None).arrays
    assert found["course/epoch"].tolist() == [2, 4, 6, 7] and found["course/x"].tolist() == [1, 2, 3, 4]
    assert loaded[:4] == ["2", "4", "6", "7"]


def test_tables_share_what_they_train_alike_and_finish_what_another_began(monkeypatch):
    def table(name: str, *variants: str, **changes) -> ReproduceConfig:
        chosen = {"protocols": ("digits",), "splits": (0,), "seeds": (0,), "budget": "smoke"}
        return ReproduceConfig(experiment=name, variants=variants, **chosen, **changes)

    def trainings() -> dict[str, dict]:
        paths = Path("reproductions/trainings").glob("*/metrics.json")
        return {path.parent.name: json.loads(path.read_text()) for path in paths}

    # One table is stopped in the midst of a training, and another one asks for the same.
    def stopped(trainer, batch, epoch, step, train_step=Trainer.train_step):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, batch, epoch, step)

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in signals]
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Trainer, "train_step", stopped)
        reproduce(table("figure2", "none"), output())
    assert [signal.getsignal(number) for number in signals] == handlers, "this process goes on"
    reproduce(table("table1", "supcon+simclr", "supcon"), output())
    (shared,) = [cell.config.folder for cell in plan(table("figure2", "none"))]
    assert "going on from" in (shared / "log.txt").read_text()
    before = trainings()
    assert len(before) == 2 and shared.name in before

    # The first finds it finished: it measures, and trains nothing.
    reproduce(table("figure2", "none", dry_run=True), console := output())
    assert re.search(r"│ all +│ +│ 1 +│ 0 +│ 0 +│", console.export_text())
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", None)
        figure = reproduce(table("figure2", "none"), output())
    assert trainings() == before
    cells = [*plan(table("figure2", "none")), *plan(table("table1", "supcon+simclr"))]
    one, other = (cell.record() for cell in cells)
    common = one["numbers"].keys() & other["numbers"].keys()
    assert "osr/auroc" in common and all(one["numbers"][name] == other["numbers"][name] for name in common)
    assert one["trained_in"] == other["trained_in"] == str(shared) and one["train_seconds"] == other["train_seconds"]
    row = figure.rows[0]
    assert row[2].value == pytest.approx(100 * other["numbers"]["osr/auroc"]) and row[5:8] == ("1", "600", "2")

    # Beginning again does so once for cells that share a run; what another table measured stays measured.
    twice = dataclasses.replace(
        experiment("table2"),
        variants=tuple(dataclasses.replace(experiment("table2").variants[1], name=name) for name in ("a", "b")),
        rows=(),
    )
    monkeypatch.setitem(EXPERIMENTS, "table2", lambda: twice)
    steps = []
    monkeypatch.setattr(
        Trainer, "train_step", lambda *args, step=Trainer.train_step: (steps.append(args[-1]), step(*args))[1]
    )
    reproduce(table("table2", "a", "b", restart=True), output())
    after = trainings()
    assert steps == [*range(9)] * 2 and {name for name in after if after[name] != before[name]} == {shared.name}
    assert all(cell.record() for cell in cells)


def of_digits(protocol):
    # A checkpoint at every reading of the losses.
    return dataclasses.replace(recipe(protocol, "cross_entropy"), checkpoint_minutes=1e-9, log_every=1)


def test_a_deepspeed_file_is_known_by_its_content_and_has_to_be_there(tmp_path):
    path = tmp_path / "ds.json"
    config = ReproduceConfig(experiment="table2", protocols=("digits",), deepspeed_config=path, dry_run=True)
    with pytest.raises(InputError, match=r"there is no DeepSpeed configuration .*ds.json: correct --deepspeed-config"):
        reproduce(config, output())
    path.write_text('{"gradient_clipping": 1.0}')
    one, without = plan(config)[0].request, plan(dataclasses.replace(config, deepspeed_config=None))[0].request
    path.write_text('{"gradient_clipping": 2.0}')
    other = plan(config)[0].request
    assert one != other and without not in (one, other)
    path.rename(tmp_path / "renamed.json").write_text('{"gradient_clipping": 1.0}')
    assert plan(dataclasses.replace(config, deepspeed_config=tmp_path / "renamed.json"))[0].request == one


def test_a_table_in_mlflow_and_a_store_that_does_not_answer(tmp_path):
    store = f"sqlite:///{tmp_path}/mlruns.db"
    config = ReproduceConfig(
        experiment="table1",
        protocols=("digits",),
        splits=(0,),
        variants=("supcon",),
        budget="smoke",
        tracking=TrackingConfig(experiment="tables", alias="", uri="http://127.0.0.1:9"),
    )
    reproduce(config, console := output())
    said = console.export_text()
    assert said.count("going on without MLflow") == 1 and "1 of 1 finished" in said
    assert f"did not take the table: python -m trainer.tracking sync {config.path} delivers it later" in said

    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=store))
    result = reproduce(config, console := output())
    assert f"recorded in {store}, experiment tables" in console.export_text()
    reproduce(config, output())
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("tables").experiment_id])
    assert run.info.run_name == "table1-smoke" and run.info.status == "FINISHED"
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "table.json", "table.csv", "table.txt", "figures"} <= names
    value = next(row for row in result.rows if row[0] == "SupCon")[3].value
    assert run.data.metrics["digits/SupCon/AUROC"] == pytest.approx(value)
