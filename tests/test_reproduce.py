"""Tables of the paper: the plan, the published figures, and one small table from images to numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics

import pytest
import torch
from rich.console import Console

from data_pipeline.beton import read_build
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from data_pipeline.protocols import protocol_names, split_count
from trainer import reproduce as module
from trainer.config import recipe
from trainer.evaluators import BootstrapConfig, ClosedSet
from trainer.experiments import EXPERIMENTS, Measure, experiment, published
from trainer.registry import OpenSetModel
from trainer.reproduce import BUDGETS, Budget, ReproduceConfig, plan, reproduce, table_of

DIGITS = "digits-0-16px-raw-600images"


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def output() -> Console:
    return Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))


@pytest.mark.parametrize("name", [*EXPERIMENTS, "figure4"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_cell_of_every_experiment_is_a_configuration(name, budget):
    config = ReproduceConfig(experiment=name, budget=budget)
    chosen, cells = experiment(config.experiment), plan(config)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and set(chosen.protocols) <= set(protocol_names())
    assert len({cell.config.folder for cell in cells}) == len(cells)
    variants = {variant.name: variant for variant in chosen.variants}
    runs = sum(len(chosen.splits or range(split_count(p))) for p in chosen.protocols) * len(chosen.seeds)
    assert len(cells) == runs * len(variants)
    for row in chosen.rows:
        # Every number of the table is found by a measure of its variant.
        for column in chosen.columns:
            assert (column.measure or row.measure) in variants[row.variant].measures
    for cell in cells:
        assert cell.config.protocol == cell.protocol.name and cell.config.split == cell.protocol.split
        limit = BUDGETS[budget]
        assert limit.epochs is None or cell.config.total_epochs <= limit.epochs
    assert {variant.name for variant in chosen.variants} == {row.variant for row in chosen.rows}


def test_variants_of_one_protocol_differ_in_what_they_train():
    for name in EXPERIMENTS:
        cells = plan(ReproduceConfig(experiment=name, protocols=("cifar10",), splits=(0,)))
        assert len({json.dumps(cell.config.identity) for cell in cells}) == len(cells), name


def test_published_figures_are_the_papers():
    """A few of each table, from the paper itself, and that none is on a scale or under a name of its own."""
    table2 = published("table2")["rows"]
    assert len(table2) == 14 and table2["GradMix"]["tinyimagenet"] == {"auroc": 81.92}
    assert table2["MEDAF"]["cifar10"] == {"auroc": 86.0} and "mnist" not in table2["MEDAF"]
    assert "splits of its own" in published("table2")["marks"]["MEDAF"]
    assert statistics.fmean(v["auroc"] for v in table2["ARPL"].values()) == pytest.approx(92.1667, abs=1e-3)
    assert published("table1")["rows"]["SupCon"]["cifar10"] == {"intrinsic_dimension": 8.07, "auroc": 67.15}
    assert published("table3")["rows"]["GradMix"]["cifar100-closed"] == {"closed_set_accuracy": 78.0}
    assert published("table4")["rows"]["GradMix"]["cifar10-ood-svhn"]["dtacc"] == 99.81
    for name in EXPERIMENTS:
        columns = {column.number for column in experiment(name).columns}
        for label, protocols in published(name)["rows"].items():
            assert protocols.keys() <= set(experiment(name).protocols), label
            for numbers in protocols.values():
                assert numbers.keys() <= columns and all(5 < value < 100 for value in numbers.values()), label


def test_published_only_rows_come_first_and_measured_ones_keep_their_figures():
    config = ReproduceConfig(experiment="table2", protocols=("cifar10", "mnist"), splits=(0,), variants=("arpl",))
    result = table_of(config, plan(config))
    assert result.columns[:5] == ("row", "protocol", "AUROC (%)", "OSCR (%)", "accuracy (%)")
    rows = {row[:2]: row[2:] for row in result.rows}
    assert list(rows)[:2] == [("G-OpenMax", "cifar10"), ("OSRCI", "cifar10")]
    assert list(rows)[-1] == ("ARPL, algorithm 1", "mnist") and ("GRROSR", "mnist") not in rows
    auroc, oscr = rows["ARPL", "cifar10"][:2]
    assert (auroc.value, auroc.published, oscr.published) == (None, 90.1, None)
    assert rows["ARPL", "cifar10"][3:] == ("0 of 1", None, None, None)
    assert rows["MEDAF *", "cifar10"][0].published == 86.0
    assert any("splits of its own" in note for note in result.notes)


def test_a_budget_limits_and_never_raises():
    config = BUDGETS["short"].applied(experiment("table2").variants[4].config("cifar10"))
    assert (config.epochs, config.encoder.width, config.batch_size) == (20, 16, 64)
    assert config.optimizer.warmup_epochs == pytest.approx(20 / 30)
    mnist = BUDGETS["short"].applied(experiment("table2").variants[0].config("mnist"))
    assert mnist.epochs == 10
    assert mnist.phases == ()
    whole = experiment("table2").variants[0].config("cifar10")
    assert BUDGETS["full"].applied(whole) == whole


@pytest.mark.parametrize(
    ("phases", "limit", "expected"),
    [
        (("600:0:1", "10:1:1.2"), None, ("600:0:1", "10:1:1.2")),
        (("600:0:1", "10:1:1.2"), 700, ("600:0:1", "10:1:1.2")),
        (("600:0:1", "10:1:1.2"), 20, ("19:0:1", "1:1:1.2")),
        (("600:0:1", "10:1:1.2"), 2, ("1:0:1", "1:1:1.2")),
        (("3:1:0", "90:0:1", "7:1:1"), 50, ("1:1:0", "46:0:1", "3:1:1")),
        (("1:1:0", "1:0:1"), 1, ("1:1:0", "1:0:1")),
        ((), 5, ()),
    ],
)
def test_a_budget_keeps_the_proportions_of_phases(phases, limit, expected):
    config = dataclasses.replace(recipe("cifar10"), phases=phases)
    applied = Budget(epochs=limit).applied(config)
    assert applied.phases == expected
    assert applied.total_epochs == (sum(int(text.split(":")[0]) for text in expected) or limit)


def test_cifar_runs_have_the_published_phases_and_the_table_says_how_long_each_was_trained():
    cells = plan(ReproduceConfig(experiment="table2", protocols=("mnist", "cifar10", "cifar+10"), splits=(0,)))
    phased = {(c.variant.name, c.protocol.name) for c in cells if c.config.phases == ("600:0:1", "10:1:1.2")}
    assert phased == {(v, p) for v in ("gradmix", "supcon+simclr") for p in ("cifar10", "cifar+10")}
    lengths = {(c.variant.name, c.protocol.name): c.config.total_epochs for c in cells}
    assert (
        lengths["gradmix", "cifar10"] == 610 and lengths["cross_entropy", "mnist"] == lengths["arpl", "cifar10"] == 600
    )
    lines = module.schedules(cells)
    assert (
        "Trained for 600 epochs of θ = 0, λ = 1, then 10 epochs of θ = 1, λ = 1.2: gradmix, supcon+simclr on cifar10, "
        "cifar+10." in lines
    )
    assert "Trained for 600 epochs: cross_entropy, arpl on mnist, cifar10, cifar+10." in lines
    assert "Trained for 10 epochs of θ = 1, λ = 3: gradmix, supcon+simclr on mnist." in lines
    assert any("in place of RandAugment" in line for line in lines)
    said = module.schedules(plan(ReproduceConfig(experiment="table1", protocols=("tinyimagenet",))))
    assert any("800 for some" in line for line in said) and not any("RandAugment" in line for line in said)
    # Rows of one picture differ in the mixing alone.
    for name in ("figure2", "figure3", "beyond"):
        cells = plan(ReproduceConfig(experiment=name, protocols=("cifar10",), splits=(0,), seeds=(0,)))
        assert {cell.config.phases for cell in cells} == {("600:0:1", "10:1:1.2")}


def test_what_is_named_twice_is_run_once():
    once = ReproduceConfig(experiment="table2", protocols=("mnist",), splits=(0, 1), seeds=(3,), variants=("arpl",))
    twice = ReproduceConfig(
        experiment="table2",
        protocols=("mnist", "mnist"),
        splits=(0, 1, 0),
        seeds=(3, 3),
        variants=("arpl", "arpl"),
    )
    assert twice == once and [cell.name for cell in plan(twice)] == [cell.name for cell in plan(once)]


def test_a_budget_limits_the_images_of_what_takes_long_alone():
    def most(name: str, measure: str, budget: str) -> int | None:
        return BUDGETS[budget].measured(experiment(name).variants[0]).measures[measure].evaluator.max_images

    assert [most("table5", "corruptions", budget) for budget in ("smoke", "short", "full")] == [100, 1000, None]
    assert most("beyond", "attacks", "short") == 1000 and most("figure6", "coverage", "full") == 2560
    assert most("table1", "dimension", "smoke") == 20_000


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
    def fail_once(config, *others, train=module.train):
        if config.method == "cross_entropy" and config.split == 0:
            raise ZeroDivisionError("a bug")
        train(config, *others)

    monkeypatch.setattr(module, "train", fail_once)
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
    monkeypatch.setattr(module, "train", lambda c, *rest, train=module.train: (trained.append(c), train(c, *rest)))
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
    own = json.loads((config.path / "gradmix-digits-0-seed0" / "metrics.json").read_text())
    assert 100 * own["auroc"]["10"] == pytest.approx(values[0], abs=1e-2)
    classifier = json.loads((config.path / "cross_entropy-digits-0-seed0" / "metrics.json").read_text())
    by_gallery = json.loads((config.path / "cross_entropy-digits-0-seed0" / "evaluation.json").read_text())["numbers"]
    assert classifier["auroc"]["10"] == pytest.approx(by_gallery["osr/auroc"], abs=1e-4)
    assert by_gallery["max_logit/auroc"] != by_gallery["osr/auroc"]
    assert all(number.published is None for row in rows.values() for number in row[:3]) and "SimCLR" not in rows
    assert rows["GradMix"][3:6] == ("2", "600", "2")

    assert {"digits_bars", "digits_OpenSet_roc", "digits_OpenSet_oscr"} <= result.figures.keys()

    # The state at the only checkpoint is what came out.
    cell, part = plan(config)[0], Partitions(read_build(tmp_path / "data" / DIGITS), torch.device("cpu"))
    model = OpenSetModel.load(cell.config.folder / "model")
    accuracy = Measure(evaluator=ClosedSet(bootstrap=BootstrapConfig(resamples=0)), course=8)
    course = module.course_of(accuracy, cell, model, part).arrays
    assert course["course/epoch"].tolist() == [2]
    assert course["course/closed_set_accuracy"] == records[0]["numbers"]["osr/closed_set_accuracy"]

    trained.clear()
    reproduce(config, output())
    assert not trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "table9"}, "unknown experiment 'table9'; known: table1"),
        ({"protocols": ("cifar",)}, "unknown protocol 'cifar'; known: digits"),
        ({"variants": ("softmax",)}, "unknown variant 'softmax'; known: gradmix"),
        ({"splits": (-1,)}, "set --splits and --seeds to 0 or more"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ReproduceConfig(**{"experiment": "table2", **change})
